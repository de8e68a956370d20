"""Tokens beside widths: one decision a block, over how many tokens it runs on and how narrow its parts are.

What a rank or a unit saves depends on the tokens that flow through it. A block's tokens change nothing in other blocks
(the stream between blocks holds all of them), so a block is one decision: at every number of tokens its parts go
together along their hulls, and all of that is one table of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...sites import TokenSite
from ..choose import Table, in_step
from ..costs import Cost
from ..ladders import Choice, Ladder, joined


@dataclass(frozen=True)
class TokenLadder:
    """What a block may run on: options from few tokens to all, the last as it stands."""

    site: TokenSite
    choices: tuple[Choice, ...]

    def share(self, choice: Choice) -> float:
        """Share of the grid's tokens that run."""
        entry = choice.entries.get(self.site.name)
        return 1.0 if entry is None else entry.keep / entry.full


Options = tuple[Table, tuple[Choice, ...]]


def options_of_blocks(decisions: Sequence[Ladder], tokens: Sequence[TokenLadder], cost: Cost) -> list[Options]:
    """The options of every decision; those in blocks whose tokens may become fewer are one decision a block."""
    inside: dict[str, list[Ladder]] = {ladder.site.path: [] for ladder in tokens}
    found: list[Options] = []
    for decision in decisions:
        block = next((path for path in inside if all(_within(s.path, path) for s in decision.sites.values())), None)
        if block is None:
            found.append(decision.table(cost))
        else:
            inside[block].append(decision)
    return [*found, *(_options_of_block(ladder, inside[ladder.site.path], cost) for ladder in tokens)]


def _within(path: str, block: str) -> bool:
    return path.startswith(f"{block}.")


def _options_of_block(tokens: TokenLadder, decisions: Sequence[Ladder], cost: Cost) -> Options:
    """Every number of tokens with every step along the hulls of the block's parts, cheaper than all as it stands."""
    priced: list[tuple[float, Choice]] = []
    for few in tokens.choices:
        entry = few.entries.get(tokens.site.name)
        at = cost if entry is None else cost.on_fewer_tokens(tokens.site.share(entry.keep))
        extra = 0.0 if entry is None else cost(tokens.site, entry)
        tables = [decision.table(at) for decision in decisions]
        for places in in_step([table for table, _ in tables], "price"):
            chosen = [options[i] for (_, options), i in zip(tables, places, strict=True)]
            spent = sum(float(table.costs[i]) for (table, _), i in zip(tables, places, strict=True))
            priced.append((spent + extra, joined([few, *chosen])))
    dense = sum(decision.table(cost)[0].dense for decision in decisions)
    priced = [(spent, choice) for spent, choice in priced if spent < dense or not choice.entries]
    priced.sort(key=lambda pair: (pair[0], -pair[1].loss))
    costs, losses, kept = (
        np.array(numbers, dtype=float)
        for numbers in zip(*((spent, choice.loss, choice.kept) for spent, choice in priced), strict=True)
    )
    return Table(costs, losses, kept, dense), tuple(choice for _, choice in priced)

"""Losses of tokens in the unit in which those of ranks and units are predicted.

Both are predicted by adding up what each change loses alone. Far from the model as it stands neither is exact: what was
cut together loses more than the sum. So before they are weighed with each other, a plan of each alone for one saving is
measured on a few pictures, and the losses of tokens are scaled by how much further one is off than the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...errors import BudgetError
from ...plan import Plan
from .blocks import TokenLadder
from .meter import Meter

REFERENCE = 0.3
"""Share of the cost that the two plans save."""
PlanOf = Callable[[str, Sequence[TokenLadder]], Plan]
"""The plan for that saving by some forms alone."""


def balanced(
    ladders: Sequence[TokenLadder], meter: Meter, widths: str, plan_of: PlanOf, **material: Any
) -> tuple[TokenLadder, ...]:
    """The ladders of tokens, their losses scaled.

    Args:
        widths: the forms beside tokens, ``"ranks,units"``. material: what weights are made from, for
            :func:`comcat.apply_`.
    """
    try:
        channels, tokens = plan_of(widths, ()), plan_of("tokens", ladders)
    except BudgetError:  # one alone cannot save so much: they are taken as they were predicted
        return tuple(ladders)
    off = [meter.loss(plan.sites, **material) / max(plan.made_by["error"], 1e-300) for plan in (channels, tokens)]
    if min(off) <= 0:
        return tuple(ladders)
    return tuple(_scaled(ladder, off[1] / off[0]) for ladder in ladders)


def _scaled(ladder: TokenLadder, factor: float) -> TokenLadder:
    return replace(ladder, choices=tuple(replace(choice, loss=choice.loss * factor) for choice in ladder.choices))

"""What the blocks of a model may run on, in one form, and the schedules that a rule makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import ModelError
from ...forms.tokens import grid_entry, token_entry
from ...hosts import find_sites
from ...plan import SitePlan
from ...sites import ProductSite, TokenSite
from ..settings import How

OFFERED = tuple(round(1 - 0.05 * i, 2) for i in range(1, 14))
"""Shares of the tokens that a block may run on."""
WINDOWS = ((1, 2), (2, 1), (2, 2))


class Offer:
    """What blocks may run on in one form."""

    def __init__(
        self, model: nn.Module, sites: Sequence[TokenSite], how: How, *, residual: bool = True, by: str = "class"
    ) -> None:
        self.model, self.sites, self.how, self.residual = model, sites, how, residual
        if how == "grid" and (unknown := next((s for s in sites if s.grid is None), None)) is not None:
            raise ModelError(f"{unknown.name}: the grid of its tokens is not known; how='similar' needs none")
        self.attention = _class_attention(model, sites, by) if how == "drop" else {}

    def entry(self, site: TokenSite, share: float) -> SitePlan:
        """A site at the offered share that is next to ``share``, as a plan's entry."""
        if self.how == "grid":
            window = min(WINDOWS, key=lambda w: abs(grid_entry(site, w).keep / site.full - share))
            return grid_entry(site, window, residual=self.residual)
        return self._entry(site, min(site.full, max(1, round(share * site.full))))

    def _entry(self, site: TokenSite, keep: int) -> SitePlan:
        more = self.attention.get(site.name, {})
        return token_entry(site, self.how, keep, residual=self.residual, **more)

    def shares(self, site: TokenSite) -> tuple[float, ...]:
        """The shares at which a site can run, less than one."""
        if self.how == "grid":
            return tuple(sorted({grid_entry(site, w).keep / site.full for w in WINDOWS} - {1.0}))
        return OFFERED[::-1]

    def schedules(self, goal: float) -> dict[str, dict[str, SitePlan]]:
        """Schedules by rule whose shares add up to at most the goal: for the grid windows from the last block back
        (first pairs, then squares); else tokens that fall in a straight line from all in the first block, and the same
        share in every block.
        """
        if self.how == "grid":
            return {"linear": self._windows_from_the_end(goal)}
        return {"linear": self._counts(self._line(goal), goal), "even": self._counts([1.0] * len(self.sites), goal)}

    def _windows_from_the_end(self, goal: float) -> dict[str, SitePlan]:
        found: dict[str, SitePlan] = {}
        for window in ((1, 2), (2, 2)):
            for site in reversed(self.sites):
                if self._sum(found) <= goal + 1e-9:
                    return found
                found[site.name] = grid_entry(site, window, residual=self.residual)
        return found

    def _line(self, goal: float) -> list[float]:
        """Shares on a straight line from 1 that add up to the goal, none under the fewest offered."""
        count, low, high = len(self.sites), 0.0, 4.0
        if count == 1:
            return [goal]

        def shares(step: float) -> list[float]:
            return [max(1 - step * i / (count - 1), min(self.shares(s))) for i, s in enumerate(self.sites)]

        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(shares(middle)) > goal else (low, middle)
        return shares(high)

    def _counts(self, shares: Sequence[float], goal: float) -> dict[str, SitePlan]:
        """Tokens of each block about in these proportions, single tokens taken from the fullest blocks until the goal
        is met.
        """
        tokens = [round(share * site.full) for share, site in zip(shares, self.sites, strict=True)]
        while sum(t / site.full for t, site in zip(tokens, self.sites, strict=True)) > goal + 1e-9:
            excess = [t / site.full - share for t, site, share in zip(tokens, self.sites, shares, strict=True)]
            tokens[max(range(len(tokens)), key=lambda n: (excess[n], n))] -= 1
        pairs = zip(self.sites, tokens, strict=True)
        return {site.name: self._entry(site, max(1, t)) for site, t in pairs if t < site.full}

    def _sum(self, entries: Mapping[str, SitePlan]) -> float:
        return sum(e.keep / e.full for e in entries.values()) + len(self.sites) - len(entries)


def _class_attention(model: nn.Module, sites: Sequence[TokenSite], by: str) -> dict[str, dict[str, Any]]:
    """Where each block's queries and keys come from, for choosing tokens by the class token's attention."""
    if by == "random":
        return {site.name: {"by": "random"} for site in sites}
    if not sites[0].front:
        raise ModelError("the model has no class token whose attention could choose; by='random' needs none")
    products = {s.path: s for s in find_sites(model).values() if isinstance(s, ProductSite) and s.kind == "qk"}
    found = {}
    for site in sites:
        product = next((s for path, s in products.items() if path.startswith(f"{site.path}.")), None)
        if product is None:
            raise ModelError(f"{site.path}: its class attention cannot be read, as it has no plain QK product")
        a = product.attention
        inside = {key: p.path.removeprefix(f"{site.path}.") for key, p in (("query", a.q), ("key", a.k))}
        found[site.name] = {
            "query": [inside["query"], a.q.start, a.q.stop],
            "key": [inside["key"], a.k.start, a.k.stop],
            "heads": a.heads,
            "scale": a.scale,
        }
    return found

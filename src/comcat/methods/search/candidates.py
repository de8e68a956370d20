"""Candidate ranks of a search: which there are, what they cost, where to start, and how to settle on one a site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import BudgetError, SettingsError
from ...factors import Spectrum
from ...sites import HiddenSite, Site, Sites
from ..choose import Table, least_loss
from ..ladders import tail_loss
from .settings import Grid

PAPER = {192: range(32, 161, 32), 384: range(64, 321, 64), 768: range(128, 513, 64)}
"""Candidate ranks in COMCAT's code, summed over the heads of a layer, by the width of the model."""


@dataclass(frozen=True)
class Candidates:
    """The candidate ranks of one site, rising; ``costs`` is C(r) of Eq. 6. The last may be the full rank.

    At the full rank the site stays as it is.
    """

    site: Site
    ranks: tuple[int, ...]
    costs: tuple[float, ...]


def candidates_of(
    sites: Sites,
    cost: Callable[[Site, int | None], float],
    *,
    grid: Grid = "even",
    size: int = 9,
    near: Mapping[str, int] | None = None,
    totals: Sequence[int] = (),
    multiple: int = 1,
) -> dict[str, Candidates]:
    """The candidates of every site.

    Args:
        cost: of a site at a rank, or as it is (None).
        grid: ``"near"``: ``size`` ranks in equal ratios from a quarter of the rank in ``near`` to four times it, and
            the site as it is; ``"even"``: in equal steps up to the largest that saves, and the site as it is;
            ``"paper"``: the sets of COMCAT's code, by the width of the site: rounded down per head, and at low rank
            even where that costs more than the site does.
        totals: instead, ranks summed over the heads of a layer, as the paper states them and rounded down as its code
            does; one beyond the full rank is the site as it is. multiple: ranks are multiples of it, or the smallest
            there is.
    """
    if size < 1:
        raise SettingsError(f"got a grid of {size} ranks, expected at least 1")
    as_said = bool(totals) or grid == "paper"
    found = {}
    for name, site in sites.items():
        dense = cost(site, None)
        usable = [r for r in range(1, site.full_rank + 1) if cost(site, r) < dense or (as_said and r < site.full_rank)]
        most = usable[-1] if usable else 0
        if as_said:
            wanted: list[float] = [max(1, total // getattr(site, "heads", 1)) for total in totals or _paper(site)]
        elif grid == "near":
            assert near is not None
            centre = min(near.get(name, most), most)
            wanted = [centre * 4 ** (2 * i / max(size - 1, 1) - 1) for i in range(size)]
        else:
            wanted = [most * (i + 1) / size for i in range(size)]
        allowed = [r for r in usable if r % multiple == 0] or usable[:1]
        ranks = sorted({_nearest(allowed, rank) for rank in wanted if rank <= most})
        costs = [cost(site, r) for r in ranks]
        whole = not as_said or max(wanted) > most
        if whole and site.full_rank not in ranks:
            ranks, costs = [*ranks, site.full_rank], [*costs, min(dense, cost(site, site.full_rank))]
        found[name] = Candidates(site, tuple(ranks), tuple(costs))
    return found


def _paper(site: Site) -> Sequence[int]:
    if isinstance(site, HiddenSite):  # the paper knows ranks alone
        return [math.ceil(site.full * share / 6) for share in range(1, 6)]
    width = min(site.in_features, site.out_features) if site.kind == "linear" else site.heads * site.full_rank
    return PAPER.get(width) or [math.ceil(width * share / 6) for share in range(1, 6)]


def _nearest(ranks: Sequence[int], wanted: float) -> int:
    return min(ranks, key=lambda r: (abs(r - wanted), r))


def predicted_losses(
    candidates: Mapping[str, Candidates], found: Mapping[str, Spectrum], relative: bool
) -> dict[str, tuple[float, ...]]:
    """What every candidate is predicted to lose: ``½ Σ_{i ≥ r} σ_i²``."""
    losses = {}
    for name, c in candidates.items():
        tail = tail_loss(found[name], relative=relative)
        losses[name] = tuple(float(tail[r]) for r in c.ranks)
    return losses


def settle(
    candidates: Mapping[str, Candidates], losses: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """One candidate a site, by position: of the choices that a price can reach, the one that loses least.

    Where the best choices together cost less than the budget, what is left goes where it hurts least.

    Raises:
        BudgetError: if the cheapest candidates cost more than the budget.
    """
    least = sum(min(c.costs) for c in candidates.values())
    if least > budget * (1 + 1e-12):
        raise BudgetError(
            f"the smallest candidates together cost {least:,.0f}, the budget leaves {budget:,.0f} for them"
        )
    tables = [
        Table(np.array(c.costs, dtype=float), np.array(losses[n], dtype=float), np.ones(len(c.costs)), max(c.costs))
        for n, c in candidates.items()
    ]
    return dict(zip(candidates, least_loss(tables, budget, spend=True), strict=True))


def start_near(position: int, count: int, sharpness: float = 1.0) -> Tensor:
    """α that prefers one of ``count`` candidates and, the nearer the more, its neighbours: (count,)."""
    return -sharpness * (torch.arange(count) - position).abs().float()

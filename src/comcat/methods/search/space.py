"""What a search chooses from: candidates for every site, what they cost, and the plan that a choice makes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import BudgetError
from ...plan import SitePlan
from ...sites import Site, Sites
from ..allocate import allocate
from ..ladders import entry_of, searchable
from ..prepare import Prepared
from .candidates import Candidates, candidates_of, predicted_losses, settle
from .settings import Grid, SearchSettings

Choice = Mapping[str, int]
"""A candidate for every site, by its position."""

EVEN_SIZES = (*range(2, 32), *range(32, 129, 4), *range(144, 513, 16))
"""Numbers of even steps to propose where the candidates asked for are too large, from few to many."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The candidates of every site, and what they may cost together.

    Attributes:
        sites: those that are searched; of a feed-forward its hidden units, or its layers where these have ranks alone.
        losses: what every candidate is predicted to lose. dense: what every site costs as it is.
        fixed: what all that is no site costs. total: what the whole model costs. goal: what it may cost in the end.
    """

    sites: Sites
    candidates: Mapping[str, Candidates]
    losses: Mapping[str, tuple[float, ...]]
    dense: Mapping[str, float]
    fixed: float
    total: float
    goal: float

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The candidate ranks of every site, rising."""
        return {name: c.ranks for name, c in self.candidates.items()}

    def ranks_of(self, choice: Choice) -> dict[str, int]:
        """The ranks that a choice stands for."""
        return {name: c.ranks[choice[name]] for name, c in self.candidates.items()}

    def cost(self, choice: Choice) -> float:
        """What the whole model costs by a choice."""
        return self.fixed + sum(c.costs[choice[name]] for name, c in self.candidates.items())

    def expected_cost(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """``Σ_sites Σ_a p_a C(r_a)`` and what does not change, (): Eq. 6. ``probabilities``: (candidates,) a site."""
        device = next(iter(probabilities.values())).device
        total = torch.tensor(float(self.fixed), device=device)
        for name, p in probabilities.items():
            total = total + p @ torch.tensor(self.candidates[name].costs, dtype=torch.float32, device=device)
        return total

    def best(self, losses: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """The choice that loses least within the goal. ``losses``: of every candidate."""
        return settle(self.candidates, losses, self.goal - self.fixed)

    def entries(self, choice: Choice) -> dict[str, SitePlan]:
        """What a plan says of a choice; sites that stay as they are, are not named."""
        return {
            name: entry_of(c.site, c.ranks[choice[name]])
            for name, c in self.candidates.items()
            if c.ranks[choice[name]] < c.site.full_rank or c.costs[choice[name]] < self.dense[name]
        }

    def predicted_loss(self, choice: Choice) -> float:
        """What a choice is predicted to lose, in nats a picture where the statistic is that of the loss."""
        return sum(self.losses[name][i] for name, i in choice.items())


def space_of(model: nn.Module, prepared: Prepared, settings: SearchSettings) -> Space:
    """The candidates of a model's sites by the settings. Raises BudgetError if even the smallest cost too much."""

    sites = searchable(prepared.sites)

    def cost(site: Site, size: int | None) -> float:
        return prepared.cost(site, None if size is None else entry_of(site, size))

    near = (
        _closed_form(model, prepared, sites, settings) if settings.grid == "near" and not settings.candidates else None
    )

    def made(grid: Grid, size: int, totals: tuple[int, ...] = ()) -> dict[str, Candidates]:
        return candidates_of(
            sites, cost, grid=grid, size=size, near=near, totals=totals, multiple=settings.multiple
        )  # fmt: skip

    candidates = made(settings.grid, settings.grid_size, settings.candidates)
    dense = {name: cost(site, None) for name, site in sites.items()}
    fixed, goal = prepared.total - sum(dense.values()), (1 - settings.reduce) * prepared.total
    least = fixed + _least(candidates)
    if least > goal:
        steps = bisect_left(EVEN_SIZES, True, key=lambda n: fixed + _least(made("even", n)) <= goal)
        enough = EVEN_SIZES[steps] if steps < len(EVEN_SIZES) else None
        raise BudgetError(_too_large(settings, 1 - least / prepared.total, enough))
    return Space(
        sites=sites,
        candidates=candidates,
        losses=predicted_losses(candidates, prepared.factorizations, relative=settings.statistic != "loss"),
        dense=dense,
        fixed=fixed,
        total=prepared.total,
        goal=goal,
    )


def _least(candidates: Mapping[str, Candidates]) -> float:
    return sum(min(c.costs) for c in candidates.values())


def _too_large(settings: SearchSettings, saved: float, enough: int | None) -> str:
    """Why no choice fits the budget, and which setting makes it possible.

    Args:
        saved: by the smallest candidates. enough: how many even steps save what was asked for, if any number does.
    """
    said = (
        f"got reduce={settings.reduce:g}, but the smallest candidates save at most {saved:.4g} "
        f"of the model's {settings.budget}"
    )
    if enough is not None:
        without = " without candidates" if settings.candidates else ""
        return f"{said}; expected smaller ones, as grid='even' with grid_size={enough} has{without}"
    if settings.multiple > 1:
        return f"{said}; expected a smaller multiple than {settings.multiple}, or less to save"
    return f"{said}, and no grid has smaller ones that save enough; expected less to save"


def _closed_form(model: nn.Module, prepared: Prepared, sites: Sites, settings: SearchSettings) -> dict[str, int]:
    """The sizes of the water-filled plan; sites that it leaves as they are, are not named."""
    plan = allocate(
        model, prepared.statistic, reduce=settings.reduce, budget=settings.budget, forms=settings.forms, sites=sites,
        factorizations=prepared.factorizations, multiple=settings.multiple, total=prepared.total, cost=prepared.cost,
        made_for=prepared.made_for, tie=False,
    )  # fmt: skip
    return {name: entry.keep for name, entry in plan.sites.items()}

"""Two budgets at once: a share of MACs or time to save, and a number of parameters that may stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import nn

from ...errors import BudgetError
from ...measure import count_parameters
from ...plan import Plan
from ..costs import Cost, Mixed, Parameters
from ..prepare import Prepared
from .savings import saved_share

PRICES = tuple(np.linspace(0.0, 1.0, 9))
STEPS = 12


class PlanAt(Protocol):
    """The plan that saves a share of a cost."""

    def __call__(self, reduce: float | None, *, cost: Cost, total: float) -> Plan: ...


def within_both(model: nn.Module, prepared: Prepared, most: int, reduce: float, plan_at: PlanAt) -> Plan:
    """The plan of least predicted loss that saves a share of the cost and has at most so many parameters.

    At a given price of one cost in terms of the other there is one budget, whose smallest saving that meets both is
    found by halving; the best of several prices is taken.

    Raises:
        BudgetError: where one of the two, or both together, are out of reach.
    """
    whole = float(count_parameters(model))
    fewer = max(0.0, 1 - most / whole)
    first = plan_at(reduce, cost=prepared.cost, total=prepared.total)
    if saved_share(first.sites, prepared, Parameters(), whole) >= fewer - 1e-9:
        return _noted(first, prepared, whole, most)
    try:
        plan_at(fewer, cost=Parameters(), total=whole)
    except BudgetError as error:
        told = f"got max_parameters={most}, which is to save {fewer:.4f} of the model's {whole:.0f} parameters: {error}"
        raise BudgetError(told) from None
    best: Plan | None = None
    for price in PRICES:
        mixed = Mixed((((1 - price) / prepared.total, prepared.cost), (price / whole, Parameters())))
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            try:
                plan = plan_at(middle, cost=mixed, total=1.0)
            except BudgetError:
                high = middle
                continue
            if not _meets(plan, prepared, whole, reduce, fewer):
                low = middle
                continue
            high = middle
            if best is None or plan.made_by["error"] < best.made_by["error"]:
                best = plan
    if best is None:
        raise BudgetError(
            f"no plan saves {reduce:g} of the cost and has at most {most} parameters; each alone can be met"
        )
    return _noted(best, prepared, whole, most)


def _meets(plan: Plan, prepared: Prepared, whole: float, reduce: float, fewer: float) -> bool:
    cost = saved_share(plan.sites, prepared, prepared.cost, prepared.total)
    return cost >= reduce - 1e-9 and saved_share(plan.sites, prepared, Parameters(), whole) >= fewer - 1e-9


def _noted(plan: Plan, prepared: Prepared, whole: float, most: int) -> Plan:
    """What it saves, told in the cost that was asked for."""
    saved = saved_share(plan.sites, prepared, prepared.cost, prepared.total)
    left = whole * (1 - saved_share(plan.sites, prepared, Parameters(), whole))
    return replace(plan, made_by={**plan.made_by, "saved": saved, "max_parameters": most, "parameters": round(left)})

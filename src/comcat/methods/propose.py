"""From what was prepared to a plan: for a budget, or for a drop that may be lost."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from ..errors import SettingsError
from ..plan import Plan
from .allocate import allocate, roundest
from .budgets.both import within_both
from .budgets.pacing import within_time
from .costs import Cost
from .drop import largest_within
from .prepare import Prepared
from .settings import CompressSettings

OVERSHOOT = 0.02
"""From so much more than was asked for on, a share of the model, it is said."""


def propose(
    model: nn.Module,
    prepared: Prepared,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    notes: list[str] | None = None,
    corrects: bool = True,
) -> Plan:
    """What sites become within the budget; with ``max_drop``, the largest saving whose measured drop on held-out
    pictures stays within it.

    ``corrects``: under a budget of time, measure the whole plan and correct it.
    """

    def plan_with(reduce: float | None, multiple: int) -> Plan:
        if settings.max_parameters is not None and reduce is not None:
            return within_both(model, prepared, settings.max_parameters, reduce, partial(plan_at, multiple=multiple))
        return plan_at(reduce, multiple=multiple)

    def plan_at(
        reduce: float | None, *, multiple: int, cost: Cost = prepared.cost, total: float = prepared.total
    ) -> Plan:
        return allocate(
            model,
            prepared.statistic,
            reduce=reduce,
            rule=settings.ranks,  # type: ignore[arg-type]  # a search never comes here
            budget=settings.budget,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            forms=settings.forms,
            multiple=multiple,
            energy=settings.energy,
            tie=settings.tie,
            per_head=settings.per_head,
            total=total,
            cost=cost,
            made_for=prepared.made_for,
            tokens=prepared.tokens,
        )

    def plan_for(reduce: float | None) -> Plan:
        if settings.multiple is not None:
            return plan_with(reduce, settings.multiple)
        return roundest(partial(plan_with, reduce))

    if settings.budget == "latency" and settings.max_drop is None and corrects:
        return within_time(model, prepared, settings, plan_for)
    if settings.max_drop is None:
        plan = plan_for(settings.reduce)
        if notes is not None:
            notes += _overshoot(plan, settings)
        return plan
    if held_out is None:
        raise SettingsError(
            "max_drop needs held_out: pictures to measure the drop on, from the training data and apart from "
            "the calibration's"
        )
    return largest_within(model, prepared, settings, plan_for, held_out, [] if notes is None else notes)


def _overshoot(plan: Plan, settings: CompressSettings) -> list[str]:
    """That a plan saves clearly more than it was asked to, and what comes nearer."""
    asked, saved = settings.reduce, plan.made_by["saved"]
    if asked is None or saved - asked < OVERSHOOT:
        return []
    most, left = settings.max_parameters, plan.made_by.get("parameters", 0)
    told = f"Asked to save {100 * asked:.3g} %, the plan saves {100 * saved:.1f} %"
    if most is not None and left > (1 - OVERSHOOT) * most:
        return [f"{told}, since at most {most:,} parameters may stay."]
    ways = [*(["multiple=1"] if plan.made_by["multiple"] != 1 else []), "ranks='waterfill'"]
    how = "" if settings.ranks == "waterfill" else f" with ranks {settings.ranks!r}"
    nearer = f"; {' or '.join(ways)} comes nearer" if how or len(ways) > 1 else ""
    return [f"{told}: its steps are coarse{how}{nearer}."]

"""How far a model can shrink until it loses too much, measured on held-out pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from ..apply import apply_
from ..errors import BudgetError, DataError, counted
from ..measure import evaluate
from ..plan import Plan
from .prepare import Prepared, kept
from .settings import CompressSettings


def largest_within(
    model: nn.Module,
    prepared: Prepared,
    settings: CompressSettings,
    plan_for: Callable[[float | None], Plan],
    held_out: Iterable,
    notes: list[str],
) -> Plan:
    """Bisect the saving to a hundredth; the measured drop is what decides, the prediction only orders ranks within a
    saving.
    """
    assert settings.max_drop is not None
    held_out, reference = kept(held_out), copy.deepcopy(model)
    dense = evaluate(model, held_out)

    def drop(plan: Plan) -> float:
        handle = apply_(
            model,
            plan,
            prepared.statistic,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            joint_refit=settings.joint_refit,
        )
        try:
            measured = evaluate(model, held_out, against=None if dense.top1 is not None else reference)
        finally:
            handle.revert()
        if dense.top1 is not None and measured.top1 is not None:
            return dense.top1 - measured.top1
        if measured.agreement is not None:
            return 100.0 - measured.agreement
        if measured.cosine is not None:
            return 100.0 * (1 - measured.cosine)
        raise DataError(
            "max_drop needs classes or an output that has a direction; this model gives one number a picture; "
            "say reduce instead"
        )

    best: Plan | None = None
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        try:
            plan = plan_for(middle)
        except BudgetError:
            high = middle
            continue
        if drop(plan) <= settings.max_drop:
            best, low = plan, middle
        else:
            high = middle
    if best is None:
        raise BudgetError(
            f"got max_drop={settings.max_drop:g}, but saving as little as 1 % already loses more on the "
            "held-out pictures"
        )
    what = "top-1" if dense.top1 is not None else "agreement"
    notes.append(
        f"max_drop was measured as {what} on {counted(dense.count, 'held-out picture')} that neither calibration nor "
        "evaluation saw"
    )
    return replace(best, made_by={**best.made_by, "max_drop": settings.max_drop, "held_out": dense.count})

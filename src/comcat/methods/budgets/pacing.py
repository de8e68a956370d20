"""A plan under a budget of time: chosen by what parts were measured to take, then measured whole and corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...apply import apply_
from ...errors import BudgetError
from ...measure import benchmark
from ...measure.latency import Latency
from ...plan import Plan
from ..prepare import Prepared
from ..settings import CompressSettings

ROUNDS, TOLERATED = 4, 0.02
"""How often a plan is corrected, and by how much more than its target it may take."""


def within_time(
    model: nn.Module, prepared: Prepared, settings: CompressSettings, plan_for: Callable[[float | None], Plan]
) -> Plan:
    """The plan of least predicted loss that measures within the target.

    Parts that are timed alone do not add up to the whole exactly. So the whole plan is measured beside the model as it
    stands, in one interleaved run, and what is missing is asked for in addition, a few times.

    Returns:
        The plan; ``made_by["latency"]`` says milliseconds of the model as it stands, the target, what was predicted and
        measured, and on what.

    Raises:
        BudgetError: where no plan is predicted to reach the target; the message says the fastest.
    """
    latency = prepared.cost
    if not isinstance(latency, Latency) or prepared.example is None:
        raise TypeError("a plan under a budget of time needs prepared.cost to be a Latency, and an example")
    whole = latency.whole
    share = settings.reduce if settings.reduce is not None else 1 - (settings.target_ms or whole) / whole
    target = (1 - share) * whole
    if share <= 0:
        return _noted(Plan(sites={}, made_for=prepared.made_for), latency, target, whole, whole)
    asked, best = share, None
    for _ in range(ROUNDS):
        try:
            plan = plan_for(asked)
        except BudgetError as error:
            if best is not None:
                break
            if settings.target_ms is None:
                raise
            raise BudgetError(
                f"got target_ms={settings.target_ms:g}; the model takes {whole:.3g} ms, and {error}"
            ) from None
        ratio, before = measured_ratio(model, plan, prepared, settings)
        took = ratio * whole
        noted = _noted(plan, latency, target, before, took)
        met = took <= target * (1 + TOLERATED)
        if best is None or _better(noted, best, target):
            best = noted
        if met and took >= target * (1 - 2 * TOLERATED):
            break
        asked = min(0.999, max(1e-3, asked + (took - target) / whole))
    assert best is not None
    return best


def _better(ours: Plan, theirs: Plan, target: float) -> bool:
    """Within the target before not; then by what is predicted to be lost, or by how far it is missed."""
    (a, b), limit = (p.made_by["latency"]["measured_ms"] for p in (ours, theirs)), target * (1 + TOLERATED)
    if (a <= limit) != (b <= limit):
        return a <= limit
    return ours.made_by["error"] < theirs.made_by["error"] if a <= limit else a < b


def measured_ratio(model: nn.Module, plan: Plan, prepared: Prepared, settings: CompressSettings) -> tuple[float, float]:
    """Time of a plan as a share of the model's as it stands, and that in milliseconds; one interleaved run."""
    import copy

    small = copy.deepcopy(model)
    apply_(small, plan, sites=prepared.sites, weights=False)
    p = next(model.parameters())
    with torch.no_grad():
        for parameter in small.parameters():  # what was never filled may hold numbers that are slow to reckon with
            parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch, *prepared.example.shape[1:], generator=generator).to(p)  # type: ignore[union-attr]
    found = benchmark(
        {"before": model, "after": small}, images, repeats=5 if settings.quick else 11,
        min_seconds=0.5 if settings.quick else 1.5, compile=settings.compiled,
    )  # fmt: skip
    return found["after"].median_s / found["before"].median_s, 1e3 * found["before"].median_s


def predicted_ms(plan: Plan, prepared: Prepared) -> float | None:
    """What a plan is predicted to take, in milliseconds a batch."""
    saved = plan.made_by.get("saved")
    return None if saved is None else (1 - saved) * prepared.total


def _noted(plan: Plan, latency: Latency, target: float, before: float, took: float) -> Plan:
    facts: dict[str, Any] = {
        "target_ms": target, "dense_ms": before, "measured_ms": took,
        "predicted_ms": (1 - plan.made_by.get("saved", 0.0)) * latency.whole, **latency.facts,
    }  # fmt: skip
    return replace(plan, made_by={"error": 0.0, **plan.made_by, "latency": facts})

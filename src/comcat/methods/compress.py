"""The whole way from a model and some pictures to a smaller model: calibrate, propose a plan, apply it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..apply import Handle, apply_
from ..errors import BudgetError, ModelError, NumericsError, SettingsError
from ..grad_mode import outside_inference_mode
from ..hosts.ordinary import check_ordinary
from ..plan import Plan
from ..record import Record
from ..runs.watching import first_unsound
from ..settings import from_keywords
from .allocate import allocate, check_asked
from .drop import largest_within
from .prepare import Prepared, kept, prepare
from .sequential import apply_sequentially
from .settings import CompressSettings

MULTIPLES = (16, 8, 4, 2)
TOLERATED, NEGLIGIBLE = 1.1, 1e-3
"""How much more predicted loss rounder ranks may cost: a tenth, or a thousandth of a nat, which no measurement would
show.
"""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What :func:`compress_` did: the handle to take it back, and what it was based on."""

    handle: Handle
    plan: Plan
    prepared: Prepared
    notes: tuple[str, ...] = field(default=())


@outside_inference_mode
def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    held_out: Iterable | None = None,
    plan: Plan | None = None,
    progress: bool = False,
    **settings: Any,
) -> nn.Module:
    """A smaller copy of a model; the model itself is untouched.

    Args:
        calibration: batches of pictures (batch, channels, height, width), with or without labels, which are ignored.
            Not needed with ``statistic="weights"`` and a parameter budget.
        held_out: batches to measure the drop on, with ``max_drop``: training pictures that the calibration did not see,
            never the evaluation set.
        plan: ranks to use instead of choosing them, for example what :func:`comcat.search` found.
        settings: fields of :class:`CompressSettings`; without a plan at least ``reduce`` or ``max_drop``.

    Returns:
        An ordinary module with ``comcat_record``, ready for :func:`comcat.save`.
    """
    chosen = from_keywords(CompressSettings, settings)
    check_ordinary(model)
    small = copy.deepcopy(model)
    compress_(small, calibration, chosen, held_out=held_out, plan=plan, progress=progress)
    return small


@outside_inference_mode
def compress_(
    model: nn.Module,
    calibration: Iterable | None,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    plan: Plan | None = None,
    progress: bool = False,
) -> Compressed:
    """Compress a model in place; see :func:`compress`.

    With a ``plan``, ranks are the plan's and only weights are computed.
    """
    if plan is None and settings.reduce is None and settings.max_drop is None and settings.ranks != "energy":
        raise SettingsError(
            "say how far to go: reduce=0.5 (share to save), max_drop=1.0 (points that may be lost) or a plan"
        )
    if plan is None and settings.ranks == "search":
        raise SettingsError(
            "ranks='search' needs training pictures: plan = comcat.search(model, pictures, …), "
            "then compress with that plan"
        )
    check_asked(settings.reduce if plan is None else None, settings.multiple)
    check_ordinary(model)
    record = getattr(model, "comcat_record", None)
    if record is not None and record.plan.sites:
        raise ModelError("the model is compressed already, and its factors are no sites; begin from the original")
    if (unsound := first_unsound(model.named_parameters())) is not None:
        raise NumericsError(f"{unsound} holds NaN or infinite values")
    calibration = None if calibration is None else kept(calibration)
    before = origin_or_none(model)
    prepared = prepare(model, calibration, settings, plan=plan, progress=progress)
    notes: list[str] = []
    if plan is None:
        plan = propose(model, prepared, settings, held_out=held_out, notes=notes)
    if settings.sequential:
        handle = apply_sequentially(model, plan, prepared, calibration, settings, progress)
    else:
        handle = apply_(
            model,
            plan,
            prepared.statistic,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            joint_refit=settings.joint_refit,
        )
    record = Record(plan=plan, settings=asdict(settings), **before)
    model.comcat_record = record  # type: ignore[assignment]
    return Compressed(handle=handle, plan=plan, prepared=prepared, notes=(*notes, *handle.notes))


def propose(
    model: nn.Module,
    prepared: Prepared,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    notes: list[str] | None = None,
) -> Plan:
    """Ranks for the budget; with ``max_drop``, the largest saving whose measured drop on held-out pictures stays
    within it.
    """

    def plan_with(reduce: float | None, multiple: int) -> Plan:
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
            tie=settings.budget == "macs" if settings.tie is None else settings.tie,
            per_head=settings.per_head,
            total=prepared.total,
            cost=prepared.cost,
            made_for=prepared.made_for,
        )

    def plan_for(reduce: float | None) -> Plan:
        if settings.multiple is not None:
            return plan_with(reduce, settings.multiple)
        finest = plan_with(reduce, 1)  # raises where even this cannot meet the budget
        for multiple in MULTIPLES:
            with suppress(BudgetError):
                plan = plan_with(reduce, multiple)
                if plan.made_by["error"] <= TOLERATED * finest.made_by["error"] + NEGLIGIBLE:
                    return plan
        return finest

    if settings.max_drop is None:
        return plan_for(settings.reduce)
    if held_out is None:
        raise SettingsError(
            "max_drop needs held_out: pictures to measure the drop on, from the training data and apart from "
            "the calibration's"
        )
    return largest_within(model, prepared, settings, plan_for, held_out, [] if notes is None else notes)


def origin_or_none(model: nn.Module) -> dict[str, Any]:
    """Where a model comes from and how pictures are prepared for it, as far as it can be told."""
    from ..models import class_names_of, origin_of, preprocess_of

    try:
        origin = origin_of(model)
    except ModelError:
        return {}
    names = class_names_of(model)
    try:
        preprocess = preprocess_of(model).to_dict()
    except ModelError:
        preprocess = None
    return {"origin": origin.to_dict(), "preprocess": preprocess, "class_names": names}

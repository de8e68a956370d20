"""The whole way from a model and some pictures to a smaller model: calibrate, propose a plan, apply it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ..apply import Handle, apply_
from ..errors import ModelError, SettingsError
from ..factors import WEAK
from ..grad_mode import outside_inference_mode
from ..hosts.ordinary import check_ordinary
from ..plan import Plan
from ..record import Record, Results
from ..settings import from_keywords
from ..sites import Sites
from ..wrappers import bare
from .prepare import Prepared, kept, prepare, said_of_unreached
from .propose import propose
from .request import check_request
from .sequential import apply_sequentially
from .settings import CompressSettings


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
        plan: ranks to use instead of choosing them, for example what :func:`comcat.search` found. Of a model that is
            compressed already, what :func:`comcat.merge` proposes and nothing else: its ranks and units stay.
        settings: fields of :class:`CompressSettings`; without a plan at least ``reduce`` or ``max_drop``.

    Of a model in ``torch.compile`` or data parallelism the model inside is made smaller.

    Returns:
        An ordinary module with ``comcat_record``, ready for :func:`comcat.save`.
    """
    chosen = from_keywords(CompressSettings, settings)
    model = bare(model)
    check_ordinary(model)
    small = copy.deepcopy(model)
    done = compress_(small, calibration, chosen, held_out=held_out, plan=plan, progress=progress)
    for note in _unreached(done.prepared):
        warnings.warn(note, stacklevel=2)
    return small


@outside_inference_mode
def compress_(
    model: nn.Module,
    calibration: Iterable | None,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    plan: Plan | None = None,
    whole: Sites | None = None,
    progress: bool = False,
) -> Compressed:
    """Compress a model in place; see :func:`compress`.

    With a ``plan``, ranks are the plan's and only weights are computed. ``whole``: all sites of the model, where they
    are known.
    """
    if plan is None and settings.ranks == "search":
        raise SettingsError(
            "ranks='search' needs training pictures: plan = comcat.search(model, pictures, …), "
            "then compress with that plan"
        )
    model = bare(model)
    check_request(model, settings, plan)
    calibration = None if calibration is None else kept(calibration)
    before, earlier = origin_or_none(model), getattr(model, "comcat_record", None)
    prepared = prepare(model, calibration, settings, plan=plan, whole=whole, progress=progress)
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
    if earlier is not None and earlier.plan.sites:
        record = _added(earlier, plan)
    model.comcat_record = record  # type: ignore[assignment]
    said = (*notes, *_weak(prepared), *_unreached(prepared), *handle.notes)
    return Compressed(handle=handle, plan=plan, prepared=prepared, notes=said)


def _added(earlier: Record, merges: Plan) -> Record:
    """The record of a compressed model whose tokens are merged as well: one plan that says everything.

    ``made_by`` of the plan stays that of the compression, with that of the merges under ``merge``; what was measured of
    the model before the merges stays under ``earlier`` in the results.
    """
    made_by = {**earlier.plan.made_by, "merge": dict(merges.made_by)}
    plan = replace(earlier.plan, sites={**earlier.plan.sites, **merges.sites}, made_by=made_by)
    measured = earlier.results.to_dict()
    return replace(earlier, plan=plan, results=Results(others={"earlier": measured} if measured else {}))


def _weak(prepared: Prepared) -> list[str]:
    by_weights = prepared.statistic.name == "weights" and len(prepared.sites)
    return [f"What would be lost was measured {WEAK}"] if by_weights else []


def _unreached(prepared: Prepared) -> list[str]:
    names = getattr(prepared.statistic, "unreached", ())
    return [f"{said_of_unreached(names)}: they stay as they are."] if names else []


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

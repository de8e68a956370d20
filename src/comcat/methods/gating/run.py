"""From a model and training pictures to a pruned and trained one, on the loop of :mod:`comcat.runs.loop`."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...apply import Handle, apply_
from ...data import Pictures, batches
from ...data import Preprocess as Preprocessing
from ...errors import SettingsError, counted
from ...factors import Weights
from ...forms.gates import fold_, gate_
from ...hosts import find_sites
from ...plan import Plan
from ...record import Record
from ...runs.checkpoints import Checkpoints
from ...runs.loop import carry_out, find_checkpoint
from ...runs.processes import Processes
from ...runs.state import whole_state
from ...settings import from_keywords
from ...tuning.data import open_labelled
from ...tuning.leaks import check_apart, check_sources
from ...tuning.setup import CHECKPOINTS, Setup, set_up
from ...tuning.tune import name_of_teacher
from ...wrappers import bare
from ..compress import Compressed, origin_or_none
from ..prepare import Prepared
from ..request import check_request
from .ground import ClosedForm, Ground, begin_closed, survey
from .settings import PruneSettings
from .training import GatedTraining


def prune(
    model: nn.Module,
    data: Pictures | str | os.PathLike[str],
    *,
    teacher: nn.Module | None = None,
    evaluation: Pictures | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    preprocess: Preprocessing | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> nn.Module:
    """A smaller copy of a model, its channels pruned while it is trained; the model itself is untouched.

    Our reconstruction of CAIT's consistent dynamic channel pruning (:mod:`comcat.methods.gating`). Like
    :func:`comcat.tune` it spreads over processes, and with ``out`` it can be killed at any moment: the same call goes
    on from the last checkpoint in ``OUT/checkpoints``.

    Args:
        data: training pictures. Labels are used where there are any; without them all is learned from the teacher.
        teacher: what to distil; by default the model itself as it is. evaluation: labelled pictures to follow the top-1
            on; nothing is chosen by them.
        out: folder for the checkpoints and ``log.jsonl``. preprocess: of models that do not say how they want their
            pictures. restart: forget the checkpoints in ``out`` and begin anew.
        settings: fields of :class:`PruneSettings`: ``reduce=0.5``, ``epochs=3``, and all that :func:`comcat.tune`
            takes.

    Returns:
        An ordinary module with ``comcat_record``, ready for :func:`comcat.save`. ``made_by["gates"]`` of its plan tells
        every choice of marks.

    Raises:
        BudgetError: for a saving that is out of reach. ModelError: where nothing can be pruned.
        And what :func:`comcat.tune` raises.
    """
    chosen, model = from_keywords(PruneSettings, settings), bare(model)
    if evaluation is not None:
        check_sources(data, evaluation)
        data, evaluation = open_labelled(model, data), open_labelled(model, evaluation)
        processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
        with processes.together():
            if processes.main:
                check_apart(data, evaluation)
    done = prune_(
        model, data, chosen, teacher=teacher, evaluation=evaluation, out=out, preprocess=preprocess, restart=restart,
        progress=progress,
    )  # fmt: skip
    return done.model


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The small model that :func:`prune_` made, and what :class:`~comcat.methods.compress.Compressed` says of it."""

    model: nn.Module
    done: Compressed


def prune_(
    model: nn.Module,
    data: Pictures | str | os.PathLike[str],
    settings: PruneSettings,
    *,
    teacher: nn.Module | None = None,
    evaluation: Pictures | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    preprocess: Preprocessing | None = None,
    restart: bool = False,
    progress: bool = False,
) -> Pruned:
    """:func:`prune` with its settings in one piece."""
    model = bare(model)
    teacher = model if teacher is None else bare(teacher)
    processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
    with processes.together():
        setup, ground = check_pruning(
            model, data, settings, processes, teacher=teacher, evaluation=evaluation, out=out, preprocess=preprocess
        )
    place = setup.place(CHECKPOINTS)
    checkpoints = None if place is None else Checkpoints(place, keep=settings.keep)
    found = find_checkpoint(checkpoints, setup.identity, processes, restart=restart)
    with processes.together():
        closed = None
        setup.model.to(processes.device)
        if found is not None:
            ground = ground.only(found.state.get("gated", ground.sites))
        elif settings.start == "closed":
            closed = _begun(setup, ground, progress=progress and processes.main)
            ground = ground.only(closed.spectra)
        gates = gate_(setup.model, ground.sites, None if closed is None else closed.rests)
    training = GatedTraining(setup, settings, ground, gates, closed)
    if found is None:
        training.journal.begin()
    with training.ready():
        carry_out(
            training, processes, checkpoints=checkpoints, every=(settings.checkpoint_every, setup.data.steps()),
            since=found, progress=progress,
        )  # fmt: skip
    return _cut(model, training, name_of_teacher(teacher))


def check_pruning(
    model: nn.Module,
    data: Pictures | str | os.PathLike[str],
    settings: PruneSettings,
    processes: Processes,
    *,
    teacher: nn.Module,
    evaluation: Pictures | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    preprocess: Preprocessing | None = None,
) -> tuple[Setup, Ground]:
    """What a run works with. Raises, within seconds, what :func:`prune` raises for what does not fit."""
    check_request(model, settings.closed_form())
    setup = set_up(
        model, open_labelled(model, data), settings, teacher=teacher,
        evaluation=None if evaluation is None else open_labelled(model, evaluation),
        folder=None if out is None else Path(out), preprocess=preprocess, processes=processes,
    )  # fmt: skip
    if setup.steps < 2:
        raise SettingsError(
            f"got {counted(setup.steps, 'step')}, expected at least 2: gates need time to close; "
            "comcat.compress cuts without training"
        )
    return setup, survey(model, settings, setup.preprocess.blank(next(model.parameters())))


def _begun(setup: Setup, ground: Ground, *, progress: bool) -> ClosedForm:
    s = ground.settings
    calibration = batches(
        setup.data.pictures.take(s.pictures, s.seed), setup.preprocess, batch_size=min(64, s.batch_size)
    )
    return begin_closed(setup.model, ground, calibration, progress=progress)


def _cut(model: nn.Module, training: GatedTraining, teacher: str | None) -> Pruned:
    """The trained weights in a copy of the model, the gates folded into them, what is marked cut away."""
    sites, marks, s = training.ground.sites, training.marks, training.asked
    small: Any = copy.deepcopy(model)
    small.load_state_dict(whole_state(training.learner.judged))
    fold_(small, sites, training.gates)
    made_by = {**marks.plan.made_by, "rule": "gates", "reduce": s.reduce, "predicted_loss": None}
    made_by["gates"] = {"start": s.start, "choices": training.history}
    plan = Plan(sites=marks.plan.sites, made_by=made_by, made_for=marks.plan.made_for)
    cut = marks.selections(sites)
    applied = apply_(small, plan, Weights(), sites=sites, factorizations=cut)
    handle = Handle(small, plan, [], applied.notes)  # the weights are not those of the model before: no way back
    record = Record(plan=plan, settings=asdict(s), **origin_or_none(model))
    result = {"settings": asdict(s), "teacher": teacher, **training.journal.result()}
    small.comcat_record = replace(record, results=record.results.tuned(result))
    ground = training.ground
    prepared = Prepared(
        sites=sites, whole=find_sites(model), statistic=Weights(), factorizations=cut, total=ground.total,
        made_for=ground.made_for,
        cost=ground.cost, example=training.setup.preprocess.blank(next(model.parameters())),
    )  # fmt: skip
    return Pruned(model=small, done=Compressed(handle=handle, plan=plan, prepared=prepared, notes=handle.notes))

"""Tuning: winning back by training what compression lost (as COMCAT, Xiao et al. 2023, does with DeiT's recipe)."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Pictures, Preprocess
from ..errors import ModelError
from ..models import origin_of
from ..plan import Plan
from ..record import Record
from ..runs.checkpoints import Checkpoints
from ..runs.loop import carry_out, find_checkpoint
from ..runs.processes import Processes
from ..runs.state import whole_state
from ..settings import from_keywords
from ..wrappers import bare
from .data import open_labelled
from .leaks import check_apart, check_sources
from .settings import TuneSettings
from .setup import CHECKPOINTS, Setup, set_up
from .step import Training


def tune(
    student: nn.Module,
    data: Pictures | str | os.PathLike[str],
    *,
    teacher: nn.Module | None = None,
    evaluation: Pictures | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    preprocess: Preprocess | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> nn.Module:
    """Train a model on, in place, and return it. It is changed only at the end: a run that fails leaves it as it was.

    Started by ``torchrun`` or ``accelerate launch``, the run spreads over all processes, and each gets the tuned model.
    The model is tuned where it is: on the CPU, or on the accelerators.

    With ``out``, the run can be killed at any moment: it keeps checkpoints in ``OUT/checkpoints``, and the same call
    goes on from the last one. Everything random in a step is seeded by its number, so the result is bit for bit that of
    a run that was not interrupted (on a CPU, with the same number of processes); no states of random generators need
    saving.

    Args:
        data: training pictures, with labels or, given a teacher, without. teacher: what to distil: the model before
            compression, or another with the same classes and picture size. evaluation: labelled pictures to follow the
            top-1 on; nothing is chosen by them.
        out: folder for the checkpoints and ``log.jsonl``. preprocess: of models that do not say how they want their
            pictures.
        restart: forget the checkpoints in ``out`` and begin anew. settings: fields of :class:`TuneSettings`.

    Returns:
        ``student``, with ``comcat_record.results.tuning``: settings, teacher, curve, seconds, images per second, and
        the evaluations before, after, and at the best of the steps (which is for information: the last weights are what
        counts).

    Raises:
        SettingsError: for settings or a teacher that do not fit. DataError: for labels outside the model's classes, too
            many unreadable pictures, no labels and no teacher, or evaluation pictures that are also trained on.
            NumericsError: for a loss that is not finite or explodes; it names the step, the place and the last good
                checkpoint. StoreError: for checkpoints of another
            run, or where none can be written.
    """
    chosen = from_keywords(TuneSettings, settings)
    bare(student)  # raises for what is no module
    if evaluation is not None:
        check_sources(data, evaluation)
        data, evaluation = open_labelled(student, data), open_labelled(student, evaluation)
        processes = Processes(cpu=next(student.parameters()).device.type == "cpu")
        with processes.together():
            if processes.main:
                check_apart(data, evaluation)
    return tune_(
        student,
        data,
        chosen,
        teacher=teacher,
        evaluation=evaluation,
        out=out,
        preprocess=preprocess,
        restart=restart,
        progress=progress,
    )


def tune_(
    student: nn.Module,
    data: Pictures | str | os.PathLike[str],
    settings: TuneSettings,
    *,
    teacher: nn.Module | None = None,
    evaluation: Pictures | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    preprocess: Preprocess | None = None,
    restart: bool = False,
    progress: bool = False,
) -> nn.Module:
    """:func:`tune` with its settings in one piece."""
    model = bare(student)
    processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
    with processes.together():
        setup = set_up(
            model,
            open_labelled(model, data),
            settings,
            teacher=teacher,
            evaluation=None if evaluation is None else open_labelled(model, evaluation),
            folder=None if out is None else Path(out),
            preprocess=preprocess,
            processes=processes,
        )
    if setup.steps:
        result = _trained(model, setup, restart=restart, progress=progress)
    else:
        result = {"curve": [], "seconds": 0.0, "images_per_second": None}
    _note(model, {"settings": asdict(settings), "teacher": name_of_teacher(teacher), **result})
    return student


def _trained(student: nn.Module, setup: Setup, *, restart: bool, progress: bool) -> dict[str, Any]:
    """Train, give the student the weights, and return what its record says of the run."""
    training, place = Training(setup), setup.place(CHECKPOINTS)
    checkpoints = None if place is None else Checkpoints(place, keep=setup.settings.keep)
    found = find_checkpoint(checkpoints, training.identity, setup.processes, restart=restart)
    if found is None:
        training.journal.begin()
    every = (setup.settings.checkpoint_every, setup.data.steps())
    with training.ready():
        carry_out(training, setup.processes, checkpoints=checkpoints, every=every, since=found, progress=progress)
    student.load_state_dict(whole_state(training.learner.judged))
    return training.journal.result()


def name_of_teacher(model: nn.Module | None) -> str | None:
    """What a person calls a model."""
    if model is None:
        return None
    try:
        origin = origin_of(model)
    except ModelError:
        return type(model).__name__
    return origin.source or origin.name


def _note(student: Any, result: dict[str, Any]) -> None:
    """Write a run's result into the student's record, a new one with an empty plan where it was never compressed."""
    record = getattr(student, "comcat_record", None)
    if record is None:
        try:
            origin = origin_of(student).to_dict()
        except ModelError:
            origin = None  # it can be given when the model is saved
        record = Record(plan=Plan(sites={}), origin=origin)
    student.comcat_record = replace(record, results=record.results.tuned(result))

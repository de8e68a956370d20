"""From a student and training pictures to a tuned model in a folder, with its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Pictures
from ..files import home_path
from ..methods.splits import in_words
from ..models import preprocess_of
from ..report import ReportData
from ..report.collect import collect_tuning
from ..runs.claims import claimed_by_main
from ..runs.processes import Processes
from ..settings import from_keywords
from ..store import save
from ..store.folder import check_replaceable
from ..store.saving import check_savable
from ..tuning.leaks import check_apart, check_sources
from ..tuning.settings import TuneSettings
from ..tuning.setup import CHECKPOINTS
from ..tuning.tune import tune_
from .places import Finished, Source, called, check_out, model_of, opened, said_of_skipped, said_of_tuning


def tune_to(
    out: str | os.PathLike[str],
    student: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    eval_limit: int | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
    name: str | None = None,
    command: str | None = None,
    **settings: Any,
) -> Finished:
    """Train a model on and save it with its report; a given student is tuned in place, as :func:`comcat.tune` does.

    ``out`` holds the checkpoints and the log from the start, so that the same call goes on where it stopped; the place
    is kept from other runs meanwhile.

    Args:
        out: the folder to save to. student, teacher: themselves, or their names for :func:`comcat.load_model`.
        data: training pictures, with labels or, given a teacher, without.
        evaluation: labelled pictures to follow the top-1 on, ``eval_limit`` of them. Nothing is chosen by them.
        overwrite: replace a folder that holds an earlier result. restart: forget the checkpoints.
        name: what the report calls the student. command: to repeat the run with, for the report.
        settings: fields of :class:`~comcat.tuning.settings.TuneSettings`.

    Raises:
        SettingsError, StoreError: for a place that cannot be written to, holds something else, or that another run
            writes to.
        DataError: where training pictures are also in ``evaluation``. And what :func:`comcat.tune` raises.
    """
    out, chosen = home_path(out), from_keywords(TuneSettings, settings)
    name, notes = called(student, name), []
    student = model_of(student)
    teacher = None if teacher is None else model_of(teacher)
    processes = Processes(cpu=next(student.parameters()).device.type == "cpu")
    with claimed_by_main(out, processes):
        with processes.together():
            if processes.main:
                _check_out(out, overwrite)
                check_savable(student)
            check_sources(data, evaluation)
            pictures = opened(data)
            judging = _limited(evaluation, eval_limit, chosen.seed)
            if judging is not None and processes.main:
                notes.append(check_apart(pictures, judging))
        tune_(
            student, pictures, chosen, teacher=teacher, evaluation=judging, out=out, restart=restart, progress=progress
        )
        notes += said_of_skipped(pictures)
        notes += said_of_tuning(student.comcat_record.results.tuning)  # type: ignore[union-attr]
        report = None
        with processes.together():
            if processes.main:
                judged_on = None if judging is None else in_words(judging, judging)
                report = _report(student, name, command, notes, judged_on)
                save(student, out, report=report)
    record: Any = student.comcat_record
    return Finished(model=student, record=record, folder=out, report=report, notes=tuple(notes))


def _check_out(out: Path, overwrite: bool) -> None:
    """Checkpoints to go on from are no hindrance, nor is what lies beside them."""
    if (out / CHECKPOINTS).is_dir():
        check_replaceable(out, overwrite=True)
    else:
        check_out(out, overwrite)


def _limited(source: Source | None, limit: int | None, seed: int) -> Pictures | None:
    if source is None or limit is None:
        return None if source is None else opened(source)
    return opened(source).take(limit, seed)


def _report(student: Any, name: str, command: str | None, notes: list[str], judged_on: str | None) -> ReportData | None:
    """What the report of a tuning shows; None where no step was made."""
    tuning = student.comcat_record.results.tuning
    if not tuning["curve"]:
        return None
    p = preprocess_of(student)
    asked = {"model": name, "teacher": tuning["teacher"], **tuning["settings"]}
    return collect_tuning(
        student, model=name, command=command, judged_on=judged_on,
        settings={k: v for k, v in asked.items() if v is not None},
        example=p.blank(), notes=tuple(notes),
    )  # fmt: skip

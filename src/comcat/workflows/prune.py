"""From a model and training pictures to a pruned model in a folder, with its report."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

from torch import nn

from ..data import batches
from ..files import home_path
from ..measure import evaluate
from ..methods.gating import PruneSettings, prune_
from ..methods.gating.run import Pruned
from ..methods.splits import Division, divide
from ..models import preprocess_of
from ..report import ReportData, wording
from ..report.collect import collect
from ..runs.claims import claimed_by_main
from ..runs.processes import Processes
from ..settings import from_keywords
from ..store import save
from ..store.saving import check_savable
from ..tuning.leaks import check_sources
from .measuring import noted, timings
from .places import Finished, Source, called, check_out, model_of, pictures_for, run_beside, said_of_skipped


def prune_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    eval_limit: int | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    bench: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
    name: str | None = None,
    command: str | None = None,
    **settings: Any,
) -> Finished:
    """Prune a model's channels while it is trained and save it with its report; a given model is untouched.

    Checkpoints lie in ``OUT.run`` beside the folder while the run lasts, so that the same call goes on where it
    stopped; the place is kept from other runs meanwhile.

    Args:
        out: the folder to save to. model, teacher: themselves, or their names for :func:`comcat.load_model`; the
            teacher is by default the model itself.
        data: training pictures, with labels or without. evaluation: labelled pictures to measure on, ``eval_limit`` of
            them. Nothing is chosen by them. Without any, a part of ``data`` is held out.
        bench: time the model before and after. overwrite: replace a folder that holds an earlier result.
        restart: forget the checkpoints. name: what the report calls the model. command: to repeat the run with, for the
            report.
        settings: fields of :class:`~comcat.methods.gating.PruneSettings`: ``reduce=0.5``, ``epochs=3``, …

    Raises:
        SettingsError, StoreError: for a place that cannot be written to, holds something else, or that another run
            writes to.
        DataError: where training pictures are also in ``evaluation``. And what :func:`comcat.prune` raises.
    """
    out, chosen = home_path(out), from_keywords(PruneSettings, settings)
    name, notes = called(model, name), []
    model = model_of(model)
    teacher = None if teacher is None else model_of(teacher)
    processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
    work = run_beside(out)
    with claimed_by_main(out, processes):
        with processes.together():
            if processes.main:
                check_out(out, overwrite)
                check_savable(model)
            check_sources(data, evaluation)
            pictures = pictures_for(model, data, notes)
            judging = None if evaluation is None else pictures_for(model, evaluation, notes)
            division = divide(
                pictures, judging, calibrate=chosen.pictures, seed=chosen.seed, limit=eval_limit, trains=True
            )
        judged = division.judged
        pruned = prune_(
            model, division.training, chosen, teacher=teacher, evaluation=judged if judged.has_labels else None,
            out=work, restart=restart, progress=progress,
        )  # fmt: skip
        notes += [*division.notes, *said_of_skipped(division.training)]
        report = None
        with processes.together():
            if processes.main:
                asked = {"model": name, "data": pictures.name, "evaluation": None if judging is None else judging.name}
                asked |= pruned.model.comcat_record.settings  # type: ignore[union-attr, operator]
                report = _report(model, pruned, division, name, command, asked, bench=bench, progress=progress)
                report = replace(report, notes=(*notes, *report.notes))
                noted(pruned.model, report, division)
                save(pruned.model, out, report=report)
                shutil.rmtree(work, ignore_errors=True)
    record: Any = pruned.model.comcat_record
    return Finished(model=pruned.model, record=record, folder=out, report=report, notes=tuple(notes))


def _report(
    before: nn.Module,
    pruned: Pruned,
    division: Division,
    name: str,
    command: str | None,
    asked: dict[str, Any],
    *,
    bench: bool,
    progress: bool,
) -> ReportData:
    """Measure before and after, and gather what the report shows."""
    size, preprocess, small = min(32, asked["batch_size"]), preprocess_of(before), pruned.model.eval()
    judged = batches(division.judged, preprocess, batch_size=size)
    found = evaluate(before, judged, progress=progress), evaluate(small, judged, against=before, progress=progress)
    timed = timings(before, small, preprocess, size) if bench else None
    return collect(
        before, small, pruned.done, title=f"{wording.short_name(name)}, pruned", model=name, command=command,
        settings={k: v for k, v in asked.items() if v is not None}, judged_on=division.judged_on, evaluations=found,
        timings=timed,
    )  # fmt: skip

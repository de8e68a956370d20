"""From a model and pictures to a smaller model in a folder, with its report."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batches, Pictures, batches
from ..errors import SettingsError
from ..measure import Evaluation, Timing, benchmark, evaluate
from ..methods.compress import Compressed, compress_
from ..methods.search import search_
from ..methods.settings import CompressSettings
from ..methods.splits import Division, divide
from ..models import preprocess_of
from ..plan import Plan
from ..record import Record
from ..report import ReportData
from ..report.collect import collect
from ..runs.claims import claimed
from ..runs.processes import Processes
from ..settings import from_keywords, part_of
from ..store import save
from ..store.saving import check_savable
from ..tuning.leaks import check_sources
from ..tuning.settings import TuneSettings
from ..tuning.setup import set_up
from ..tuning.tune import tune_
from .places import Finished, Source, called, check_out, model_of, pictures_for, said_of_skipped
from .settings import CompressToSettings


def compress_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    progress: bool = False,
    name: str | None = None,
    command: str | None = None,
    **settings: Any,
) -> Finished:
    """Make a model smaller and save it with its report: calibrate, choose, apply, tune if asked to, measure.

    A given model is untouched. What cannot work is refused before the work, as far as it can be known; the place is kept from
    other runs meanwhile, and written to at the end alone. A search and tuning keep checkpoints in ``OUT.run`` beside it, so that
    the same call goes on where it was stopped.

    Args:
        out: the folder to save to. model: itself, or its name for :func:`comcat.load_model`.
        data: pictures to calibrate on, and to search and tune on; labels are not needed.
        evaluation: labelled pictures to measure on. Nothing is chosen by them. Without any, a part of ``data`` is held out.
        plan: what to do instead of choosing it, for example what :func:`comcat.search` found, or its file.
        name: what the report calls the model. command: to repeat the run with, for the report.
        settings: fields of :class:`CompressToSettings`: ``reduce`` or ``max_drop``, and all others of :func:`comcat.compress`.

    Raises:
        SettingsError, StoreError: for a place that cannot be written to, holds something else, or that another run writes to.
        DataError: where pictures to calibrate or train on are also in ``evaluation``.
        And what :func:`comcat.compress`, :func:`comcat.search` and :func:`comcat.tune` raise.
    """
    out, chosen = Path(out).expanduser(), from_keywords(CompressToSettings, settings)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError(
            "compressing works in one process; with several, search first, then compress with its plan, then tune"
        )
    with claimed(out):
        check_out(out, chosen.overwrite)
        check_sources(data, evaluation)
        name, notes = called(model, name), []
        plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(Path(plan))
        if plan is not None and (chosen.reduce is not None or chosen.max_drop is not None):
            notes.append("The plan says every rank, so reduce and max_drop were not used.")
        before = model_of(model)
        check_savable(before)
        pictures = pictures_for(before, data, notes)
        judging = None if evaluation is None else pictures_for(before, evaluation, notes)
        division = divide(
            pictures, judging, calibrate=chosen.pictures, seed=chosen.seed, max_drop=chosen.max_drop,
            limit=chosen.eval_limit, trains=chosen.tuning is not None or chosen.searching is not None,
        )  # fmt: skip
        if chosen.tuning is not None:
            _check_tuning(before, division, chosen.tuning)
        way = _Way(before, division, chosen, out.with_name(f"{out.name}.run"), progress)
        small, done, compressed = way.go(plan)
        asked = {"model": name, "data": pictures.name, "evaluation": None if judging is None else judging.name}
        report = way.report(
            small, done, compressed, name=name, command=command, settings=asked | asdict(chosen),
            notes=(*notes, *division.notes, *said_of_skipped(division.calibration)),
        )  # fmt: skip
        record = _noted(small, report, division)
        save(small, out, report=report, stock=chosen.stock)
        shutil.rmtree(way.work, ignore_errors=True)
    return Finished(model=small, record=record, folder=out, report=report, notes=report.notes)


class _Way:
    """The work itself: a model, pictures for each purpose, and how to go about it."""

    def __init__(self, before: nn.Module, division: Division, settings: CompressToSettings, work: Path, progress: bool):
        self.before, self.division, self.settings, self.work = before, division, settings, work
        self.progress = progress
        self.batches: Callable[[Pictures], Batches] = partial(
            batches, preprocess=preprocess_of(before), batch_size=settings.batch_size
        )

    def go(self, plan: Plan | None) -> tuple[nn.Module, Compressed, Evaluation | None]:
        """Search, compress and tune. Where it is tuned, the model is evaluated before that as well."""
        s, on = self.settings, self.division
        if plan is None and s.searching is not None:
            plan = search_(
                self.before,
                on.training,
                s.searching,
                out=self.work / "search",
                restart=s.restart,
                progress=self.progress,
            )
        small = copy.deepcopy(self.before).eval()
        deciding = None if on.deciding is None else self.batches(on.deciding)
        done = compress_(
            small,
            self.batches(on.calibration),
            part_of(CompressSettings, s),
            held_out=deciding,
            plan=plan,
            progress=self.progress,
        )
        if s.tuning is None:
            return small, done, None
        compressed = self.judge(small, against=self.before)
        tune_(
            small, on.training, s.tuning, teacher=self.before, evaluation=on.judged if on.judged.has_labels else None,
            out=self.work / "tuning", restart=s.restart, progress=self.progress,
        )  # fmt: skip
        return small, done, compressed

    def judge(self, model: nn.Module, against: nn.Module | None = None) -> Evaluation:
        return evaluate(model, self.batches(self.division.judged), against=against, progress=self.progress)

    def report(
        self,
        small: nn.Module,
        done: Compressed,
        compressed: Evaluation | None,
        *,
        name: str,
        command: str | None,
        settings: dict[str, Any],
        notes: tuple[str, ...],
    ) -> ReportData:
        """Measure before and after, and gather what the report shows."""
        found = self.judge(self.before), self.judge(small, against=self.before)
        timings = self._timings(small, done.prepared.example) if self.settings.bench else None
        return collect(
            self.before, small, done, title=f"{name}, compressed", model=name, command=command,
            settings={k: v for k, v in settings.items() if v is not None}, evaluations=found, compressed=compressed,
            timings=timings, notes=notes,
        )  # fmt: skip

    def _timings(self, small: nn.Module, example: Tensor | None) -> dict[str, Timing] | None:
        if example is None:
            return None
        size, home = self.settings.batch_size, next(small.parameters())
        images = torch.randn(size, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(home)
        return benchmark({"before": self.before, "after": small}, images, repeats=10)


def _check_tuning(before: nn.Module, division: Division, settings: TuneSettings) -> None:
    """Raise what tuning would raise after the compression: as far as it can be told on the model before.

    ``only`` may name parts that only the compressed model has.
    """
    set_up(
        before, division.training, replace(settings, only=()), teacher=before,
        evaluation=division.judged if division.judged.has_labels else None, folder=None, preprocess=None,
        processes=Processes(cpu=next(before.parameters()).device.type == "cpu"),
    )  # fmt: skip


def _noted(small: Any, report: ReportData, division: Division) -> Record:
    """The model's record, with what was measured put into it."""
    record = small.comcat_record
    results = replace(
        record.results, before=report.before, after=report.after, judged_on=division.judged_on,
        agreement=report.agreement, predicted_loss=report.predicted_loss, measured_loss=report.measured_loss,
    )  # fmt: skip
    small.comcat_record = replace(record, results=results)
    return small.comcat_record

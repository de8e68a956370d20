"""From a model and pictures to a smaller model in a folder, with its report."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import Batches, Pictures, Preprocess, batches
from ..errors import SettingsError
from ..files import home_path
from ..measure import Evaluation, evaluate
from ..methods.compress import Compressed, compress_
from ..methods.request import check_reach, check_request
from ..methods.search import search_
from ..methods.settings import CompressSettings
from ..methods.splits import Division, divide
from ..models import preprocess_of
from ..plan import Plan
from ..report import ReportData
from ..report.collect import collect
from ..runs.claims import claimed
from ..runs.processes import Processes
from ..settings import from_keywords, part_of
from ..sites import Sites
from ..store import save
from ..store.precision import round_
from ..store.saving import check_savable
from ..store.uniform import shape_of
from ..tuning.leaks import check_sources
from ..tuning.settings import TuneSettings
from ..tuning.setup import set_up
from ..tuning.tune import tune_
from .measuring import noted, timings
from .places import (
    Finished,
    Source,
    called,
    check_out,
    model_of,
    pictures_for,
    run_beside,
    said_of_plan,
    said_of_skipped,
    said_of_tuning,
    said_of_unused,
)
from .settings import CompressToSettings

SHOWN = 4
"""So many pictures are shown in a report."""
Proposer = Callable[[nn.Module, Iterable], Plan]
"""What proposes a plan for a model from its calibration batches."""


def compress_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    plan: Plan | str | os.PathLike[str] | Proposer | None = None,
    progress: bool = False,
    name: str | None = None,
    command: str | None = None,
    **settings: Any,
) -> Finished:
    """Make a model smaller and save it with its report: calibrate, choose, apply, tune if asked to, measure.

    A given model is untouched. What cannot work is refused before the work, as far as it can be known; the place is
    kept from other runs meanwhile, and written to at the end alone. A search and tuning keep checkpoints in ``OUT.run``
    beside it, so that the same call goes on where it was stopped.

    Args:
        out: the folder to save to. model: itself, or its name for :func:`comcat.load_model`.
        data: pictures to calibrate on, and to search and tune on; labels are not needed.
        evaluation: labelled pictures to measure on. Nothing is chosen by them. Without any, a part of ``data`` is held
            out.
        plan: what to do instead of choosing it, for example what :func:`comcat.search` found, its file, or a function
            that proposes one from the model and its calibration batches.
        name: what the report calls the model. command: to repeat the run with, for the report.
        settings: fields of :class:`CompressToSettings`: ``reduce`` or ``max_drop``, and all others of
            :func:`comcat.compress`.

    Raises:
        SettingsError, StoreError: for a place that cannot be written to, holds something else, or that another run
            writes to.
        DataError: where pictures to calibrate or train on are also in ``evaluation``.
        And what :func:`comcat.compress`, :func:`comcat.search` and :func:`comcat.tune` raise.
    """
    out, chosen = home_path(out), from_keywords(CompressToSettings, settings)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError(
            "compressing works in one process; with several, search first, then compress with its plan, then tune"
        )
    with claimed(out):
        check_out(out, chosen.overwrite)
        check_sources(data, evaluation)
        job = _opened(model, data, evaluation, plan, chosen, name=called(model, name), work=out, progress=progress)
        small, done, compressed = _carry_out(job)
        report = _report(job, small, done, compressed, command)
        record = noted(small, report, job.division)
        save(small, out, report=report, stock=chosen.stock)
        shutil.rmtree(job.work, ignore_errors=True)
    return Finished(model=small, record=record, folder=out, report=report, notes=report.notes)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What there is to do: a model, the pictures for each purpose, and how.

    Attributes:
        whole: all sites of the model. work: where a search or tuning keeps what it needs to go on. asked: what the
            report says of the settings.
    """

    name: str
    before: nn.Module
    whole: Sites
    preprocess: Preprocess
    division: Division
    plan: Plan | Proposer | None
    settings: CompressToSettings
    work: Path
    asked: dict[str, Any]
    notes: tuple[str, ...]
    progress: bool

    def batches(self, pictures: Pictures) -> Batches:
        return batches(pictures, self.preprocess, batch_size=self.settings.batch_size)

    def judge(self, model: nn.Module, against: nn.Module | None = None) -> Evaluation:
        return evaluate(model, self.batches(self.division.judged), against=against, progress=self.progress)


def _opened(
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    evaluation: Source | None,
    plan: Plan | str | os.PathLike[str] | Proposer | None,
    settings: CompressToSettings,
    *,
    name: str,
    work: Path,
    progress: bool,
) -> _Job:
    """Open everything and raise for what cannot work."""
    notes: list[str] = []
    proposer, plan = (plan, Plan(sites={})) if callable(plan) else (None, plan)
    plan = Plan.load(Path(plan)) if isinstance(plan, str | os.PathLike) else plan
    if plan is not None and proposer is None:
        notes += said_of_unused(settings)
    trains = settings.tuning is not None or settings.searching is not None
    before = model_of(model)
    check_request(before, settings, plan)
    check_savable(before)
    preprocess = preprocess_of(before)
    whole = check_reach(before, settings, preprocess.blank(next(before.parameters())), plan)
    if settings.stock:
        _check_stock(whole, plan, proposer)
    pictures = pictures_for(before, data, notes)
    judging = None if evaluation is None else pictures_for(before, evaluation, notes)
    division = divide(
        pictures, judging, calibrate=settings.pictures, seed=settings.seed, max_drop=settings.max_drop,
        limit=settings.eval_limit, trains=trains,
    )  # fmt: skip
    if settings.tuning is not None:
        _check_tuning(before, division, settings.tuning)
    asked = {"model": name, "data": pictures.name, "evaluation": None if judging is None else judging.name}
    return _Job(
        name=name, before=before, whole=whole, preprocess=preprocess, division=division, plan=proposer or plan,
        settings=settings,
        work=run_beside(work), asked=asked | asdict(settings), notes=(*notes, *division.notes),
        progress=progress,
    )  # fmt: skip


def _check_stock(whole: Sites, plan: Plan | None, proposer: Proposer | None) -> None:
    """Raise StoreError where no stock checkpoint can hold what a given plan makes of a model."""
    if plan is not None and proposer is None:
        shape_of(plan, whole)


def _check_tuning(before: nn.Module, division: Division, settings: TuneSettings) -> None:
    """Raise what tuning would raise after the compression, as far as it can be told on the model before.

    ``only`` may name parts that only the compressed model has.
    """
    set_up(
        before, division.training, replace(settings, only=()), teacher=before,
        evaluation=division.judged if division.judged.has_labels else None, folder=None, preprocess=None,
        processes=Processes(cpu=next(before.parameters()).device.type == "cpu"),
    )  # fmt: skip


def _carry_out(job: _Job) -> tuple[nn.Module, Compressed, Evaluation | None]:
    """Search, compress and tune. Where it is tuned, the model is evaluated before that as well."""
    s, on, plan = job.settings, job.division, job.plan
    if plan is None and s.searching is not None:
        plan = search_(
            job.before, on.training, s.searching, out=job.work / "search", restart=s.restart, progress=job.progress
        )
    if callable(plan):
        plan = plan(job.before, job.batches(on.calibration))
    small = copy.deepcopy(job.before).eval()
    deciding = None if on.deciding is None else job.batches(on.deciding)
    done = compress_(
        small, job.batches(on.calibration), part_of(CompressSettings, s), held_out=deciding, plan=plan,
        whole=job.whole, progress=job.progress,
    )  # fmt: skip
    if s.tuning is None:
        round_(small)  # what is measured is what will be saved
        return small, done, None
    compressed = job.judge(small, against=job.before)
    tune_(
        small, on.training, s.tuning, teacher=job.before, evaluation=on.judged if on.judged.has_labels else None,
        out=job.work / "tuning", restart=s.restart, progress=job.progress,
    )  # fmt: skip
    round_(small)
    return small, done, compressed


def _report(job: _Job, small: Any, done: Compressed, compressed: Evaluation | None, command: str | None) -> ReportData:
    """Measure before and after, and gather what the report shows."""
    found = job.judge(job.before), job.judge(small, against=job.before)
    tuned = said_of_tuning(small.comcat_record.results.tuning)
    timed = timings(job.before, small, job.preprocess, job.settings.batch_size) if job.settings.bench else None
    told = collect(
        job.before, small, done, model=job.name, command=command, judged_on=job.division.judged_on,
        settings={k: v for k, v in job.asked.items() if v is not None}, evaluations=found, compressed=compressed,
        timings=timed, shown=_to_show(job, done.plan),
        notes=(*job.notes, *said_of_skipped(job.division.calibration), *tuned, *said_of_plan(done.plan)),
    )  # fmt: skip
    return replace(told, predicted_loss=_predicted(told)) if isinstance(job.plan, Plan) else told


def _predicted(told: ReportData) -> float | None:
    """What a given plan is predicted to lose by what was calibrated here. What it says itself is of other pictures, and
    of other ranks where somebody has changed it. None where a part of it has no prediction."""
    losses = [row.predicted_loss for row in told.sites if row.form is not None]
    return None if None in losses else sum(loss for loss in losses if loss is not None)


def _to_show(job: _Job, plan: Plan) -> Tensor | None:
    """A few calibration pictures, where the report has something to show on them."""
    if not any(name.endswith(":tokens") for name in plan.sites):
        return None
    images, _ = next(iter(job.batches(job.division.calibration)))
    return images[:: max(1, len(images) // SHOWN)][:SHOWN]

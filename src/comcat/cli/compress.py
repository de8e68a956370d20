"""``comcat compress``: from a model and pictures to a smaller model, saved and reported on."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import DataError, SettingsError
from ..methods.compress import CompressSettings
from ..methods.search import SearchOptions, SearchSettings
from ..settings import part_of
from ..tuning.settings import TuneSettings
from .common import (
    Common,
    Loader,
    Positional,
    check_out,
    command_line,
    load,
    open_for,
    plain_settings,
    skip_notes,
    time_models,
)
from .terminal import print_report

FEW = 20
"""So few pictures are not split into some to calibrate on and some to measure on."""


@dataclass(frozen=True, kw_only=True)
class Compress(Common, CompressSettings):
    """Make a model smaller and faster: calibrate, choose ranks, factorise, measure, save."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("reduce", "max_drop")

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to calibrate on: a folder, parquet, .tar shards, hf:DATASET or digits. Labels are not needed."""
    out: Path
    """Folder to save to."""
    eval: str | None = None
    """Pictures with labels to report accuracy on. Nothing is chosen by them."""
    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    plan: Path | None = None
    """Use the ranks of this plan.json instead of choosing them."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    batch_size: int = 32
    """Pictures a batch, for calibration, evaluation and timing."""
    bench: bool = True
    """Time the model before and after."""
    stock: bool = False
    """Save a checkpoint that plain transformers loads (attention at one uniform rank only)."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""
    epochs: float | None = None
    """Tune for so many epochs afterwards, the model before compression being the teacher; --data then needs labels, or all is learned from the teacher."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """How to search, with --ranks search."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """How to tune, with --epochs (or --tune.steps)."""
    restart: bool = False
    """Forget the checkpoints of an earlier search or tuning and begin anew."""


def run(command: Compress) -> int:
    return compress_model(command, load(command, command.model))


def compress_model(command: Compress, model: Any, *, shown: str | None = None) -> int:
    """Compress a model that is loaded already; ``shown`` is the command to repeat it with, for the report."""
    import copy

    from .. import measure
    from ..data import overlap
    from ..methods.compress import compress_
    from ..methods.search import search_
    from ..models import preprocess_of
    from ..plan import Plan
    from ..report.collect import collect
    from ..store import save
    from ..tuning.leaks import check_apart, same_place
    from ..tuning.tune import tune_
    from .search import show as show_search

    started = time.monotonic()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError(
            "comcat compress works in one process; with several: comcat search, then compress --plan, then comcat tune"
        )
    check_out(command.out, command.overwrite)
    notes: list[str] = []
    if command.plan is not None and (command.reduce is not None or command.max_drop is not None):
        notes.append("--plan says every rank, so --reduce and --max-drop were not used.")
    pictures = open_for(model, command.data, notes)
    evaluation = None if command.eval is None else open_for(model, command.eval, notes)
    if command.eval is not None and same_place(command.data, command.eval):
        raise DataError(
            f"--data and --eval are both {command.eval!r}: accuracy on pictures that were calibrated on says nothing; give separate ones"
        )
    plan = None if command.plan is None else Plan.load(command.plan)
    rest, held = pictures.split(0.2, command.seed)
    if pictures.count is not None and pictures.count < FEW:
        rest = held = pictures
        notes.append(f"Only {pictures.count} pictures: calibration and measurement had to share them.")
    deciding = held
    if command.max_drop is not None and held is not rest:
        deciding, held = held.split(0.5, command.seed)  # what chooses the saving does not judge it
    calibration = rest.take(command.pictures, command.seed)
    judged = held.take(1000, command.seed) if evaluation is None else evaluation
    judged = judged if command.eval_limit is None else judged.take(command.eval_limit, command.seed)
    preprocess = preprocess_of(model)
    batches = Loader(preprocess, command.batch_size)
    if evaluation is not None and (shared := overlap(calibration, judged)):
        raise DataError(
            f"{shared} of the calibration pictures are also in --eval {command.eval!r}: accuracy there would not be honest"
        )
    settings = part_of(CompressSettings, command)
    training = rest if evaluation is None else pictures
    tuning = command.tune if command.epochs is None else replace(command.tune, epochs=command.epochs)
    tunes = tuning.epochs is not None or tuning.steps is not None
    if evaluation is not None and (tunes or command.ranks == "search"):
        notes.append(check_apart(training, judged))
    before = copy.deepcopy(model)
    work = command.out.with_name(f"{command.out.name}.run")  # what a search or tuning needs to go on where it stopped
    if command.ranks == "search" and plan is None:
        plan = search_(
            model, training, _search_settings(command), out=work / "search", restart=command.restart, progress=True
        )
        show_search(plan.made_by, len(plan.sites))
    done = compress_(
        model,
        batches(calibration),
        settings,
        held_out=batches(deciding.take(2000, command.seed)) if command.max_drop is not None else None,
        plan=plan,
        progress=True,
    )
    compressed = measure.evaluate(model, batches(judged), against=before, progress=True) if tunes else None
    if tunes:
        tune_(
            model,
            training,
            tuning,
            teacher=before,
            evaluation=judged if judged.has_labels else None,
            out=work / "tuning",
            restart=command.restart,
            progress=True,
        )
    notes += skip_notes(calibration)
    if evaluation is None:
        notes.append("Measured on pictures of --data that calibration did not see, for want of --eval.")
    say = (
        measure.evaluate(before, batches(judged), progress=True),
        measure.evaluate(model, batches(judged), against=before, progress=True),
    )
    timings = time_models({"before": before, "after": model}, done.prepared.example, command) if command.bench else None
    report = collect(
        before, model, done, title=f"{command.model}, compressed", model=command.model, command=shown or command_line(),
        settings=plain_settings(command), evaluations=say, compressed=compressed, timings=timings, notes=tuple(notes),
    )  # fmt: skip
    model.comcat_record = _with_results(model.comcat_record, report)
    save(model, command.out, report=report, stock=command.stock)
    shutil.rmtree(work, ignore_errors=True)
    print_report(report, time.monotonic() - started)
    print(f"\nSaved to {command.out}; report: {(command.out / 'report.html').resolve()}")
    return 0


def _search_settings(command: Compress) -> SearchSettings:
    if command.reduce is None:
        raise SettingsError("--ranks search needs --reduce, the share to save")
    asked = {
        n: getattr(command, n) for n in ("reduce", "budget", "forms", "statistic", "only", "head", "pictures", "seed")
    }
    return SearchSettings(**asdict(command.search), **asked, multiple=command.multiple or 1)


def _with_results(record: Any, report: Any) -> Any:
    results = replace(
        record.results, before=report.before, after=report.after, agreement=report.agreement,
        predicted_loss=report.predicted_loss, measured_loss=report.measured_loss,
    )  # fmt: skip
    return replace(record, results=results)

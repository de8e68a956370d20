"""``comcat tune``: train a model on, from its teacher and from labels, and save it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SettingsError
from ...files import home_path
from ...settings import keywords_of
from ...tuning.settings import TuneSettings
from ..common import Common, Positional, command_line, in_processes, load
from ..terminal import LABELS, number, table


@dataclass(frozen=True, kw_only=True)
class Tune(Common, TuneSettings):
    """Win back by training what compression lost. Run again, the same command goes on where it stopped."""

    student: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to train on: a folder, parquet, .tar shards, hf:DATASET or digits; with labels, or else with a teacher.
    """
    eval: str | None = None
    """Pictures with labels to follow the accuracy on. Nothing is chosen by them."""
    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    teacher: str | None = None
    """A model to learn from, such as the one before compression: timm:NAME, hf:NAME or a folder."""
    out: Path | None = None
    """Folder for the result, the log and the checkpoints; by default the student's with -tuned."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    restart: bool = False
    """Begin anew where there are checkpoints of an earlier run."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""


def run(command: Tune) -> int:
    folder = home_path(command.student)
    if command.out is None and not folder.is_dir():
        raise SettingsError(
            "say where to save, --out FOLDER: by default that is beside the student's folder, "
            f"but {command.student!r} is none"
        )
    out = folder.with_name(f"{folder.resolve().name}-tuned") if command.out is None else command.out
    return in_processes(command.device, lambda processes: _run(command, out, processes), out)


def _run(command: Tune, out: Path, processes: Any) -> int:
    from ...workflows.tune import tune_to

    with processes.together():
        student = load(command, command.student)
        teacher = None if command.teacher is None else load(command, command.teacher)
    done = tune_to(
        out, student, command.data, evaluation=command.eval, eval_limit=command.eval_limit, teacher=teacher,
        overwrite=command.overwrite, restart=command.restart, progress=True, name=command.student,
        command=command_line(), **keywords_of(TuneSettings, command),
    )  # fmt: skip
    if processes.main:
        _say(done.record.results.tuning or {}, done.notes)
        print(f"\nSaved to {out}; report: {(out / 'report.html').resolve()}; every step is in {out / 'log.jsonl'}")
    return 0


def _say(result: Mapping[str, Any], notes: Sequence[str]) -> None:
    before, after = result.get("before"), result.get("after")
    if before and after:
        keys = [key for key in ("top1", "top5", "loss", "cosine") if key in before and key in after]
        print()
        table(["", "before", "after"], [[LABELS[k], number(k, before[k]), number(k, after[k])] for k in keys])
    speed = result["images_per_second"]
    print(f"\nTook {result['seconds']:.0f} s{'' if speed is None else f', {speed:.0f} images/s while training'}.")
    for note in notes:
        print(note)

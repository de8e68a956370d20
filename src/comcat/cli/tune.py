"""``comcat tune``: train a model on, from its teacher and from labels, and save it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, SettingsError
from ..settings import part_of
from ..tuning.settings import TuneSettings
from .common import Common, Positional, check_out, command_line, in_processes, load, plain_settings, skip_notes
from .terminal import LABELS, number, table


@dataclass(frozen=True, kw_only=True)
class Tune(Common, TuneSettings):
    """Win back by training what compression lost. Run again, the same command goes on where it stopped."""

    student: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to train on: a folder, parquet, .tar shards, hf:DATASET or digits; with labels, or else with a teacher."""
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
    folder = Path(command.student).expanduser()
    out = folder.with_name(f"{folder.resolve().name}-tuned") if command.out is None else command.out
    return in_processes(command.device, lambda processes: _run(command, out, processes), out)


def _run(command: Tune, out: Path, processes: Any) -> int:
    from ..data import open_pictures
    from ..store import save
    from ..tuning.leaks import check_apart, same_place
    from ..tuning.tune import tune_

    note = None
    with processes.together():
        _check_out(command, out)
        if command.eval is not None and same_place(command.data, command.eval):
            raise DataError(
                f"--data and --eval are both {command.eval!r}: accuracy on pictures that were trained on says nothing; give separate ones"
            )
        pictures = open_pictures(command.data)
        evaluation = None if command.eval is None else open_pictures(command.eval)
        if evaluation is not None and command.eval_limit is not None:
            evaluation = evaluation.take(command.eval_limit, command.seed)
        if evaluation is not None and processes.main:
            note = check_apart(pictures, evaluation)
        student = load(command, command.student)
        teacher = None if command.teacher is None else load(command, command.teacher)
    settings = part_of(TuneSettings, command)
    tune_(
        student,
        pictures,
        settings,
        teacher=teacher,
        evaluation=evaluation,
        out=out,
        restart=command.restart,
        progress=True,
    )
    with processes.together():
        if processes.main:
            notes = [*([note] if note else []), *skip_notes(pictures)]
            result = student.comcat_record.results.tuning
            save(student, out, report=_report(command, student, notes) if result["curve"] else None)
            _say(result, notes)
            print(f"\nSaved to {out}; report: {(out / 'report.html').resolve()}; every step is in {out / 'log.jsonl'}")
    return 0


def _check_out(command: Tune, out: Path) -> None:
    """Raises where nobody says where to save, or something else is there; checkpoints to go on from are not."""
    from ..store.folder import check_replaceable
    from ..tuning.setup import CHECKPOINTS

    if command.out is None and not Path(command.student).expanduser().is_dir():
        raise SettingsError(
            f"say where to save, --out FOLDER: by default that is beside the student's folder, but {command.student!r} is none"
        )
    if (out / CHECKPOINTS).is_dir():
        check_replaceable(out, overwrite=True)
    else:
        check_out(out, command.overwrite)


def _report(command: Tune, student: Any, notes: list[str]) -> Any:
    import torch

    from ..models import preprocess_of
    from ..report.collect import collect_tuning

    p = preprocess_of(student)
    return collect_tuning(
        student, title=f"{command.student}, tuned", model=command.student, command=command_line(), settings=plain_settings(command),
        example=torch.zeros(1, p.channels, *p.size), notes=tuple(notes),
    )  # fmt: skip


def _say(result: dict[str, Any], notes: list[str]) -> None:
    before, after = result.get("before"), result.get("after")
    if before and after:
        keys = [key for key in ("top1", "top5", "loss", "cosine") if key in before and key in after]
        print()
        table(["", "before", "after"], [[LABELS[k], number(k, before[k]), number(k, after[k])] for k in keys])
    speed = result["images_per_second"]
    print(f"\nTook {result['seconds']:.0f} s{'' if speed is None else f', {speed:.0f} images/s while training'}.")
    for note in notes:
        print(note)

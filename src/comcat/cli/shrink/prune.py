"""``comcat prune``: channels go while the model is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...methods.gating.settings import PruneSettings
from ...settings import keywords_of
from ..common import Common, Positional, command_line, in_processes, load
from ..terminal import print_report, table


@dataclass(frozen=True, kw_only=True)
class Prune(Common, PruneSettings):
    """Prune hidden units and channels of heads while the model is trained.

    Run again, the same command goes on where it stopped.
    """

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to train on: a folder, parquet, .tar shards, hf:DATASET or digits. Without labels, all is learned from
    the teacher."""
    out: Path
    """Folder to save to. Checkpoints lie beside it, in OUT.run, while the run lasts."""
    eval: str | None = None
    """Pictures with labels to report accuracy on. Nothing is chosen by them."""
    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    teacher: str | None = None
    """A model to learn from, by default the model itself as it is: timm:NAME, hf:NAME or a folder."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    bench: bool = True
    """Time the model before and after."""
    restart: bool = False
    """Forget the checkpoints of an earlier run and begin anew."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""


def run(command: Prune) -> int:
    folder = command.out.with_name(f"{command.out.name}.run")
    return in_processes(command.device, lambda processes: _run(command, processes), folder)


def _run(command: Prune, processes: Any) -> int:
    from ...workflows.prune import prune_to

    started = time.monotonic()
    with processes.together():
        model = load(command, command.model)
        teacher = None if command.teacher is None else load(command, command.teacher)
    done = prune_to(
        command.out, model, command.data, evaluation=command.eval, eval_limit=command.eval_limit, teacher=teacher,
        bench=command.bench, overwrite=command.overwrite, restart=command.restart, progress=True, name=command.model,
        command=command_line(), **keywords_of(PruneSettings, command),
    )  # fmt: skip
    if processes.main and done.report is not None:
        _show(done.record.plan.made_by)
        print_report(done.report, time.monotonic() - started)
        print(f"\nSaved to {done.folder}; report: {(done.folder / 'report.html').resolve()}")
    return 0


def _show(made_by: Mapping[str, Any]) -> None:
    """A table of the choices of marks."""
    rows = [
        [str(c["step"]), f"{100 * c['saves']:.1f} %", f"{c['marked']:,}", f"{c['returned']:,}"]
        for c in made_by["gates"]["choices"]
    ]
    print()
    table(["before step", "saves", "marked channels", "came back"], rows)

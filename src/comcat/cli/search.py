"""``comcat search``: the ranks of a plan, found on training pictures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, SettingsError
from ..files import check_writable
from ..methods.search import SearchSettings
from ..settings import part_of
from .common import Common, Positional, in_processes, load, skip_notes
from .terminal import table


@dataclass(frozen=True, kw_only=True)
class Search(Common, SearchSettings):
    """Find the ranks of a plan by search on training pictures; `comcat compress --plan` applies it."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Training pictures: a folder, parquet, .tar shards, hf:DATASET or digits. Without labels, the model's own predictions stand in for them."""
    out: Path
    """The plan to write, a .json file. Checkpoints lie beside it while the search lasts: the same command goes on where it stopped."""
    eval: str | None = None
    """The evaluation set, only to make sure that none of its pictures is in --data."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    restart: bool = False
    """Forget the checkpoints of an earlier run and begin anew."""
    overwrite: bool = False
    """Replace a plan that is there already."""


def run(command: Search) -> int:
    folder = command.out.with_name(f"{command.out.stem}.run")
    return in_processes(command.device, lambda processes: _run(command, folder, processes), folder)


def _run(command: Search, folder: Path, processes: Any) -> int:
    from ..data import open_pictures
    from ..methods.search import search_
    from ..tuning.leaks import check_apart, same_place

    started = time.monotonic()
    note = None
    with processes.together():
        _check_out(command)
        pictures = open_pictures(command.data)
        if command.eval is not None and same_place(command.data, command.eval):
            raise DataError(
                f"--data and --eval are both {command.eval!r}: ranks must not be found on the evaluation set; give separate ones"
            )
        if command.eval is not None and processes.main:
            note = check_apart(pictures, open_pictures(command.eval))
        model = load(command, command.model)
    settings = part_of(SearchSettings, command)
    plan = search_(model, pictures, settings, out=folder, restart=command.restart, progress=True)
    if processes.main:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        plan.save(command.out)
        shutil.rmtree(folder, ignore_errors=True)
        show(plan.made_by, len(plan.sites), time.monotonic() - started)
        for line in [*([note] if note else []), *skip_notes(pictures)]:
            print(line)
        print(
            f"\nSaved to {command.out}; next: comcat compress {command.model} --plan {command.out} --data … --out FOLDER"
        )
    return 0


def _check_out(command: Search) -> None:
    if command.out.is_dir() or command.out.suffix != ".json":
        raise SettingsError(f"got --out {str(command.out)!r}, expected a file to write the plan to, such as plan.json")
    check_writable(command.out.parent)
    if command.out.exists() and not command.overwrite:
        raise SettingsError(f"--out {str(command.out)!r} exists; say --overwrite to replace it, or name another file")


def show(made_by: Mapping[str, Any], sites: int, seconds: float | None = None) -> None:
    """A table of the rounds of a search."""
    rounds = [p for p in made_by["search"]["curve"] if "top1" in p]
    rows = [
        [str(p["round"] + 1), str(p["step"]), f"{100 * p['cost']:.1f} %", f"{p['loss']:.4f}", f"{p['top1']:.2f} %"]
        for p in rounds
    ]
    table(["round", "step", "expected cost", "loss", "held-out top-1"], rows)
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(f"\n{sites} sites shrink and save {100 * made_by['saved']:.2f} % of the model's {made_by['budget']}{took}.")

"""``comcat search``: the ranks of a plan, found on training pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import counted
from ...methods.search.settings import SearchSettings
from ...settings import keywords_of
from ..common import Common, Positional, in_processes, load
from ..terminal import table


@dataclass(frozen=True, kw_only=True)
class Search(Common, SearchSettings):
    """Find the ranks of a plan by search on training pictures; `comcat compress --plan` applies it."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Training pictures: a folder, parquet, .tar shards, hf:DATASET or digits. Without labels, the model's own
    predictions stand in for them.
    """
    out: Path
    """The plan to write, a .json file. Checkpoints lie beside it while the search lasts: the same command goes on where
    it stopped.
    """
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
    return in_processes(command.device, lambda processes: _run(command, processes), folder)


def _run(command: Search, processes: Any) -> int:
    from ...workflows.search import search_to

    started = time.monotonic()
    with processes.together():
        model = load(command, command.model)
    found = search_to(
        command.out, model, command.data, evaluation=command.eval, overwrite=command.overwrite,
        restart=command.restart, progress=True, **keywords_of(SearchSettings, command),
    )  # fmt: skip
    if processes.main:
        show(found.plan.made_by, len(found.plan.sites), time.monotonic() - started)
        for note in found.notes:
            print(note)
        print(
            f"\nSaved to {command.out}; next: comcat compress {command.model} --plan {command.out} --data … --out "
            "FOLDER"
        )
    return 0


def show(made_by: Mapping[str, Any], sites: int, seconds: float | None = None) -> None:
    """A table of the rounds of a search."""
    rounds = [p for p in made_by["search"]["curve"] if "top1" in p]
    rows = [
        [str(p["round"] + 1), str(p["step"]), f"{100 * p['cost']:.1f} %", f"{p['loss']:.4f}", f"{p['top1']:.2f} %"]
        for p in rounds
    ]
    table(["round", "step", "expected cost", "loss", "held-out top-1"], rows)
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(
        f"\n{100 * made_by['saved']:.2f} % of the model's {made_by['budget']} saved by {counted(sites, 'site')}{took}."
    )

"""``comcat explore``: one calibration, every budget, on a page with a slider."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import tyro

from ...errors import counted
from ...methods.settings import CompressSettings
from ...settings import keywords_of
from ..common import Common, Positional, load


@dataclass(frozen=True, kw_only=True)
class Explore(Common, CompressSettings):
    """Write a page on which every budget of a model can be looked at before one is chosen."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures: a folder, parquet, .tar shards, hf:DATASET or digits. Labels are not needed."""
    out: Path
    """The page to write, an .html file."""
    reduce: tyro.conf.Suppress[float | None] = field(default=None)
    """Every one is shown."""
    max_drop: tyro.conf.Suppress[float | None] = field(default=None)
    target_ms: tyro.conf.Suppress[float | None] = field(default=None)
    points: int = 30
    """Budgets along the way."""
    measured: int = 10
    """On so many of them agreement is measured, on held-out pictures."""
    judged: int = 64
    """Held-out pictures to measure on."""
    time: bool = False
    """Measure milliseconds as well, also where time is not the budget."""
    batch_size: int = 32
    """Pictures a batch, for calibration and measuring."""
    overwrite: bool = False
    """Replace a page that is there already."""


def run(command: Explore) -> int:
    from ...workflows.explore import explore_to

    own = ("points", "measured", "judged", "time", "batch_size", "overwrite")
    every = keywords_of(CompressSettings, command)
    asked = {name: value for name, value in every.items() if name not in ("reduce", "max_drop", "target_ms")}
    done = explore_to(
        command.out, load(command, command.model), command.data, progress=True, name=command.model,
        source=command.data, **{name: getattr(command, name) for name in own}, **asked,
    )  # fmt: skip
    first, last = done.way.points[0], done.way.points[-1]
    print(f"{counted(len(done.way.points), 'plan')}, from {100 * first.reduce:.1f} to {100 * last.reduce:.1f} % saved.")
    for note in done.notes:
        print(note)
    print(f"\nThe page: {done.page.resolve()}")
    return 0

"""``comcat compress``: from a model and pictures to a smaller model, saved and reported on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...settings import keywords_of
from ...workflows.settings import CompressToSettings
from ..common import Common, Positional, command_line, load
from ..terminal import print_report
from .search import show as show_search


@dataclass(frozen=True, kw_only=True)
class Compress(Common, CompressToSettings):
    """Make a model smaller and faster: calibrate, choose ranks, factorise, measure, save."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("reduce", "max_drop", "target_ms")

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to calibrate on: a folder, parquet, .tar shards, hf:DATASET or digits. Labels are not needed."""
    out: Path
    """Folder to save to."""
    eval: str | None = None
    """Pictures with labels to report accuracy on. Nothing is chosen by them."""
    plan: Path | None = None
    """Use the ranks of this plan.json instead of choosing them."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""


def run(command: Compress) -> int:
    return compress_model(command, load(command, command.model))


def compress_model(command: Compress, model: Any, *, shown: str | None = None) -> int:
    """Compress a model that is loaded already; ``shown`` is the command to repeat it with, for the report."""
    from ...workflows.compress import compress_to

    started = time.monotonic()
    done = compress_to(
        command.out, model, command.data, evaluation=command.eval, plan=command.plan, progress=True,
        name=command.model, command=shown or command_line(), **keywords_of(CompressToSettings, command),
    )  # fmt: skip
    plan = done.record.plan
    if command.ranks == "search" and command.plan is None:
        show_search(plan.made_by, len(plan.sites))
    print_report(done.report, time.monotonic() - started)
    print(f"\nSaved to {done.folder}; report: {(done.folder / 'report.html').resolve()}")
    return 0

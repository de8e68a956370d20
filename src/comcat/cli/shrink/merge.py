"""``comcat merge``: blocks of a model run on fewer tokens, nothing trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from ...methods.settings import MergeSettings
from ...settings import keywords_of
from ...tuning.settings import TuneSettings
from ..common import Common, Positional, command_line, load
from ..terminal import print_report


@dataclass(frozen=True, kw_only=True)
class Merge(Common, MergeSettings):
    """Run a model's blocks on fewer tokens: tokens that look alike, or neighbours, are run as one. Run again, the same
    command goes on where it stopped.
    """

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder; one that was compressed, pruned or tuned keeps its ranks and units."""
    data: str
    """Pictures to choose by: a folder, parquet, .tar shards, hf:DATASET or digits. Labels are not needed."""
    out: Path
    """Folder to save to."""
    eval: str | None = None
    """Pictures with labels to report accuracy on. Nothing is chosen by them."""
    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    seed: int = 0
    """Seed of the choice of pictures."""
    batch_size: int = 32
    """Pictures a batch, for choosing, evaluation and timing."""
    bench: bool = True
    """Time the model before and after."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""
    epochs: float | None = None
    """Tune for so many epochs afterwards, the model before being the teacher."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """How to tune, with --epochs (or --tune.steps)."""
    restart: bool = False
    """Forget what was measured and the checkpoints of an earlier run, and begin anew."""


WAY = ("eval_limit", "seed", "batch_size", "bench", "overwrite", "epochs", "tune", "restart")


def run(command: Merge) -> int:
    from ...workflows.merge import merge_to

    started = time.monotonic()
    done = merge_to(
        command.out, load(command, command.model), command.data, evaluation=command.eval, progress=True,
        name=command.model, command=command_line(), way={name: getattr(command, name) for name in WAY},
        **keywords_of(MergeSettings, command),
    )  # fmt: skip
    print_report(done.report, time.monotonic() - started)
    made_by = done.record.plan.made_by
    made_by = made_by.get("merge", made_by)
    share, over = f"{100 * made_by['tokens']:.1f} %", ", ".join(command.blocks) or "blocks"
    if made_by["schedule"] == "none":
        print("\nAll tokens run in every block: nothing was merged, and nothing measured to choose by.")
    else:
        print(f"\n{share} of the tokens run, on the mean over {over}; schedule: {made_by['schedule']}.")
    print(f"Saved to {done.folder}; report: {(done.folder / 'report.html').resolve()}")
    return 0

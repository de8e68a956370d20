"""``comcat score``: generated pictures measured against real ones and against their prompts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import counted
from ...scoring.settings import ScoreSettings
from ...settings import part_of
from ..common import Common, Positional, pick_device
from ..terminal import table


@dataclass(frozen=True, kw_only=True)
class Score(Common, ScoreSettings):
    """Score generated pictures: KID, FID, CLIP-I, CLIP-T and DINO."""

    pictures: Positional[str]
    """Generated pictures: a folder, parquet, .tar shards or hf:DATASET."""
    against: str | None = None
    """Real pictures of what they should show; only CLIP-T does without."""
    json: bool = False
    """Print JSON instead of a table."""


def run(command: Score) -> int:
    import torch

    from ...scoring import score

    settings = part_of(ScoreSettings, command)
    opening: dict[str, Any] = {
        "device": pick_device(command.device), "dtype": getattr(torch, command.dtype),
        "pretrained": command.pretrained, "seed": command.seed,
    }  # fmt: skip
    scores = score(command.pictures, command.against, settings, **opening, progress=not command.json)
    if command.json:
        print(json.dumps({"pictures": command.pictures, "against": command.against, **asdict(scores)}, indent=1))
        return 0
    rows = [
        [*_LABELS[metric], _number(metric, value), scores.extractors[metric]] for metric, value in scores.values.items()
    ]
    table(["metric", "better", "value", "network"], rows)
    of = f", {scores.reference_count} real ones" if command.against else ""
    print(f"\n{counted(scores.count, 'picture')}{of}.")
    for note in scores.notes:
        print(note)
    return 0


_LABELS = {
    "kid": ("KID × 1000", "lower"),
    "fid": ("FID", "lower"),
    "clip-i": ("CLIP-I", "higher"),
    "clip-t": ("CLIP-T", "higher"),
    "dino": ("DINO", "higher"),
}


def _number(metric: str, value: dict[str, Any]) -> str:
    if metric == "kid":
        return f"{1000 * value['mean']:.3f} ± {1000 * value['std']:.3f}"
    return f"{value['value']:.2f}" if metric == "fid" else f"{value['value']:.4f}"

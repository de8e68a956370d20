"""What a score is made of: its metrics and the networks behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import SettingsError
from ..settings import check_types, expect

Metric = Literal["kid", "fid", "clip-i", "clip-t", "dino"]
METRICS: tuple[Metric, ...] = ("kid", "fid", "clip-i", "clip-t", "dino")
INCEPTION = "timm:inception_v3.tf_in1k"


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What to measure, and with which networks."""

    metrics: tuple[Metric, ...] | None = None
    """Metrics to compute; left out, all that the pictures allow."""
    features: str = INCEPTION
    """Network whose features KID and FID compare: timm:NAME, hf:NAME or a folder."""
    clip: str = "hf:openai/clip-vit-base-patch32"
    """CLIP model for CLIP-I and CLIP-T: hf:NAME or a folder."""
    dino: str = "timm:vit_small_patch16_224.dino"
    """Network for DINO's similarity: timm:NAME, hf:NAME or a folder."""
    prompts: Path | None = None
    """Prompts for CLIP-T: one line for all pictures, or a line for each, in the order of their names; left out, those
    that comcat generate wrote into the pictures.
    """
    without: str | None = None
    """Word to take out of the prompts for CLIP-T, such as an identifier that CLIP cannot know."""
    batch_size: int = 32
    """Pictures a batch."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "batch_size", least=1)
        if self.metrics == ():
            raise SettingsError(f"got no metrics, expected some of {', '.join(METRICS)}")

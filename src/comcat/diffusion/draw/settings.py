"""What can be said about generating pictures."""

from __future__ import annotations

from dataclasses import dataclass

from ...settings import LARGEST_SEED, check_types, expect


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How pictures are generated."""

    count: int = 1
    """Pictures a prompt."""
    seed: int = 0
    """Seed; a picture depends on it, on its prompt and on its number, not on what else is generated."""
    steps: int | None = None
    """Steps of the sampler; left out, the pipeline's default."""
    guidance: float | None = None
    """Guidance scale; left out, the pipeline's default."""
    negative: str | None = None
    """What the pictures should not show."""
    size: int | None = None
    """Side in pixels; left out, the pipeline's default."""
    batch_size: int = 4
    """Pictures generated at once."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "count", "steps", "size", "batch_size", least=1)
        expect(self, "guidance")
        expect(self, "seed", least=0, most=LARGEST_SEED)

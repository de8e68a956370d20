"""What can be said about generating pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ...errors import SettingsError, nearest

T = TypeVar("T")


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
        for name in ("count", "steps", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}: got {value}, expected at least 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise SettingsError(f"guidance: got {self.guidance}, expected a finite number")


def expect(name: str, value: float, least: float, said: str) -> None:
    """Raise SettingsError unless a value is finite and at least ``least``; ``said`` is how the message says that."""
    if not least <= value < math.inf:
        raise SettingsError(f"{name}: got {value}, expected {said}")


def make_settings(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Settings of a kind from keywords; an unknown one is told with the nearest known."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}{nearest(name, known)}")
    return kind(**settings)

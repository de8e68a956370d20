"""How fast int8 is beside float32 in the same runtime."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..measure import benchmark, ratio
from .runtimes import RuntimeModel


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times as fast: median and quartiles of the rounds of one interleaved run."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = f"{self.median:.2f} times as fast as float32 here (quartiles {self.low:.2f} to {self.high:.2f})"
        return f"slower, {spread}," if self.high < 1 else spread


def compare_speed(plain: RuntimeModel, other: RuntimeModel, images: Tensor) -> Speed:
    """How many times as fast as ``plain`` is ``other`` on a batch."""
    timings = benchmark({"plain": plain, "other": other}, images, repeats=10, min_seconds=0.3)
    median, low, high = ratio(timings, "plain", "other")
    return Speed(median=median, low=low, high=high)

"""When channels are marked, how much is to be saved by then, and how fast gates close."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from .settings import PruneSettings


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, counted from 0."""

    settings: PruneSettings
    steps: int

    @cached_property
    def settled(self) -> int:
        """The step from which the marks stay as they are."""
        return max(1, int(self.settings.settle * self.steps))

    @cached_property
    def choices(self) -> tuple[int, ...]:
        """The steps before which channels are marked, the first of them 0."""
        count = self.settings.choices
        return tuple(sorted({i * self.settled // count for i in range(count)}))

    @cached_property
    def closing(self) -> int:
        """Steps that an open gate takes to close."""
        return max(1, int(self.settings.closing * self.steps))

    @property
    def shut(self) -> int:
        """The step after which all marked gates are shut, however far open they were."""
        return min(self.steps - 1, self.settled + self.closing)

    def reduce(self, step: int) -> float:
        """The share to save by the marks that are chosen before a step."""
        rising = max(1, math.ceil(self.settings.ramp * len(self.choices)))
        return self.settings.reduce * min(1.0, (self.choices.index(step) + 1) / rising)

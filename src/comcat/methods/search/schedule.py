"""When a search learns what: rounds of steps on the probabilities, and between two of them steps on the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .settings import SearchOptions

Phase = Literal["ranks", "weights"]


class Moment(NamedTuple):
    """Where a step lies: its round, its phase, and its number within that phase of that round, all from 0."""

    round: int
    phase: Phase
    number: int


@dataclass(frozen=True)
class Schedule:
    """The steps of a search, counted from 0."""

    settings: SearchOptions

    @property
    def steps(self) -> int:
        """How many there are. The last round ends with the probabilities."""
        s = self.settings
        return s.rounds * s.rank_steps + (s.rounds - 1) * s.weight_steps

    def at(self, step: int) -> Moment:
        """Where a step lies."""
        ranks, weights = self.settings.rank_steps, self.settings.weight_steps
        round_, number = divmod(step, ranks + weights)
        return Moment(round_, "ranks", number) if number < ranks else Moment(round_, "weights", number - ranks)

    def seen(self, step: int) -> int:
        """Steps of the same phase before a step, of all rounds."""
        moment = self.at(step)
        length = self.settings.rank_steps if moment.phase == "ranks" else self.settings.weight_steps
        return moment.round * length + moment.number

    def temperature(self, step: int) -> float:
        """Of the Gumbel-softmax at a step on the probabilities; it falls geometrically over these steps."""
        s = self.settings
        done = self.seen(step) / max(s.rounds * s.rank_steps - 1, 1)
        return s.temperature * (s.final_temperature / s.temperature) ** done

"""Stops a run whose loss is no longer a number, or explodes, and says where it began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import NumericsError

WINDOW, FACTOR = 50, 20.0
"""A loss counts as exploding if it is over FACTOR times the largest of the last WINDOW losses."""


class LossWatch:
    """Watches the losses of a run, which all processes see alike."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float, step: int, parameters: Iterable[tuple[str, nn.Parameter]], last_good: str) -> None:
        """Raises NumericsError on NaN, infinity or an exploding loss.

        The message names the step, the first parameter whose value or gradient is not finite, if one is, and ``last_good``,
        where to go on from.
        """
        exploding = len(self._recent) == WINDOW and abs(loss) > FACTOR * max(map(abs, self._recent))
        if math.isfinite(loss) and not exploding:
            self._recent.append(loss)
            return
        place = first_unsound(parameters)
        where = f", first seen in {place}" if place else ""
        usual = f" (the {WINDOW} before were at most {max(self._recent):.4g})" if exploding else ""
        raise NumericsError(f"the loss is {loss:.4g} at step {step}{usual}{where}; {last_good}")


def first_unsound(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter that holds NaN or infinity, itself or in its gradient; None if all are finite."""
    for name, parameter in parameters:
        if not torch.isfinite(parameter.detach()).all():
            return name
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return None

"""Stops a run whose loss is no longer a number, or explodes, and says where it began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError
from ..measure.running import call, tensors_in
from .processes import Processes

WINDOW, FACTOR = 50, 20.0
"""A loss counts as exploding if it is over FACTOR times the largest of the last WINDOW losses."""


class LossWatch:
    """Watches the losses of a run, which all processes see alike. ``last_good`` says where a user can go on from."""

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes, self.last_good = processes, "there is no checkpoint yet"
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(
        self,
        loss: float,
        step: int,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        replay: Callable[[], str | None] | None = None,
        advice: str = "",
    ) -> None:
        """Raises NumericsError, in all processes, on NaN, infinity or an exploding loss.

        The message names the step, where it was first seen, ``last_good``, and ``advice``. Where: the first parameter
        that is not finite; else what ``replay`` finds (:func:`first_unsound_output`); else the first parameter whose
        gradient is not finite.
        """
        exploding = len(self._recent) == WINDOW and abs(loss) > FACTOR * max(map(abs, self._recent))
        if math.isfinite(loss) and not exploding:
            self._recent.append(loss)
            return
        known = list(parameters)
        place = first_unsound(known)
        if place is None and replay is not None:
            place = replay()
        if place is None:
            place = _first_unsound_gradient(known)
        where = f", first seen in {place}" if place else ""
        usual = f" (the {WINDOW} before were at most {max(self._recent):.4g})" if exploding else ""
        more = f"; {advice}" if advice else ""
        error = NumericsError(f"the loss is {loss:.4g} at step {step}{usual}{where}; {self.last_good}{more}")
        if self.processes is not None:
            self.processes.agree(error)
        raise error


def first_unsound(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter that holds NaN or infinity; None if all are finite.

    Where models are sharded, all processes must call it.
    """
    return next((name for name, parameter in parameters if not _finite(parameter)), None)


def _first_unsound_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    found = (name for name, p in parameters if p.grad is not None and not _finite(p.grad))
    return next((f"the gradient of {name}" for name in found), None)


def first_unsound_output(model: nn.Module, images: Tensor) -> str | None:
    """The first module to compute within a model whose output on these pictures holds NaN or infinity."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(map(_finite, tensors_in(output))):
                found.append(name)

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(look(name)).remove)
        with suppress(ModelError):
            call(model, images)
    return found[0] if found else None


def _finite(tensor: Tensor) -> bool:
    tensor = tensor.detach()
    whole: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()  # of a tensor that is spread over processes
    return not whole.is_floating_point() or bool(torch.isfinite(whole).all())

"""A pipeline made ready for training, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from .families import Family


def check_whole(pipe: Any) -> None:
    """Raises ModelError if accelerate's hooks move the pipeline's parts about: training decides that itself."""
    moved = [n for n, m in pipe.components.items() if isinstance(m, nn.Module) and hasattr(m, "_hf_hook")]
    if moved:
        raise ModelError(
            f"the pipeline offloads {', '.join(moved)}; customizing keeps off the device what a step does not need by "
            "itself: load the pipeline without offloading"
        )


@contextmanager
def frozen(family: Family) -> Iterator[None]:
    """All parts in eval mode and without gradients of their own; what they were comes back."""
    modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
    parameters = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    modes = [(m, m.training) for m in modules]
    for module in modules:
        module.eval()
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in parameters:
            parameter.requires_grad_(before)
        for module, before in modes:
            module.train(before)


@contextmanager
def recomputing(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing in the denoiser, if wanted."""
    before = denoiser.is_gradient_checkpointing
    if wanted and not before:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted and not before:
            denoiser.disable_gradient_checkpointing()


class Idle:
    """The parts of a pipeline that a step does not need. They wait in the CPU's memory and come back to generate."""

    def __init__(self, family: Family, needed: Sequence[nn.Module]) -> None:
        parts = [m for m in family.pipe.components.values() if isinstance(m, nn.Module) and m not in needed]
        self.parts = [(m, next(m.parameters()).device) for m in parts if next(m.parameters(), None) is not None]

    def leave(self) -> None:
        for module, _ in self.parts:
            module.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def come(self) -> None:
        for module, device in self.parts:
            module.to(device)

    @contextmanager
    def away(self) -> Iterator[None]:
        self.leave()
        try:
            yield
        finally:
            self.come()

    @contextmanager
    def back(self) -> Iterator[None]:
        self.come()
        try:
            yield
        finally:
            self.leave()

"""Exchanging modules and attributes so that all of it can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..sites import Undo


def exchange(model: nn.Module, path: str, module: nn.Module) -> Undo:
    """Put ``module`` at ``path``; undoing puts back the very object that stood there, in the model's mode of that time."""
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    before = parent.get_submodule(name)
    module.train(before.training)
    setattr(parent, name, module)
    training = parent.training

    def undo() -> None:
        setattr(parent, name, before)
        if parent.training != training:
            before.train(parent.training)

    return undo


def set_attribute(module: nn.Module, name: str, value: Any) -> Undo:
    before = getattr(module, name)
    setattr(module, name, value)

    def undo() -> None:
        setattr(module, name, before)

    return undo


def drop_parameter(module: nn.Module, name: str) -> Undo:
    """Exchange a parameter for zeros that are not saved; the order of what remains does not change when undone."""
    parameters, buffers = module._parameters, module._buffers
    volatile = module._non_persistent_buffers_set
    zeros = torch.zeros_like(module.get_parameter(name), requires_grad=False)
    module._parameters = {k: v for k, v in parameters.items() if k != name}
    module._buffers = {**buffers, name: zeros}
    module._non_persistent_buffers_set = {*volatile, name}

    def undo() -> None:
        module._parameters, module._buffers, module._non_persistent_buffers_set = parameters, buffers, volatile

    return undo


def all_of(undos: list[Undo]) -> Undo:
    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo

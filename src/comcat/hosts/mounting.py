"""Exchanging modules and attributes so that all of it can be taken back.

What takes a module's place is as its predecessor was: frozen or not, training or not, with its hooks and its
attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..sites import Undo

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

Parts = Mapping[str, Iterable[nn.Parameter]]
"""By child of a new module: the old parameters that it stands for."""


def exchange(model: nn.Module, path: str, module: nn.Module, parts: Parts | None = None) -> Undo:
    """Put ``module`` at ``path``; undoing puts back the very object that stood there, in the model's mode of that time.

    ``parts`` says what the children of a module of several layers stand for. Without it, all of ``module`` stands for
    all that was there. What cannot be carried over is said in a warning.
    """
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    before = parent.get_submodule(name)
    for child, old in (parts or {"": before.parameters()}).items():
        _freeze_like(module.get_submodule(child), old, path)
    _carry_over(before, module, path)
    setattr(parent, name, module)
    training = parent.training
    shortcuts = _close_shortcuts(model, path)

    def undo() -> None:
        shortcuts()
        setattr(parent, name, before)
        if parent.training != training:
            before.train(parent.training)

    return undo


def _close_shortcuts(model: nn.Module, path: str) -> Undo:
    """Make torch's encoders around a path call their parts, where they would read the weights past them."""
    undos: list[Undo] = []
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        if isinstance(around, nn.TransformerEncoderLayer):
            undos.append(set_attribute(around, "activation_relu_or_gelu", 0))
        elif isinstance(around, nn.TransformerEncoder):
            undos.append(set_attribute(around, "use_nested_tensor", False))
    return all_of(undos)


def _freeze_like(module: nn.Module, old: Iterable[nn.Parameter], path: str) -> None:
    """Biases want gradients as the old ones did, weights likewise; a bias where none was, as the weights."""
    flags: dict[bool, set[bool]] = {True: set(), False: set()}  # by whether it is a bias
    for p in old:
        flags[p.ndim < 2].add(p.requires_grad)
    if any(len(found) > 1 for found in flags.values()):
        warnings.warn(f"{path} was frozen in part; what takes its place is trained as a whole", stacklevel=2)
    for p in module.parameters():
        p.requires_grad_(any((p.ndim < 2 and flags[True]) or flags[False]))


def _carry_over(before: nn.Module, after: nn.Module, path: str) -> None:
    """Training flags, hooks and plain attributes. Modules that both have in common are left alone."""
    common = set(before.modules())
    twins = {name.rpartition(".")[2]: m for name, m in after.named_modules() if m not in common}
    for module in twins.values():
        module.training = before.training
    for name, module in before.named_modules():
        if (twin := twins.get(name.rpartition(".")[2])) is not None and name:
            twin.training = module.training
    for name in _HOOKS:  # one object, so that the handles of the hooks reach it from here too
        setattr(after, name, getattr(before, name))
    for name, value in vars(before).items():
        if name not in vars(after) and not name.startswith("_") and not hasattr(type(after), name):
            vars(after)[name] = value
    remaining = common & set(after.modules())
    for name, module in before.named_modules():
        if name and module not in remaining and (module._forward_hooks or module._forward_pre_hooks):
            warnings.warn(f"{path}.{name} is no more, and its hooks with it; register them anew", stacklevel=2)


def drop_hooks(module: nn.Module) -> None:
    """Take every hook off a copy of a module: they belong to the one that it was copied from."""
    for part in module.modules():
        for name in _HOOKS:
            setattr(part, name, getattr(nn.Module(), name))


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

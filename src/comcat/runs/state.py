"""A model's and an optimizer's state as named tensors and plain data, however the model is spread over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU, in the main process; other processes may get nothing. All must call it."""
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, in every process. All must call it."""
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return state


def restore_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the state that :func:`model_state` gave; only the main process needs to have it.

    All must call it.
    """
    set_model_state_dict(model, dict(state), options=_from_main())


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, named ``exp_avg:blocks.0.mlp.fc1.weight``, where :func:`model_state` gives a model's."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    return {f"{key}:{name}": value for name, kept in state.get("state", {}).items() for key, value in kept.items()}


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's settings, with the names of the parameters that they hold for: plain data. All must call it."""
    state: Any = get_optimizer_state_dict(model, optimizer)  # each process's own part, which costs nothing
    return state.get("param_groups", [])


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Give an optimizer what :func:`optimizer_tensors` and :func:`optimizer_groups` gave, the main process at least.

    All must call it.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for label, value in tensors.items():
        key, _, name = label.partition(":")
        state.setdefault(name, {})[key] = value
    whole: Any = {"state": state, "param_groups": groups} if groups else {}
    set_optimizer_state_dict(model, optimizer, whole, options=_from_main())


def take_in(digest: Any, tensor: Tensor) -> None:
    """Update a digest by a tensor's shape, type and values."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for what a model computes: the names, shapes and values of its state, and what
    modules call their ``comcat_identity``, which no tensor says: on how many tokens blocks run.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} ".encode())
        take_in(digest, tensor)
    for name, module in model.named_modules():
        identity = getattr(module, "comcat_identity", None)
        if identity is not None:
            digest.update(f"{name} {identity}".encode())
    return digest.hexdigest()


def _from_main() -> StateDictOptions:
    spread = torch.distributed.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=spread)

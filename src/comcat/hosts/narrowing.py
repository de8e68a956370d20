"""Layers with fewer hidden units: rows of what makes them, columns of what reads them, and what acts on each alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Projection, is_pointwise, part

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_SIZES = ("num_features", "in_channels", "out_channels", "groups")


def acts_on_each(module: nn.Module, channels: int) -> bool:
    """Whether a module acts on each of so many channels alone: a batch norm, a convolution of single channels."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features == channels and module.track_running_stats
    if not isinstance(module, nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels == channels


def per_unit(module: nn.Module) -> tuple[int, int]:
    """Parameters, and multiply-accumulates a position, of one channel of a module that acts on each alone."""
    channels = max(int(getattr(module, name, 1)) for name in _SIZES)
    own = sum(p.numel() for p in module.parameters(recurse=False)) // channels
    taps = int(torch.Size(module.kernel_size).numel()) if isinstance(module, nn.Conv2d) else 0
    return own, taps


def reorder_(module: nn.Module, order: Tensor) -> None:
    """Number the channels of a module that acts on each alone anew, in place."""
    with torch.no_grad():
        for name in _PER_CHANNEL:
            held = getattr(module, name, None)
            if isinstance(held, Tensor):
                held.copy_(held[order.to(held.device)])


def narrowed(
    module: nn.Module, ups: Sequence[Projection], down: str, kept: Tensor, between: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Plain layers by path that hold the kept units alone, in the order of ``kept``; the weights are copies of rows."""
    rows: dict[str, list[Tensor]] = {}
    for up in ups:
        rows.setdefault(up.path, []).append(kept + up.start)
    made: dict[str, nn.Module] = {}
    for path, chosen in rows.items():
        dense, index = part(module, path), torch.cat(chosen)
        made[path] = layer_of(dense, dense.weight[index], None if dense.bias is None else dense.bias[index])
    for path in between:
        made[path] = _fewer_channels(part(module, path), kept)
    reader = part(module, down)
    made[down] = layer_of(reader, reader.weight[:, kept], reader.bias)
    return made


def layer_of(like: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """A linear layer, or a 1×1 convolution where ``like`` is one, with copies of a weight (out, in, ...) and a bias."""
    kind: Any = (lambda i, o, **k: nn.Conv2d(i, o, 1, **k)) if is_pointwise(like) else nn.Linear
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _fewer_channels(module: nn.Module, kept: Tensor) -> nn.Module:
    fewer: Any = copy.deepcopy(module)
    for name in _PER_CHANNEL:
        held = getattr(module, name, None)
        if isinstance(held, nn.Parameter):
            fewer._parameters[name] = nn.Parameter(held.detach()[kept].clone(), requires_grad=held.requires_grad)
        elif isinstance(held, Tensor):
            fewer._buffers[name] = held[kept].clone()
    for name in _SIZES:
        if hasattr(module, name):
            setattr(fewer, name, len(kept))
    return fewer

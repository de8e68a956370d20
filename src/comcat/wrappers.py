"""Wrappers that only run a model: the model inside them is what is read, changed and saved."""

from __future__ import annotations

from torch import nn


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and of data parallelism, or the model itself."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(inner := _inside(model, parallel), nn.Module):
        model = inner
    return model


def _inside(model: nn.Module, parallel: tuple[type[nn.Module], ...]) -> object:
    return model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)

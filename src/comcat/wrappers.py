"""Wrappers that only run a model: the model inside them is what is read, changed and saved."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .errors import ModelError, in_short


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile``, of data parallelism and of averaging, or the model itself.

    Raises ModelError for what is no module.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ModelError(
            f"got {in_short(model)} ({kind}), expected a module; comcat.load_model(name) gives one by its name"
        )
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while isinstance(inner := _inside(model, parallel), nn.Module):
        model = inner
    return model


def _inside(model: nn.Module, parallel: tuple[type[nn.Module], ...]) -> object:
    return model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)

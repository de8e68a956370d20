"""The type that weights are stored in: by default that of the source, so that a model does not grow on the disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import SettingsError, StoreError
from ..models.stored import precision_of


def precision_for(model: nn.Module, asked: torch.dtype | None) -> torch.dtype | None:
    """The type to store wider floating-point tensors in; None: all as they are.

    Args:
        asked: None for the type of the source's files where that is narrower and holds every value.

    Raises:
        SettingsError: for a type that is none of floating-point numbers.
        StoreError: for one that was asked for and is too small for a value; the message names the tensor.
    """
    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise SettingsError(f"dtype: got {asked!r}, expected a floating-point one such as torch.float16, or None")
    dtype = precision_of(model) if asked is None else asked
    if dtype is None:
        return None
    large = next((n for n, t in model.state_dict().items() if _is_wider(t, dtype) and _overflows(t, dtype)), None)
    if large is not None and asked is not None:
        raise StoreError(f"{large} holds values too large for {dtype}; save in another type")
    return dtype if large is None else None


def in_precision(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A state dict whose floating-point tensors of wider types are in this one; None changes nothing."""
    if dtype is None:
        return dict(state)
    return {name: t.detach().to(dtype) if _is_wider(t, dtype) else t for name, t in state.items()}


def round_(model: nn.Module, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """Round a model's weights to what will be stored of them, in place; they keep their type. Returns the type stored.

    What is measured afterwards is what the saved model gives. ``dtype`` as for :func:`comcat.save`.
    """
    dtype = precision_for(model, dtype)
    if dtype is not None:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if _is_wider(tensor, dtype):
                    tensor.copy_(tensor.to(dtype))
    return dtype


def _is_wider(tensor: object, dtype: torch.dtype) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    return not tensor.is_meta and bool((tensor.isfinite() & ~tensor.to(dtype).isfinite()).any())

"""Leaving ``torch.inference_mode``: what is made there can never be trained, and some of it not even copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run as under ``torch.no_grad`` where its caller is in inference mode, so that it makes ordinary
    tensors.
    """

    @functools.wraps(function)
    def ordinarily(*arguments: P.args, **keywords: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **keywords)
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **keywords)

    return ordinarily


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that shares no autograd state with ``tensor``, and may take part in a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()

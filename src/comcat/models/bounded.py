"""Building no more than a saved model can be: a file that somebody has changed may ask for any size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ModelError

_SLACK = 2**22
"""Numbers that a model may hold beside its parameters: buffers, tables of positions, and what makes them."""
_LARGEST = 10**8
"""No dimension and no count of layers of a real model is larger."""


def check_room(parameters: int) -> None:
    """Raise ModelError where float32 parameters take more than this machine's memory."""
    needed, memory = 4 * parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ModelError(
            f"{parameters:,} parameters take {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.1f} GiB"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ModelError for a whole number in a model's arguments that is the size of nothing. A base of rotation
    (``rope_theta``) is no size.
    """
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            check_arguments(value)
        sizes = value if isinstance(value, list | tuple) else (value,)
        if large := [v for v in sizes if isinstance(v, int) and v > _LARGEST and "theta" not in key]:
            raise ModelError(f"got {key} {large[0]:,}, expected at most {_LARGEST:,}")


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Within the block, what makes a model may take the memory of so many parameters, four times over.

    Raises ModelError before a tensor is made that goes beyond it.
    """
    with _Counted(4 * parameters + _SLACK, parameters):
        yield


class _Counted(TorchDispatchMode):
    """Counts the numbers of new tensors before they are made."""

    def __init__(self, most: int, parameters: int) -> None:
        super().__init__()
        self.left, self.parameters = most, parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _makes_memory(func) and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            new = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None})
            self.left -= new.numel()
            if self.left < 0:
                raise ModelError(
                    f"it is far larger than the {self.parameters:,} parameters that it is said to have: the tensor "
                    f"that goes beyond them is {tuple(new.shape)}"
                )
        return func(*args, **kwargs)


def _makes_memory(function: Any) -> bool:
    return any(argument.name == "device" for argument in function._schema.arguments)

"""A second device without one: tensors that say they are elsewhere, compute on the CPU, and refuse to be mixed.

What torch refuses between the CPU and a card is refused here too: two tensors of one or more dimensions on different
devices in one operation, an index that is elsewhere for a tensor that is not, reading such a tensor as a NumPy array.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
PLACE = "lazy"
"""Of the names of devices that torch knows, one that nothing here stands behind and that needs no driver."""
MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
"""Operations that take a tensor from one device to the other."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations whose indices may be on the CPU whatever their tensor is on."""


class Elsewhere(Tensor):
    """A tensor on the device that is not there; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=f"{PLACE}:0", requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatched(operation, args, kwargs or {})


def dispatched(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the values, after a look at where its tensors are."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if operation not in MOVES:
        _refuse_mixture(operation, args, tensors)
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == PLACE
        kwargs = {**kwargs, "device": "cpu"} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    if operation is aten.copy_.default:
        args[0].inner.copy_(_values(args[1])) if isinstance(args[0], Elsewhere) else args[0].copy_(_values(args[1]))
        return args[0]
    homes = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}
    result = operation(*tree_map(_values, args), **tree_map(_values, kwargs))
    if not there or operation is aten._local_scalar_dense.default:
        return result
    if operation._schema.is_mutable:
        for t in homes.values():
            if t.shape != t.inner.shape:
                raise NotImplementedError(f"{operation} changes the shape of a tensor in place")
    return tree_map(lambda t: homes.get(id(t), Elsewhere(t)) if isinstance(t, Tensor) else t, result)


def _values(t: Any) -> Any:
    return t.inner if isinstance(t, Elsewhere) else t


def _refuse_mixture(operation: Any, args: tuple, tensors: list[Tensor]) -> None:
    if operation in INDEXING and isinstance(args[0], Elsewhere):
        tensors = [args[0], *(t for t in args[2:] if isinstance(t, Tensor))]
    places = {isinstance(t, Elsewhere) for t in tensors if t.dim() or isinstance(t, Elsewhere)}
    if len(places) > 1:
        shapes = [(PLACE if isinstance(t, Elsewhere) else "cpu", tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, got {shapes}")


class _There(TorchDispatchMode):
    """Tensors that are made elsewhere are."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == PLACE:
            return dispatched(operation, args, kwargs)
        return operation(*args, **kwargs)


class _ListsAndArrays(TorchFunctionMode):
    """What goes from Python's lists to tensors and back, or to NumPy, below what dispatch can see."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if isinstance(args[0] if args else None, Elsewhere):
            if function is Tensor.tolist:
                return args[0].cpu().tolist()
            if function is Tensor.numpy:
                raise TypeError(f"can't convert a tensor on {PLACE} to numpy")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == PLACE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(PLACE)
        return function(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[str]:
    """Room in which a second device can be moved to and made on; gives its name."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's data cannot become another kind
    try:
        with _ListsAndArrays(), _There():
            yield PLACE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)

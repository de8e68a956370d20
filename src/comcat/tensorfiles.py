"""A model's state as one safetensors file, and back into a model of the same structure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import StoreError

_SHARED = "comcat_shared"


def write_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict. Tensors that are one in memory are written once, under the first name.

    Raises StoreError for what safetensors cannot hold, and where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    first: dict[tuple, str] = {}
    shared: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        _check(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and (twin := first.setdefault(key, name)) != name:
            shared[name] = twin
            continue
        written = tensor.detach().to("cpu").contiguous()
        storage = written.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != written.numel() * written.element_size():
            written = written.clone()  # a view of something else: safetensors wants each tensor's memory to itself
        storages.add(written.untyped_storage().data_ptr())
        tensors[name] = written
    metadata = {"format": "pt", **({_SHARED: json.dumps(shared)} if shared else {})}
    try:
        save_file(tensors, path, metadata=metadata)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"the weights cannot be written to {path.name}: {error}; what was saved before is unchanged"
        ) from error


def _check(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise StoreError(f"{name} cannot be saved: it is a {type(tensor).__name__}, expected a tensor")
    if tensor.is_meta:
        raise StoreError(f"{name} cannot be saved: it is on the meta device and has no values")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise StoreError(f"{name} cannot be saved: it is sparse or quantized, expected a dense tensor")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict that :func:`write_tensors` wrote. Raises StoreError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            shared = json.loads((file.metadata() or {}).get(_SHARED, "{}"))
        return {**tensors, **{name: tensors[twin] for name, twin in shared.items()}}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def unlike(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts differ in names and shapes, a phrase each."""
    found = [f"{k} is missing" for k in expected if k not in state]
    found += [f"{k} is unexpected" for k in state if k not in expected]
    pairs = ((k, tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state)
    return found + [f"{k} is {got}, expected {want}" for k, got, want in pairs if got != want]


def listed(phrases: list[str], most: int = 4) -> str:
    """The first few phrases, and how many more there are."""
    more = f"; and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + more


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, in the dtypes it has. Raises StoreError if it does not fit."""
    tensors = _upgraded(model, tensors)
    if found := unlike(tensors, model.state_dict()):
        raise StoreError(f"the weights do not fit: {listed(found)}")
    floating = Counter[torch.dtype]()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            floating[tensor.dtype] += tensor.numel()
    if floating:
        model.to(floating.most_common(1)[0][0])  # buffers that are not in the file go with the rest
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            if own.dtype != tensors[name].dtype:
                own.data = own.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors), strict=True)


def _upgraded(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that our modules have today; each knows what it was called before."""
    state = dict(tensors)
    for path, module in model.named_modules():
        if getattr(module, "comcat_module", False) and hasattr(module, "upgrade_state_dict"):
            module.upgrade_state_dict(state, f"{path}." if path else "")  # type: ignore[operator]
    return state

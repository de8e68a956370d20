"""How a model's weights are stored where they come from: their type and the size of the files."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import parsed
from .origins import remembered_origin

if TYPE_CHECKING:
    import torch
    from torch import nn

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating-point types by the names that safetensors gives them."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file raises that is missing, or not what it should be."""


def stored_in(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """How a folder stores weights: ``dtype`` (that of most numbers), ``bytes`` of the files, ``numbers`` in them.

    Empty where there are no safetensors, or they cannot be read: whoever loads them says what is wrong.
    """
    folder = Path(folder)
    try:
        if (folder / _WEIGHTS).is_file():
            return _stored_as([folder / _WEIGHTS])
        index = parsed((folder / _INDEX).read_text(encoding="utf-8"))
        return _stored_as([folder / name for name in sorted(set(index["weight_map"].values()))])
    except _UNREADABLE:
        return {}


def stored_in_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The same for a single file."""
    try:
        return _stored_as([Path(path)])
    except _UNREADABLE:
        return {}


def stored_on_hub(repo: str, *, revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The same for a repository of the hub, by its files in the local cache alone."""
    from huggingface_hub import try_to_load_from_cache

    for name in (_WEIGHTS, _INDEX):
        found = try_to_load_from_cache(repo, name, revision=revision, cache_dir=cache_dir)
        if isinstance(found, str):
            return stored_in(Path(found).parent)
    return {}


def precision_of(model: nn.Module) -> torch.dtype | None:
    """The type to store a model's weights in: that of its source where the model is in a wider one, else None."""
    import torch

    origin = remembered_origin(model)
    stored = getattr(torch, str(origin.stored.get("dtype")), None) if origin is not None else None
    own = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if not isinstance(stored, torch.dtype) or not own:
        return None
    return stored if stored.itemsize < Counter(own).most_common(1)[0][0].itemsize else None


def source_bytes(model: nn.Module) -> int | None:
    """The size of the files that a model's weights came from, where these hold the model and nothing else."""
    origin = remembered_origin(model)
    if origin is None or not origin.stored:
        return None
    own = sum(t.numel() for t in model.state_dict().values() if hasattr(t, "numel"))
    numbers, size = origin.stored.get("numbers"), origin.stored.get("bytes")
    matches = isinstance(numbers, int) and isinstance(size, int) and abs(numbers - own) <= own / 100
    return size if matches else None


def _stored_as(files: Iterable[Path]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    size = 0
    for path in files:
        size += path.stat().st_size
        for name, tensor in _header(path).items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    floating = {kind: count for kind, count in counts.items() if kind in _TYPES}
    if not floating:
        return {}
    most = max(floating, key=lambda kind: floating[kind])
    return {"dtype": _TYPES[most], "bytes": size, "numbers": sum(counts.values())}


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        return parsed(file.read(length))

"""What is shown to a model in a calibration: pictures, and what else its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import expect_batches, parts_of_batch
from ..errors import DataError
from ..grad_mode import ordinary
from ..measure.running import unwrap


@dataclass(frozen=True)
class Example:
    """Some pictures (batch, channels, height, width), and by name what else goes with them, the batch first.

    ``packed`` is the number of pictures where ``images`` are patches of several in one row, (patches, channels), whose
    grids go with them (Qwen2-VL); such a batch cannot be cut.
    """

    images: Tensor
    name: str | None = None
    others: Mapping[str, Any] | None = None
    packed: int = 0

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.packed or len(self.images)

    def first(self, count: int) -> Example:
        """The first pictures with what goes with them."""
        if count >= self.count or self.packed:
            return self
        cut = {n: v[:count] if _goes_along(v, self.count) else v for n, v in (self.others or {}).items()}
        return Example(self.images[:count], self.name, cut or None)

    def on(self, device: torch.device, dtype: torch.dtype, *, gradients: bool) -> Any:
        """As a model is called with it: pictures alone, or names and values. Pictures want gradients if asked."""
        images = ordinary(self.images).to(device=device, dtype=dtype)
        images = images.requires_grad_(True) if gradients else images
        if self.name is None:
            return images
        others = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in (self.others or {}).items()}
        return {self.name: images, **others}


def examples_of(
    model: nn.Module, batches: Iterable, limit: int | None = None, progress: bool = False
) -> Iterator[Example]:
    """What to show of some batches, at most so many pictures. Raises DataError for what is no batch of pictures."""
    from tqdm import tqdm

    if limit is not None and limit < 1:
        raise DataError(f"got a limit of {limit} pictures, expected at least 1")
    expect_batches(batches, "calibration")
    seen, known = 0, _parameters(model)
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    for batch in tqdm(batches, total=total, desc="calibrating", unit="batch", disable=not progress, leave=False):
        example = _example(batch, known)
        example = example if limit is None else example.first(limit - seen)
        seen += example.count
        yield example
        if limit is not None and seen >= limit:
            return


def pictures_of(batch: Any, where: str = "a calibration batch") -> Tensor:
    """The pictures (batch, channels, height, width) of a batch (:func:`~comcat.data.batches.parts_of_batch`).

    Raises DataError for anything else.
    """
    images, _ = parts_of_batch(batch[:1] if isinstance(batch, tuple | list) else batch, where)
    if images.ndim < 3 or not len(images):
        raise DataError(
            f"{where}: got a tensor of {tuple(images.shape)}, expected pictures (batch, channels, height, width)"
        )
    return images


def _example(batch: Any, known: frozenset[str]) -> Example:
    """A batch as the model takes it: a mapping by the names that its forward knows, anything else as pictures alone."""
    if isinstance(batch, Mapping):
        packed = packed_pictures(batch)
        least = 2 if packed else 3
        name = next((n for n in batch if n in known and _is_rows(batch[n], least)), None)
        others = {n: v for n, v in batch.items() if n in known and n != name and n not in ("labels", "label")}
        if name is not None and others:
            return Example(batch[name], name, others, packed)
    return Example(pictures_of(batch))


def packed_pictures(batch: Any) -> int:
    """How many pictures a mapping holds whose patches lie in one row, by their grids; 0 of any other batch.

    Pictures that differ in size count as one.
    """
    if not isinstance(batch, Mapping) or any(_is_rows(value, 3) for value in batch.values()):
        return 0
    grid = next((value for name, value in batch.items() if str(name).endswith(("grid_thw", "grid_hw"))), None)
    if not isinstance(grid, Tensor) or grid.ndim != 2 or not len(grid):
        return 0
    return len(grid) if bool((grid == grid[0]).all()) else 1


def _is_rows(value: Any, least: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= least


def _parameters(model: nn.Module) -> frozenset[str]:
    """The names that a model's forward takes."""
    try:
        return frozenset(inspect.signature(unwrap(model).forward).parameters)
    except (TypeError, ValueError):  # a forward without a Python signature
        return frozenset()


def _goes_along(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count

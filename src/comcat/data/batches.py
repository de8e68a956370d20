"""Batches of input tensors from a set of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, in_short, nearest
from .pictures import Pictures, whole_number
from .preprocess import Preprocess
from .reading import default_workers

_PICTURES = ("pixel_values", "pixel_values_videos", "image", "images", "img")
_LABELS = ("labels", "label")
"""Keys of a batch that is a mapping: transformers' own, then those that data sets of the hub use."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """An iterable of (images, labels); every iteration is a new pass in the same order. See :func:`batches`.

    For another order each epoch, iterate over ``dataclasses.replace(these, seed=epoch)``.
    """

    pictures: Pictures
    preprocess: Callable[[Image.Image], Tensor]
    batch_size: int = 32
    limit: int | None = None
    shuffle: bool = False
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, least=1)
        whole_number("seed", self.seed)
        for name in ("limit", "workers"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)

    @property
    def count(self) -> int | None:
        """How many pictures a pass gives if all can be read; None for streams of unknown length."""
        known = [number for number in (self.pictures.count, self.limit) if number is not None]
        return None if self.pictures.count is None else min(known)

    def __len__(self) -> int:
        """How many batches a pass gives if all pictures can be read. Raises ``TypeError`` where that is unknown."""
        if self.count is None:
            raise TypeError(f"{self.pictures.name} is a stream of unknown length; see .count")
        return -(-self.count // self.batch_size)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        workers = self.workers
        if workers is None:
            # Other functions may draw random numbers, whose order threads would make a matter of luck.
            workers = default_workers() if isinstance(self.preprocess, Preprocess) else 1
        read = self.pictures.read(self.preprocess, seed=self.seed if self.shuffle else None, workers=workers)
        with closing(read):  # ends its threads, however this pass ends
            pairs = islice(read, self.limit)
            while chunk := list(islice(pairs, self.batch_size)):
                images = [image for image, _ in chunk]
                if any(image.shape != images[0].shape for image in images):
                    shapes = sorted({tuple(image.shape) for image in images})
                    raise DataError(f"the pictures of a batch have different shapes after preprocessing: {shapes}")
                labels = torch.tensor([entry.label for _, entry in chunk]) if self.pictures.has_labels else None
                yield torch.stack(images), labels


def batches(
    pictures: Pictures,
    preprocess: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 32,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    workers: int | None = None,
) -> Batches:
    """Batches of the pictures, which can be iterated over again and again; ``len`` of them where it is known.

    Each is ``(images, labels)``: images (batch, channels, height, width) float32, labels (batch,) int64 or None where
    the pictures have none. The last batch may be short. ``limit`` ends a pass after that many pictures (the first ones;
    for a random sample use :meth:`Pictures.take`). ``shuffle`` reorders by ``seed``, the same way each pass (see
    :meth:`Pictures.read` for how thoroughly). ``preprocess`` is a :class:`Preprocess` or any function from a picture of
    mode ``"L"`` or ``"RGB"`` to a tensor, such as an augmentation; ``workers`` threads run it ahead, by default up to 8
    for a :class:`Preprocess` and one for others.

    Raises :class:`~comcat.errors.SettingsError` on numbers below 1, and while iterating what
    :class:`Pictures` raises.
    """
    return Batches(
        pictures=pictures,
        preprocess=preprocess,
        batch_size=batch_size,
        limit=limit,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
    )


def expect_batches(given: Any, what: str) -> None:
    """Raise DataError, with what to write instead, for what yields no batches: a place, one batch alone, a set of
    pictures.
    """
    if isinstance(given, str | bytes | os.PathLike | Pictures):
        way_out = "comcat.batches(comcat.open_pictures(place), comcat.preprocess_of(model)) makes them"
    elif isinstance(given, Tensor | Mapping):
        way_out = "put it into a list"
    elif not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
        way_out = "such as a list of tensors (batch, channels, height, width)"
    else:
        return
    got = f"{tuple(given.shape)}" if isinstance(given, Tensor) else in_short(given)
    raise DataError(f"{what}: got {got} ({type(given).__name__}), expected batches of pictures; {way_out}")


def parts_of_batch(batch: Any, where: str) -> tuple[Tensor, Any]:
    """The pictures and the labels (None: it has none) of a batch that a caller brings.

    A batch is a tensor of pictures, (pictures,), (pictures, labels), or a mapping: pictures under ``pixel_values``,
    ``pixel_values_videos``, ``image``, ``images`` or ``img``, labels under ``labels`` or ``label``. Raises
    :class:`~comcat.errors.DataError`, naming ``where``, on anything else, and on pictures that are no tensor of a
    floating type.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in _PICTURES if key in batch]
        if not keys:
            known = sorted(map(str, batch))
            hint = next((found for key in known if (found := nearest(key, _PICTURES))), "")
            raise DataError(f"{where}: got the keys {known}, expected pictures under {' or '.join(_PICTURES)}{hint}")
        pictures = batch[keys[0]]
        labels = next((batch[key] for key in _LABELS if batch.get(key) is not None), None)
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        pictures, labels = batch[0], batch[1] if len(batch) == 2 else None
    else:
        pictures, labels = batch, None
    if isinstance(pictures, Tensor) and pictures.is_floating_point():
        return pictures, labels
    if not isinstance(pictures, Tensor):
        got, way_out = type(pictures).__name__, "stack what preprocess_of(model) makes of each"
    else:
        got, way_out = f"{tuple(pictures.shape)} {pictures.dtype}", "preprocess_of(model) makes them of pictures"
    raise DataError(
        f"{where}: got {got}, expected pictures (batch, channels, height, width) of a floating type; {way_out}"
    )

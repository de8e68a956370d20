"""Batches of input tensors from a set of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .pictures import Pictures, default_workers, whole_number
from .preprocess import Preprocess


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

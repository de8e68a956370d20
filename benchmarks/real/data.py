"""Real pictures of two tasks, from parquet files; those to calibrate on and those that are judged are never the same.

CIFAR-10 and the nuclei have a training and a validation file. Pixels are kept as bytes, as the resizing left them.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from common import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from comcat.data import Preprocess, open_pictures

from .backbone import MEAN, STD
from .fetch import FetchError, cache, fill_whole

Part = Literal["calibration", "judged"]


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pictures of one size in memory.

    ``pixels`` is (pictures, 3, height, width) in bytes, ``labels`` (pictures,) classes or (pictures, height, width)
    masks, ``origins`` (pictures,) the number of the photograph that each was cut out of.
    """

    pixels: Tensor
    labels: Tensor
    origins: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised pictures (batch, 3, height, width) float32 and their labels."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        for images, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield (images / 255 - mean) / std, labels

    def first(self, count: int | None) -> Pixels:
        """The first ``count`` pictures; all for None."""
        return Pixels(**{f.name: getattr(self, f.name)[:count] for f in fields(self)})


def cifar10(part: Part, count: int | None = None, seed: int = 0) -> Pixels:
    """CIFAR-10 at 112 pixels: the first ``count`` validation pictures, or ``count`` training pictures by seed."""
    file = data_file("cifar10", "train" if part == "calibration" else "validation")
    pictures = open_pictures(file)
    if part == "calibration" and count is not None:
        pictures = pictures.take(count, seed)

    def read() -> Pixels:
        fit = squares(112).fit
        found = [(as_bytes(image), entry.label) for image, entry in islice(pictures.read(fit, workers=2), count)]
        labels = torch.tensor([label for _, label in found])
        return Pixels(pixels=torch.stack([p for p, _ in found]), labels=labels, origins=torch.arange(len(found)))

    return kept_pixels(f"cifar10-{part}-{count}-{seed if part == 'calibration' else 0}-{_mark(file)}", read)


def nuclei(part: Part, count: int | None = None, seed: int = 0) -> Pixels:
    """Microscopy at 392 pixels, masks of 256: the first ``count`` to judge, or ``count`` to calibrate on by seed."""
    import pyarrow.parquet as parquet

    file = data_file("nuclei", "train" if part == "calibration" else "validation")

    def read() -> Pixels:
        rows = parquet.read_table(file, columns=["image", "mask"]).to_pylist()
        if part == "calibration":
            random.Random(seed).shuffle(rows)
        rows = rows[:count]
        fit = squares(392).fit
        pixels = torch.stack([as_bytes(fit(opened(row["image"]["bytes"]))) for row in rows])
        masks = torch.stack([torch.from_numpy(np.array(opened(row["mask"]["bytes"]).convert("L")) > 0) for row in rows])
        return Pixels(pixels=pixels, labels=masks, origins=torch.arange(len(rows)))

    return kept_pixels(f"nuclei-{part}-{count}-{seed if part == 'calibration' else 0}-{_mark(file)}", read)


def data_file(folder: str, part: str) -> Path:
    """A parquet file of the data that is kept beside the repository. Raises :class:`FetchError` where it is missing."""
    path = SHARED / "data" / folder / f"{part}.parquet"
    if not path.is_file():
        raise FetchError(f"the {folder} pictures are missing: expected {path}")
    return path


def squares(size: int) -> Preprocess:
    """Pictures resized so that the shorter side fits, and the middle square of them."""
    return Preprocess(size=(size, size), mean=MEAN, std=STD)


def opened(content: bytes) -> Image.Image:
    """A picture from the bytes of its file."""
    return Image.open(io.BytesIO(content))


def as_bytes(image: Image.Image) -> Tensor:
    """The pixels of an RGB picture, (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _mark(file: Path) -> str:
    """A word that changes with a file's size."""
    return hashlib.sha256(f"{file.name} {file.stat().st_size}".encode()).hexdigest()[:8]


def kept_pixels(name: str, read: Callable[[], Pixels]) -> Pixels:
    """Pixels from the cache folder, or read now and kept there."""
    folder = cache("pixels", name)
    file = folder / "pixels.safetensors"
    if not file.is_file():
        fill_whole(folder, lambda new: save_file(_tensors(read()), new / file.name))
    return Pixels(**load_file(file))


def _tensors(pixels: Pixels) -> dict[str, Tensor]:
    return {f.name: getattr(pixels, f.name).contiguous() for f in fields(pixels)}

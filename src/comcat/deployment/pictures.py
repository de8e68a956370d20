"""The pictures that an export is compared and calibrated on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data import Pictures, Preprocess, batches
from ..data.batches import parts_of_batch
from ..data.opening import find_pictures
from ..errors import DataError, ExportError, ModelError
from ..models import preprocess_of

Source = Pictures | str | os.PathLike[str] | Iterable[Any] | None
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Material:
    """Pictures as the model takes them.

    Attributes:
        images: (pictures, channels, height, width) float32. preprocess: how they were made, if it is known.
        source: in words, where they come from. real: False for generated ones.
    """

    images: Tensor
    preprocess: Preprocess | None
    source: str
    real: bool

    def batches(self, size: int | None) -> list[Tensor]:
        """All pictures in batches of a size, which leave out a rest; where any will do, one alone and then more."""
        if size is not None:
            return [batch for batch in self.images.split(size) if len(batch) == size]
        return [self.images[:1], *self.images[1:].split(BATCH)] if len(self.images) > 1 else [self.images]

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures as pixels, uint8 (batch, height, width, channels): what :meth:`Preprocess.fit` gives."""
        assert self.preprocess is not None
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def gather(model: nn.Module, data: Source, preprocess: Preprocess | None, *, count: int, seed: int) -> Material:
    """At most ``count`` pictures from ``data``: what :func:`comcat.open_pictures` takes, or batches of tensors.

    Without data they are generated. Raises DataError for data without pictures, ExportError where nothing says how
    large the model's pictures are.
    """
    prepared = preprocess or _known(model)
    if data is None or isinstance(data, str | os.PathLike | Pictures):
        if prepared is None:
            raise ExportError(
                f"nothing says how {type(model).__name__} wants its pictures: "
                "give preprocess=comcat.data.Preprocess(…), or batches of tensors as data"
            )
        if data is None:
            images = torch.stack([prepared(p) for p in generated(prepared, count, seed)])
            return Material(images=images, preprocess=prepared, source="generated pictures", real=False)
        pictures = data if isinstance(data, Pictures) else find_pictures(data)
        drawn = pictures.take(min(count, pictures.count or count), seed)
        tensors = [images for images, _ in batches(drawn, prepared, batch_size=BATCH)]
        source = f"pictures of {pictures.name}"
    else:
        tensors, source = _tensors(data, count), "pictures that were given"
    if not tensors:
        raise DataError("no pictures to compare on: the data are empty")
    images = torch.cat(tensors)[:count]
    return Material(images=images, preprocess=prepared, source=source, real=True)


def _known(model: nn.Module) -> Preprocess | None:
    record = getattr(model, "comcat_record", None)
    if record is not None and record.preprocess:
        return Preprocess.from_dict(record.preprocess)
    try:
        return preprocess_of(model)
    except ModelError:
        return None


def _tensors(data: Iterable[Any], count: int) -> list[Tensor]:
    data = [data] if isinstance(data, Tensor) else data
    found: list[Tensor] = []
    for number, batch in enumerate(islice(data, count)):
        images, _ = parts_of_batch(batch, f"batch {number}")
        if images.dim() != 4:
            raise DataError(
                f"batch {number}: got {tuple(images.shape)}, expected pictures (batch, channels, height, width)"
            )
        found.append(images.detach().float().cpu())
        if sum(map(len, found)) >= count:
            break
    return found


def generated(preprocess: Preprocess, count: int, seed: int) -> list[Image.Image]:
    """Noise whose amplitude falls as 1/f, as it does in photographs, with colours that go together."""
    height, width = preprocess.size
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    pictures = []
    for _ in range(count):
        noise = np.fft.fft2(random.standard_normal((4, height, width))) / frequency
        grey, *colours = np.fft.ifft2(noise).real
        planes = np.stack([grey + 0.5 * colour for colour in colours], axis=-1)  # (height, width, 3)
        planes = (planes - planes.mean()) / max(planes.std(), 1e-9)
        pictures.append(Image.fromarray((255 * np.clip(0.5 + 0.25 * planes, 0, 1)).astype(np.uint8)))
    return pictures

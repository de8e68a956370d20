"""How pictures become a model's input tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, SettingsError, counted, nearest
from .decoding import plain

_INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}
_MOST_PIXELS = 10**8
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resizing, cropping and normalising as a model's data configuration says: in timm's terms, bit for bit.

    A picture is resized to ``size / crop_pct``, rounded down, and ``size`` is cut out of its middle. ``crop_mode`` says
    how it is resized: ``"center"`` so that its shorter side fits (the rest is cut off), ``"squash"`` so that both
    sides fit, at the cost of its proportions, ``"border"`` so that its longer side fits (the rest is filled with
    ``mean``). Pixels in 0…1 are then normalised to (x − mean) / std, channel by channel.

    ``size`` is (height, width) in pixels; ``channels`` is 3, or 1 for models of grey pictures; ``mean`` and ``std``
    have one value a channel, or one for all. Raises :class:`~comcat.errors.SettingsError` on values out of range.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    channels: int = 3

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise SettingsError(f"channels: got {self.channels!r}, expected 3 (colour) or 1 (grey)")
        size = _numbers("size", self.size)
        if len(size) != 2 or any(side < 1 or side != int(side) for side in size):
            raise SettingsError(f"size: got {self.size!r}, expected (height, width), both whole numbers from 1")
        if size[0] * size[1] > _MOST_PIXELS:
            raise SettingsError(f"size: got {self.size!r}, expected at most {_MOST_PIXELS:,} pixels")
        object.__setattr__(self, "size", tuple(int(side) for side in size))
        for name in ("mean", "std"):
            values = _numbers(name, getattr(self, name))
            if len(values) not in (1, self.channels):
                raise SettingsError(
                    f"{name}: got {counted(len(values), 'value')}, expected one for each of {self.channels} channels"
                )
            object.__setattr__(self, name, values if len(values) == self.channels else values * self.channels)
        if min(self.std) <= 0:
            raise SettingsError(f"std: got {self.std!r}, expected values above 0")
        _known("interpolation", self.interpolation, _INTERPOLATIONS)
        _known("crop_mode", self.crop_mode, _CROP_MODES)
        if isinstance(self.crop_pct, bool) or not isinstance(self.crop_pct, int | float) or not 0 < self.crop_pct <= 1:
            raise SettingsError(f"crop_pct: got {self.crop_pct!r}, expected a number above 0, at most 1")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them: tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`. Raises ``SettingsError`` on unknown, missing or wrong settings."""
        known = [field.name for field in fields(cls)]
        for name in values:
            _known("setting of the preprocessing", name, known)
        missing = [name for name in ("size", "mean", "std") if name not in values]
        if missing:
            raise SettingsError(f"the preprocessing lacks {', '.join(missing)}; got {', '.join(values) or 'nothing'}")
        return cls(**values)

    def __call__(self, image: Image.Image) -> Tensor:
        """The model's input for one picture, (channels, height, width) float32.

        Any of Pillow's modes will do. Raises :class:`~comcat.errors.DataError` on floating-point and CIELAB pixels, and
        on pictures so long and thin that they would take over 10⁸ pixels when resized.
        """
        return self.tensor(self.fit(image))

    def blank(self, like: Tensor | None = None) -> Tensor:
        """One picture of zeros, (1, channels, height, width), of the type and on the device of ``like``."""
        blank = torch.zeros(1, self.channels, *self.size)
        return blank if like is None else blank.to(like)

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture resized and cropped, in the model's colours (mode ``"RGB"`` or ``"L"``). Raises as it does."""
        try:
            image = plain(image).convert("RGB" if self.channels == 3 else "L")
        except ValueError as error:
            raise DataError(f"a picture of mode {image.mode!r} cannot be converted: {error}") from error
        height, width = self._resized(image.height, image.width)
        if height * width > _MOST_PIXELS:
            raise DataError(
                f"a picture of {image.width}×{image.height} pixels is too long and thin for the model's input"
            )
        image = image.resize((width, height), _INTERPOLATIONS[self.interpolation])
        return self._cut(image)

    def tensor(self, image: Image.Image) -> Tensor:
        """A fitted picture's pixels, normalised: (channels, height, width) float32."""
        # numpy, because torch would start threads of its own in each of the threads that prepare pictures
        pixels = np.asarray(image).reshape(*self.size, self.channels).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= np.array(self.mean, dtype=np.float32)[:, None, None]
        pixels /= np.array(self.std, dtype=np.float32)[:, None, None]
        return torch.from_numpy(pixels)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture before ``size`` is cut out of it, rounded as torchvision and timm do."""
        target_height, target_width = (math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            return target_height, target_width
        if self.crop_mode == "center" and target_height == target_width:
            short, long = min(height, width), max(height, width)
            other = int(target_height * long / short)
            return (target_height, other) if height <= width else (other, target_width)
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)

    def _cut(self, image: Image.Image) -> Image.Image:
        """The middle ``size`` of a picture; what lies outside it is the mean (``"border"``) or black."""
        height, width = self.size
        if image.size == (width, height):
            return image
        fill = tuple(round(255 * value) for value in self.mean) if self.crop_mode == "border" else (0,) * self.channels
        canvas = Image.new(image.mode, (width, height), fill if self.channels == 3 else fill[0])
        canvas.paste(image, (_offset(width, image.width), _offset(height, image.height)))
        return canvas


def _offset(outer: int, inner: int) -> int:
    return (outer - inner) // 2 if outer >= inner else -round((inner - outer) / 2)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise SettingsError(f"{name}: got {values!r}, expected a tuple of numbers") from None
    if not all(math.isfinite(number) for number in numbers):
        raise SettingsError(f"{name}: got {values!r}, expected finite numbers")
    return numbers


def _known(what: str, value: object, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise SettingsError(f"{what}: got {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}")

"""Random changes to training pictures, with timm's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from ..data import Preprocess
from ..errors import SettingsError
from ..models.failures import required
from .settings import TuneSettings

SMALL = 64
"""Up to so many pixels a side, a picture is small."""


class Augment:
    """From a picture to a training input (channels, height, width) float32.

    In this order: crop, mirror, RandAugment, normalise, erase.

    Size, interpolation and normalisation are the model's own (``preprocess``). Pictures are augmented in colour, and
    become grey afterwards for a model of one channel. Everything random is drawn from the generators of Python, numpy
    and torch.

    Raises SettingsError where timm does not understand ``rand_augment``.
    """

    def __init__(self, preprocess: Preprocess, settings: TuneSettings) -> None:
        required("timm")
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms import RandomResizedCropAndInterpolation
        from torchvision.transforms import RandomHorizontalFlip

        self.preprocess = preprocess
        self.crop = None
        if (scale := crop_scale(settings, preprocess)) is not None:
            self.crop = RandomResizedCropAndInterpolation(
                preprocess.size, scale=scale, interpolation=preprocess.interpolation
            )
        self.flip = RandomHorizontalFlip(settings.flip)
        self.colours = None if settings.rand_augment is None else _rand_augment(settings.rand_augment, preprocess)
        self.erase = RandomErasing(settings.erase, mode="pixel", device="cpu") if settings.erase else None

    def __call__(self, image: Image.Image) -> Tensor:
        fitted = self.crop(image.convert("RGB")) if self.crop else self.preprocess.fit(image).convert("RGB")
        fitted = self.flip(fitted)
        if self.colours is not None:
            fitted = self.colours(fitted)
        if self.preprocess.channels == 1:
            fitted = fitted.convert("L")
        x = self.preprocess.tensor(fitted)
        return x if self.erase is None else self.erase(x)


def crop_scale(settings: TuneSettings, preprocess: Preprocess) -> tuple[float, float] | None:
    """What share of a picture's area random crops show: little of a small picture says nothing of what is in it."""
    if settings.crop_scale != "auto":
        return settings.crop_scale
    return (0.6, 1.0) if max(preprocess.size) <= SMALL else (0.08, 1.0)


def _rand_augment(words: str, preprocess: Preprocess) -> Any:
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    mean = preprocess.mean * (3 if preprocess.channels == 1 else 1)
    options = {
        "translate_const": int(0.45 * min(preprocess.size)),  # as timm does
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": str_to_pil_interp(preprocess.interpolation),
    }
    try:
        transform = rand_augment_transform(words, options)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"rand_augment: timm does not understand {words!r}, expected such as rand-m9-mstd0.5-inc1"
        ) from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_bits, operation.level_fn)
    return transform


def _bits(bits: Callable[..., tuple[int]], level: float, options: dict[str, Any]) -> tuple[int]:
    """Bits that Posterize keeps: one at least. timm's strongest asks for none: black, an error in Pillow 13."""
    return (max(1, bits(level, options)[0]),)

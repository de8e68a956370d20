"""Pictures as latents: framed, encoded once, kept."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import NumericsError
from ...runs.seeding import derive_seed
from ..pipeline.families import Conditions, Family, check_side
from ..pipeline.offloading import computing_device

LEAST_SHOWN = 0.002
"""Of a crop: where a mask shows less of it, there is nothing to learn from."""


@dataclass(frozen=True)
class Frame:
    """A square cut from a picture: pixels (3, side, side) in −1…1, where it lay, and its mask (1, side, side) in
    0…1.
    """

    pixels: Tensor
    size: tuple[int, int]
    corner: tuple[int, int]
    mask: Tensor | None = None

    def mirrored(self) -> Frame:
        mask = None if self.mask is None else self.mask.flip(-1)
        return replace(self, pixels=self.pixels.flip(-1), mask=mask)


def frames(
    image: Image.Image, side: int, *, crops: int, flip: bool, seed: int, mask: Image.Image | None = None
) -> Iterator[Frame]:
    """The squares that training shows of a picture: its shorter side becomes ``side`` pixels, the rest is cropped.

    One crop is the centre's; of several, each lies at random. A square picture has one. ``flip`` adds each one's mirror
    image. Crops in which a ``mask`` (of the picture's size) shows nothing are left out.
    """
    scale = side / min(image.size)
    width, height = (max(side, round(n * scale)) for n in image.size)
    size = (width, height)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    shown = None if mask is None else mask.resize(size, Image.Resampling.LANCZOS)
    chance = random.Random(seed)
    corners = {(chance.randint(0, height - side), chance.randint(0, width - side)) for _ in range(crops)}
    for top, left in sorted(corners) if crops > 1 else [((height - side) // 2, (width - side) // 2)]:
        box = (left, top, left + side, top + side)
        pixels = torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1).float() / 127.5 - 1  # (3, side, side)
        within = None if shown is None else torch.from_numpy(np.array(shown.crop(box)))[None].float() / 255
        if within is not None and within.mean() < LEAST_SHOWN:
            continue
        frame = Frame(pixels, (image.height, image.width), (top, left), within)
        yield frame
        if flip:
            yield frame.mirrored()


def all_frames(
    images: Iterable[Image.Image], side: int, *, crops: int, flip: bool, seed: int, masks: Sequence[Image.Image] | None
) -> Iterator[Iterator[Frame]]:
    """The squares of each picture."""
    for number, image in enumerate(images):
        mask = None if masks is None else masks[number]
        yield frames(image, side, crops=crops, flip=flip, seed=derive_seed(seed, "crops", number), mask=mask)


def check_resolution(side: int | None, family: Family) -> int:
    """The side of the squares to train on; None: what the pipeline makes by itself. Raises SettingsError if it does not
    fit.
    """
    if side is None:
        return family.resolution()
    check_side("resolution", side, family)
    return side


@dataclass(frozen=True)
class Latents:
    """What the VAE makes of all frames of some pictures: a Gaussian each, (frames, channels, height, width).

    Drawing from it anew at every step costs nothing and is what encoding anew would do.
    """

    mean: Tensor
    std: Tensor
    framing: Conditions
    frames_of: list[list[int]]
    """For each picture, its frames."""
    masks: Tensor
    """What counts of each place of the latents, (frames, 1, height, width), 1 on the mean of a frame."""

    def draw(self, indices: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Conditions]:
        """Latents of the frames ``indices``, (len(indices), channels, height, width), with their framing."""
        index = torch.tensor(indices, device=self.mean.device)
        noise = torch.randn((len(indices), *self.mean.shape[1:]), generator=generator)
        drawn = self.mean[index] + self.std[index] * noise.to(self.mean)
        return drawn, {name: value[index] for name, value in self.framing.items()}


def encode(
    family: Family,
    images: Iterable[Image.Image],
    side: int,
    *,
    crops: int,
    flip: bool,
    seed: int,
    masks: Sequence[Image.Image] | None = None,
) -> Latents:
    """The latents of all frames of all pictures, encoded one by one on the pipeline's device, in float32."""
    means, stds, framings, frames_of, counted = [], [], [], [], []
    for number, of in enumerate(all_frames(images, side, crops=crops, flip=flip, seed=seed, masks=masks)):
        own = []
        for frame in of:
            mean, std = encode_pixels(family, frame.pixels[None])
            if not (mean.isfinite().all() and std.isfinite().all()):
                vae = family.pipe.vae
                kind = str(vae.dtype).removeprefix("torch.")
                raise NumericsError(
                    f"the pipeline's VAE ({type(vae).__name__}, {kind}) makes NaN or infinity of picture {number}; its "
                    f"weights may be damaged{_in_more_bits(vae.dtype)}"
                )
            own.append(len(means))
            means.append(mean)
            stds.append(std)
            framings.append(family.framing(frame.size, frame.corner, side))
            counted.append(_at_latents(frame.mask, mean))
        frames_of.append(own)
    framing = {name: torch.cat([f[name] for f in framings]).to(means[0].device) for name in framings[0]}
    return Latents(torch.cat(means), torch.cat(stds), framing, frames_of, torch.cat(counted))


def _at_latents(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask (1, side, side) on the grid of latents (1, channels, rows, columns), 1 on the mean: (1, 1, rows,
    columns).
    """
    if mask is None:
        return like.new_ones(1, 1, *like.shape[-2:])
    share = nn.functional.adaptive_avg_pool2d(mask[None].to(like), (like.shape[-2], like.shape[-1]))
    return share / share.mean()


def _in_more_bits(dtype: torch.dtype) -> str:
    return "; in float16 some overflow: load the pipeline in bfloat16 or float32" if dtype == torch.float16 else ""


@torch.no_grad()
def encode_pixels(family: Family, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, scaled as the denoiser sees them, of pixels (batch, 3, side,
    side).
    """
    vae = family.pipe.vae
    with full_precision_where_needed(vae):
        encoded = vae.encode(family.to_vae(pixels).to(computing_device(vae), vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    else:  # the tiny autoencoders and deep compression ones are not variational
        mean = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
        std = torch.zeros_like(mean)
    return family.scaled(mean, std)


@contextmanager
def full_precision_where_needed(vae: Any) -> Iterator[None]:
    """float32 for a VAE in half precision whose config says that it overflows there (``force_upcast``; SDXL's)."""
    before = vae.dtype
    if not (getattr(vae.config, "force_upcast", False) and before == torch.float16):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(before)


class Rotation:
    """Which picture comes at which place: all in random order, then all in another order, and so on, without any
    state.
    """

    def __init__(self, frames_of: list[list[int]], seed: int, what: str) -> None:
        self.frames_of, self.seed, self.what = frames_of, seed, what

    def frame(self, place: int, generator: torch.Generator) -> int:
        """The frame at a place (0, 1, …) of the run: the picture is fixed by the order, its frame drawn evenly."""
        count = len(self.frames_of)
        order = list(range(count))
        random.Random(derive_seed(self.seed, self.what, place // count)).shuffle(order)
        own = self.frames_of[order[place % count]]
        return own[int(torch.randint(len(own), (1,), generator=generator))]

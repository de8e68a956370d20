"""Pictures as latents: framed, encoded once, kept."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import NumericsError
from ...runs.seeding import derive_seed
from ..pipeline.families import Conditions, Family, check_side


@dataclass(frozen=True)
class Frame:
    """A square cut from a picture: pixels (3, side, side) in −1…1, and where it lay."""

    pixels: Tensor
    size: tuple[int, int]
    corner: tuple[int, int]


def frames(image: Image.Image, side: int, *, crops: int, flip: bool, seed: int) -> Iterator[Frame]:
    """The squares that training shows of a picture: its shorter side becomes ``side`` pixels, the rest is cropped.

    One crop is the centre's; of several, each lies at random. A square picture has one. ``flip`` adds each one's mirror
    image.
    """
    scale = side / min(image.size)
    width, height = (max(side, round(n * scale)) for n in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    chance = random.Random(seed)
    corners = {(chance.randint(0, height - side), chance.randint(0, width - side)) for _ in range(crops)}
    for top, left in sorted(corners) if crops > 1 else [((height - side) // 2, (width - side) // 2)]:
        square = resized.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1  # (3, side, side)
        yield Frame(pixels, (image.height, image.width), (top, left))
        if flip:
            yield Frame(pixels.flip(-1), (image.height, image.width), (top, left))


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

    def draw(self, indices: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Conditions]:
        """Latents of the frames ``indices``, (len(indices), channels, height, width), with their framing."""
        index = torch.tensor(indices, device=self.mean.device)
        noise = torch.randn((len(indices), *self.mean.shape[1:]), generator=generator)
        drawn = self.mean[index] + self.std[index] * noise.to(self.mean)
        return drawn, {name: value[index] for name, value in self.framing.items()}


def encode(family: Family, images: Iterable[Image.Image], side: int, *, crops: int, flip: bool, seed: int) -> Latents:
    """The latents of all frames of all pictures, encoded one by one on the pipeline's device, in float32."""
    means, stds, framings, frames_of = [], [], [], []
    for number, image in enumerate(images):
        of = frames(image, side, crops=crops, flip=flip, seed=derive_seed(seed, "crops", number))
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
        frames_of.append(own)
    framing = {name: torch.cat([f[name] for f in framings]).to(means[0].device) for name in framings[0]}
    return Latents(torch.cat(means), torch.cat(stds), framing, frames_of)


def _in_more_bits(dtype: torch.dtype) -> str:
    return "; in float16 some overflow: load the pipeline in bfloat16 or float32" if dtype == torch.float16 else ""


@torch.no_grad()
def encode_pixels(family: Family, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, scaled as the denoiser sees them, of pixels (batch, 3, side,
    side).
    """
    vae = family.pipe.vae
    with full_precision_where_needed(vae):
        encoded = vae.encode(family.to_vae(pixels).to(vae.device, vae.dtype))
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

"""Real pictures for the three tasks; those to calibrate on and those that are judged are never the same.

CIFAR-10 and the nuclei come as parquet files with a training and a validation part. Photographs come out of public packages and are
split by photograph, so that no crop of a judged one is calibrated on. Pixels are kept as bytes, as the resizing left them.
"""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
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
from .fetch import FetchError, cache, debian, fill_whole, wheel

Part = Literal["calibration", "judged"]
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "scikit-image": tuple(
        f"skimage/data/{name}"
        for name in (
            "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "moon.png", "motorcycle_left.png", "retina.jpg",
            "rocket.jpg",
        )
    ),
    "mate-backgrounds": tuple(
        f"usr/share/backgrounds/mate/nature/{name}.jpg"
        for name in (
            "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings", "Wood",
            "YellowFlower",
        )
    ),
    "lomiri-wallpapers-16.04": tuple(
        f"usr/share/backgrounds/{name}.jpg"
        for name in (
            "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
            "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich", "friends_by_Aitzol_Berasategi",
            "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi",
            "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi",
        )
    ),
    "lomiri-wallpapers-20.04": ("usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",),
    "plasma-workspace-wallpapers": tuple(
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in (
            "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite", "OneStandsOut",
            "Path", "summer_1am",
        )
    ),
}  # fmt: skip
"""Photographs by package: free licences all (see each package's copyright file). Debian's gnome-backgrounds holds drawings alone today."""
SCIKIT_IMAGE = "0.26.0"
FEWEST_PHOTOGRAPHS, CROPS = 15, 4


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pictures of one size in memory.

    ``pixels`` is (pictures, 3, height, width) in bytes, ``labels`` (pictures,) classes or (pictures, height, width) masks,
    ``origins`` (pictures,) the number of the photograph that each was cut out of.
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
    """CIFAR-10 at 112 pixels: the first ``count`` of the validation file, or ``count`` training pictures drawn by seed."""
    file = data_file("cifar10", "train" if part == "calibration" else "validation")
    pictures = open_pictures(file)
    if part == "calibration" and count is not None:
        pictures = pictures.take(count, seed)

    def read() -> Pixels:
        fit = _preprocess(112).fit
        found = [(_bytes(image), entry.label) for image, entry in islice(pictures.read(fit, workers=2), count)]
        labels = torch.tensor([label for _, label in found])
        return Pixels(pixels=torch.stack([p for p, _ in found]), labels=labels, origins=torch.arange(len(found)))

    return _kept(f"cifar10-{part}-{count}-{seed if part == 'calibration' else 0}-{_mark(file)}", read)


def nuclei(part: Part, count: int | None = None, seed: int = 0) -> Pixels:
    """Microscopy at 392 pixels with masks of 256: the first ``count`` of the validation file, or ``count`` of the training file by seed."""
    import pyarrow.parquet as parquet

    file = data_file("nuclei", "train" if part == "calibration" else "validation")

    def read() -> Pixels:
        rows = parquet.read_table(file, columns=["image", "mask"]).to_pylist()
        if part == "calibration":
            random.Random(seed).shuffle(rows)
        rows = rows[:count]
        fit = _preprocess(392).fit
        pixels = torch.stack([_bytes(fit(_open(row["image"]["bytes"]))) for row in rows])
        masks = torch.stack([torch.from_numpy(np.array(_open(row["mask"]["bytes"]).convert("L")) > 0) for row in rows])
        return Pixels(pixels=pixels, labels=masks, origins=torch.arange(len(rows)))

    return _kept(f"nuclei-{part}-{count}-{seed if part == 'calibration' else 0}-{_mark(file)}", read)


def photographs(part: Part, count: int | None = None, seed: int = 0) -> Pixels:
    """Square crops of photographs at 224 pixels, without labels (zeros).

    Judged: of each judged photograph its largest middle square and some smaller squares, always the same ones. Calibration: ``count``
    random squares of the other photographs, by seed, half of them mirrored.
    """
    chosen = [(i, load) for i, load in photograph_files() if (i % 2 == 1) == (part == "judged")]
    if len(chosen) < FEWEST_PHOTOGRAPHS:
        raise FetchError(f"got {len(chosen)} photographs to be {part}, expected {FEWEST_PHOTOGRAPHS} or more")
    numbers = "-".join(str(i) for i, _ in chosen)
    draw = random.Random(f"{part} {seed if part == 'calibration' else 0}")

    def read() -> Pixels:
        images = {i: _smaller(_open(load())) for i, load in chosen}
        if part == "judged":
            cuts = [
                (i, _square(image, draw, 1.0 if k == 0 else None)) for i, image in images.items() for k in range(CROPS)
            ]
        else:
            order = [i for i, _ in chosen] * -(-(count or 512) // len(chosen))
            cuts = [(i, _mirrored(_square(images[i], draw), draw)) for i in order]
            draw.shuffle(cuts)
        fit = _preprocess(224).fit
        pixels = torch.stack([_bytes(fit(image)) for _, image in cuts[:count]])
        origins = torch.tensor([i for i, _ in cuts[:count]])
        return Pixels(pixels=pixels, labels=torch.zeros_like(origins), origins=origins)

    what = hashlib.sha256(f"{numbers} {SCIKIT_IMAGE} {CROPS}".encode()).hexdigest()[:8]
    return _kept(f"photographs-{part}-{count}-{seed if part == 'calibration' else 0}-{what}", read)


def photograph_files() -> list[tuple[int, Callable[[], bytes]]]:
    """Every photograph that is there, by its number in :data:`PHOTOGRAPHS`, as a function that reads its bytes.

    A package that cannot be fetched is told and left out; so is a photograph that a release of the package lacks.
    """
    found: list[tuple[int, Callable[[], bytes]]] = []
    number = 0
    for package, names in PHOTOGRAPHS.items():
        try:
            readers = _readers(package, names)
        except FetchError as error:
            print(f"without {package}: {error}", flush=True)
            readers = {}
        found += [(number + i, readers[name]) for i, name in enumerate(names) if name in readers]
        number += len(names)
    return found


def _readers(package: str, names: tuple[str, ...]) -> dict[str, Callable[[], bytes]]:
    if package == "scikit-image":
        file = wheel(package, SCIKIT_IMAGE)
        inside = set(zipfile.ZipFile(file).namelist())
        return {n: lambda n=n: zipfile.ZipFile(file).read(n) for n in names if n in inside}
    folder = debian(package)
    return {n: (folder / n).read_bytes for n in names if (folder / n).is_file()}


def data_file(folder: str, part: str) -> Path:
    """A parquet file of the data that is kept beside the repository. Raises :class:`FetchError` where it is missing."""
    path = SHARED / "data" / folder / f"{part}.parquet"
    if not path.is_file():
        raise FetchError(f"the {folder} pictures are missing: expected {path}")
    return path


def _square(image: Image.Image, draw: random.Random, share: float | None = None) -> Image.Image:
    """A square whose side is a share of the shorter side: the middle one, or one of 0.5 to 1 anywhere."""
    short = min(image.size)
    side = round(short * (draw.uniform(0.5, 1) if share is None else share))
    spare = [length - side for length in image.size]
    left, top = (s // 2 if share is not None else draw.randint(0, s) for s in spare)
    return image.crop((left, top, left + side, top + side))


def _mirrored(image: Image.Image, draw: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


def _smaller(image: Image.Image, short: int = 672) -> Image.Image:
    """At most 672 pixels on the shorter side: thrice what the model sees."""
    image = image.convert("RGB")
    ratio = short / min(image.size)
    return (
        image
        if ratio >= 1
        else image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)
    )


def _preprocess(size: int) -> Preprocess:
    return Preprocess(size=(size, size), mean=MEAN, std=STD)


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _mark(file: Path) -> str:
    """A word that changes with a file's size."""
    return hashlib.sha256(f"{file.name} {file.stat().st_size}".encode()).hexdigest()[:8]


def _kept(name: str, read: Callable[[], Pixels]) -> Pixels:
    """Pixels from the cache folder, or read now and kept there."""
    folder = cache("pixels", name)
    file = folder / "pixels.safetensors"
    if not file.is_file():
        fill_whole(folder, lambda new: save_file(_tensors(read()), new / file.name))
    return Pixels(**load_file(file))


def _tensors(pixels: Pixels) -> dict[str, Tensor]:
    return {f.name: getattr(pixels, f.name).contiguous() for f in fields(pixels)}

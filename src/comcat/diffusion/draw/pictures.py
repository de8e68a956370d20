"""Generated pictures as PNG files that say how they were made, so that a run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ...errors import StoreError
from ...files import whole_file
from ...runs.checkpoints import differences

MADE = "comcat"
"""The PNG text chunk that holds how a picture was made, as JSON; the prompt stands in a chunk of its own,
``prompt``.
"""


def file_name(prompt: str, number: int) -> str:
    """A name that a prompt's picture has whatever other prompts are asked for: its first words, a hash of it, its
    number.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    digest = hashlib.blake2b(prompt.encode(), digest_size=3).hexdigest()
    return f"{words or 'picture'}-{digest}-{number:04d}.png"


def save_picture(image: Image.Image, path: Path, made: Mapping[str, Any]) -> None:
    """Write a PNG whole or not at all. ``made`` (plain data, with ``prompt``) goes into its text chunks.

    Raises:
        StoreError: if it cannot be written.
    """
    about = PngImagePlugin.PngInfo()
    about.add_itxt("prompt", str(made["prompt"]))
    about.add_itxt(MADE, json.dumps(dict(made), ensure_ascii=False, sort_keys=True))
    with whole_file(path) as new:
        image.save(new, format="PNG", pnginfo=about)


def read_made(path: Path) -> dict[str, Any] | None:
    """How a picture was made, as :func:`save_picture` wrote it; None if it says nothing, or is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            made = json.loads(getattr(image, "text", {}).get(MADE, "null"))
    except (OSError, ValueError, SyntaxError):  # Pillow's readers raise all of these on damaged files
        return None
    return made if isinstance(made, dict) else None


def already_made(path: Path, made: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """Whether the picture is there, made with just these settings. A damaged one counts as missing.

    Raises:
        StoreError: if a picture made in another way has its name, unless that is to be overwritten.
    """
    if not path.exists():
        return False
    if overwrite:
        return read_made(path) == made
    found = read_made(path)
    if found is None:
        if _is_whole(path):
            raise StoreError(f"{path} is there and was not made by comcat; name another folder")
        return False
    if unlike := differences(found, made):
        raise StoreError(
            f"{path} was made in another way: {'; '.join(unlike)}. Name another folder, or say --overwrite to replace "
            "it"
        )
    return True


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def grid(images: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """The pictures side by side, row after row, on white; each in a cell as large as the largest."""
    columns = columns or len(images)
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet

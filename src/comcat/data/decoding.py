"""One picture: from encoded bytes to an upright 8-bit grey or colour picture."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

Content = bytes | Path | str | Image.Image
"""Encoded bytes, a local file, the URL of a remote one, or a picture that is decoded already."""

SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split(),
)
"""What names of picture files end in, in lower case."""

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(content: Content | None) -> Image.Image:
    """The picture in ``content``, all its pixels read, as :func:`plain` makes it.

    Raises whatever Pillow or the file system raises on damaged or missing content; callers count that as unreadable.
    """
    if content is None:
        raise ValueError("it has neither bytes nor a file")
    if isinstance(content, Image.Image):
        return plain(content)
    if isinstance(content, str):
        import fsspec

        with fsspec.open(content, "rb") as remote:
            content = bytes(remote.read())  # type: ignore[union-attr]
    if isinstance(content, Path) and not content.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError("no file is there" if not content.exists() else "it is no regular file")
    with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
        image.load()
        return plain(image)


def plain(image: Image.Image) -> Image.Image:
    """The same picture upright, 8 bits a channel, opaque: mode ``"L"`` or ``"RGB"``. A plain picture comes back itself.

    Transparent pixels are laid on white; 16-bit grey v becomes round(v / 257); the EXIF orientation is applied.
    Raises ``ValueError`` on pixels without an agreed 8-bit scale (floating point).
    """
    turn = _TURNS.get(_orientation(image))
    image = _eight_bit(image)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # else the EXIF data in it would turn the picture again
    return image


def content_hash(image: Image.Image) -> str:
    """32 hexadecimal digits that stand for the size and the RGB pixels, whatever file format they came in."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}".encode(), digest_size=16)
    digest.update(plain(image).convert("RGB").tobytes())
    return digest.hexdigest()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata of any kind takes nothing from the pixels
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow reads 16-bit grey as "I;16" or, from some formats, as 32-bit "I" holding the same 0…65535.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed scale")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")

"""Masks of a concept: grey pictures, white where it is. The loss counts there alone."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...errors import DataError, counted, listed, nearest
from .examples import Examples, read_examples
from .latents import all_frames

_BLACK = 8  # of 255: what compression leaves of black


def read_masks(
    source: str | None, examples: Examples, side: int, *, crops: int, flip: bool, seed: int
) -> list[Image.Image] | None:
    """The mask of each picture, of mode ``"L"`` and as large as it; None without a source. It is that of the picture's
    name, whatever the ending; for pictures without names, that at its place. The rest is as for ``latents.encode``.

    Raises:
        DataError: if a mask is missing, cannot be read, has another size than its picture, is black all over, or shows
            nothing in any crop of its picture.
    """
    if source is None:
        return None
    masks = read_examples(source, what="masks")
    if masks.skipped:
        raise DataError(f"{counted(len(masks.skipped), 'mask')} cannot be read: {listed(masks.skipped)}")
    found = []
    for name, picture, mask in zip(examples.names, examples.images, _paired(source, masks, examples), strict=True):
        if mask.size != picture.size:
            got, expected = (f"{width}×{height}" for width, height in (mask.size, picture.size))
            raise DataError(f"the mask of {name} has {got} pixels, expected {expected} as its picture")
        grey = mask.convert("L")
        if grey.getextrema()[1] <= _BLACK:  # type: ignore[operator]
            raise DataError(f"the mask of {name} is black all over, expected white where the concept is")
        found.append(grey)
    squares = all_frames(examples.images, side, crops=crops, flip=flip, seed=seed, masks=found)
    for name, own in zip(examples.names, squares, strict=True):
        if next(own, None) is None:
            raise DataError(f"no crop of {name} has anything that its mask shows: raise crops, or cut it to a square")
    return found


def _paired(source: str, masks: Examples, examples: Examples) -> list[Image.Image]:
    if not examples.named:
        if len(masks.images) != len(examples.images):
            raise DataError(
                f"got {counted(len(masks.images), 'mask')} for {counted(len(examples.images), 'picture')}, expected "
                "one for each, in the same order"
            )
        return masks.images
    by_name = {Path(name).stem: mask for name, mask in zip(masks.names, masks.images, strict=True)}
    if missing := [name for name in examples.names if Path(name).stem not in by_name]:
        stem = Path(missing[0]).stem
        raise DataError(
            f"{source} has no mask for {listed(missing)}; expected one of the same name, {stem}.png"
            f"{nearest(stem, by_name)}"
        )
    return [by_name[Path(name).stem] for name in examples.names]

"""The pictures of a concept, from whatever they come as."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import Pictures, open_pictures
from ...data.decoding import SUFFIXES, content_hash, plain
from ...errors import DataError, SettingsError, counted, in_short, listed
from ...files import home_path
from ...runs.seeding import derive_seed

EXAMPLES = str | Path | Pictures | Sequence[Image.Image]
"""What the pictures of a concept may come as."""

MANY = 1000  # pictures of one concept; more is a data set, and its latents would no longer be small


@dataclass(frozen=True)
class Examples:
    """The pictures of a concept, and what there is to say about them."""

    images: list[Image.Image]
    notes: list[str]
    fingerprint: str
    """Stands for all their pixels, in order."""
    names: list[str]
    """Of each, in errors: its path in its source, or its place in a list."""
    named: bool
    """Whether those are names that the source gives."""
    skipped: list[str]
    """Those that could not be read, with the reason."""


def read_examples(source: EXAMPLES, *, what: str = "pictures of the concept") -> Examples:
    """All pictures of a source. Unreadable ones are left out and counted in the notes.

    Raises:
        DataError: if there is none, or more than a concept needs.
    """
    if isinstance(source, str | Path | Pictures):
        pictures = source if isinstance(source, Pictures) else open_pictures(source, max_unreadable=1.0)
        samples = list(islice(pictures, MANY + 1))
        images, names = [sample.image.convert("RGB") for sample in samples], [sample.key for sample in samples]
        named, skipped = True, list(pictures.skipped)
    else:
        images, named, skipped = [_picture(image, what) for image in _several(source, what)], False, []
        names = [f"picture {number}" for number in range(len(images))]
    if not images:
        raise DataError(f"got no {what}, expected at least one")
    if len(images) > MANY:
        raise DataError(f"got more than {MANY} {what}; a handful is enough, choose which")
    notes = []
    if skipped:
        notes.append(f"Unreadable {what} left out: {len(skipped)}, the first: {skipped[0]}")
    if isinstance(source, str | Path):
        notes += _notes_on_files(home_path(source))
    marks = [content_hash(image) for image in images]
    if again := [name for number, name in enumerate(names) if marks[number] in marks[:number]]:
        notes.append(f"The same as another of the {what}: {listed(again)}")
    if len(images) == 1:
        notes.append(f"Only one of the {what}: what is learned will hold its background and pose as well.")
    return Examples(images, notes, _together(marks), names, named, skipped)


def check_apart(source: EXAMPLES, others: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Raises SettingsError if another folder, by the setting that names it, lies in that of the concept's pictures or
    around it: what is in sub-folders is read as well.
    """
    if not isinstance(source, str | Path) or not (folder := home_path(source).resolve()).is_dir():
        return
    for setting, given in others.items():
        if given is None:
            continue
        other = home_path(given).resolve()
        if folder in (other, *other.parents):
            raise SettingsError(
                f"{setting}: {str(given)!r} lies in {str(source)!r}, where every picture is taken for one of the "
                "concept, in sub-folders too; expected a place outside"
            )
        if setting != "out" and other in folder.parents:
            raise SettingsError(
                f"{setting}: {str(given)!r} holds {str(source)!r}, whose pictures it would count as its own; expected "
                "a folder apart from that"
            )


def fingerprint(images: Iterable[Image.Image]) -> str:
    """Stands for all pixels of pictures, in order."""
    return _together(map(content_hash, images))


def _together(marks: Iterable[str]) -> str:
    return f"{derive_seed(''.join(marks)):016x}"


def _notes_on_files(source: Path) -> list[str]:
    """What of a file, or of a folder's files, is not learned from, hidden ones aside: photographs of a kind that is not
    read, captions, which some programs take from there, and all frames of a film but one.
    """
    found = [Path(at, name) for at, _, names in os.walk(source) for name in sorted(names)]
    files = [source] if source.is_file() else [file for file in found if not file.name.startswith(".")]
    others = [file.name for file in files if file.suffix.lower() not in SUFFIXES]
    notes = []
    if others and len(others) < len(files):  # else it is a folder of tables, or of archives
        notes.append(f"Not read, since pictures' names end otherwise: {listed(others)}")
    if films := [file.name for file in files if _is_film(file)]:
        notes.append(f"Of several frames, the first alone is learned from: {listed(films)}; store each frame as a file")
    return notes


def _is_film(file: Path) -> bool:
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        return False
    try:
        with Image.open(file) as picture:  # telephones put a small or a depth picture into a JPEG: an MPO
            return picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1
    except Exception:  # whatever damaged bytes make Pillow raise; reading the picture tells of it
        return False


def _several(source: Any, what: str) -> Iterable[Any]:
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, Iterable):
        return source
    raise DataError(f"got {in_short(source)} ({type(source).__name__}) for {what}, expected a folder or pictures")


def _picture(image: Any, what: str) -> Image.Image:
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise DataError(f"got a picture of {image.width} × {image.height} pixels among {what}, expected some")
        return plain(image).convert("RGB")
    kind = type(image).__name__
    raise DataError(f"got {in_short(image)} ({kind}) among {what}, expected pictures of Pillow, or a folder of them")


def one_each(prompts: Sequence[str], count: int) -> list[str]:
    """A prompt for each of ``count`` pictures. Raises SettingsError unless there is one for all or one for each."""
    if len(prompts) not in (1, count):
        got = f"{counted(len(prompts), 'prompt')} for {counted(count, 'picture')}"
        raise SettingsError(f"got {got}, expected one for all or one for each")
    return [*prompts] * (count if len(prompts) == 1 else 1)


def notes_on_sizes(images: Sequence[Image.Image], side: int) -> list[str]:
    """What is lost of pictures when squares of ``side`` pixels are cut from them."""
    notes, whole = [], counted(len(images), "picture")
    if small := sum(min(i.size) < side for i in images):
        notes.append(f"Smaller than {side} pixels, and enlarged: {small} of {whole}.")
    if long := sum(max(i.size) > 2 * min(i.size) for i in images):
        notes.append(f"Over twice as long as wide, so that less than half is in a crop: {long} of {whole}.")
    return notes

"""From what a user writes to a set of pictures."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError, SettingsError, counted, nearest
from ..settings import expect_one_of
from .decoding import SUFFIXES
from .folders import FolderSource
from .hub import HubSource
from .labels import in_natural_order, whole
from .metadata import METADATA
from .pictures import Pictures
from .shards import ShardSource
from .sources import SPLITS, DigitsSource, FileSource, Source, is_data, printable, require
from .tables import ParquetSource, SavedSource

_DIGITS = {"digits": None, "digits:train": "train", "digits:test": "test"}
_TARS = (".tar", ".tar.gz", ".tgz")
_ORDERS = ("natural", "text", "number")
_ORDERED = re.compile(r"(?P<source>.+):class_order=(?P<order>\w*)", re.DOTALL)
_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(" + "|".join(SPLITS) + r")(?![a-z])")


def open_pictures(
    source: str | os.PathLike[str], *, max_unreadable: float = 0.1, class_order: str | None = None
) -> Pictures:
    """The pictures in ``source``, which is one of:

    - ``digits``, ``digits:train``, ``digits:test``: scikit-learn's scans of handwritten digits, built in;
    - a folder: of one sub-folder a class, of pictures with labels in ``metadata.csv``, ``metadata.jsonl`` or
      ``metadata.parquet`` (columns ``file_name`` and ``label``, as ``datasets``' imagefolder has it), or of pictures
      without labels; also of parquet files, of tar shards, or written by ``datasets``' ``save_to_disk``;
    - a ``.parquet`` file with a column ``image`` and perhaps ``label``; a ``.tar`` file in WebDataset's convention;
      a single picture;
    - a pattern of parquet or tar files, ``shards-{000..009}.tar`` or ``train-*.parquet``;
    - ``hf:OWNER/NAME[/CONFIG][:SPLIT][[:FIRST]]``: a data set of the Hugging Face hub, streamed. The split may be
      left out if there is only one. ``[:FIRST]`` stops after that many pictures; without it a sample made with
      :meth:`Pictures.take` is spread over the whole data set, and each pass over the sample downloads nearly all of it.
      A local folder in the hub's layout is written ``hf:./FOLDER``.

    Labels count from 0. Whole numbers are labels as they are, and a data set's own list of classes numbers them. Other
    classes, folders or words, are numbered in the order ``class_order``: ``"natural"`` (the default: ``a2`` before
    ``a10``, letters whatever their case, as timm's reader has it, so that folders 0 … n − 1 mean these labels),
    ``"text"`` (``a10`` before ``a2``, as torchvision's ``ImageFolder`` and ``datasets`` have it), or ``"number"``:
    names are numbers, and are the labels themselves. It may also stand at the end of ``source``:
    ``./folder:class_order=text``. A warning says which was used where the first two differ and none was chosen.

    Hidden files and what systems leave behind (``__MACOSX``, ``@eaDir``, ``Thumbs.db``) are ignored. A pass over the
    pictures leaves out the unreadable ones, but fails if they are more than ``max_unreadable`` of all. Pictures of
    which only some have labels, or labels that are no classes, have none, and a warning says why.

    Raises :class:`~comcat.errors.DataError` if the source is missing, empty, damaged, holds no pictures or mixes
    several splits, or if ``"number"`` is asked of classes that are no numbers; :class:`~comcat.errors.SettingsError`
    for another order and unless 0 ≤ ``max_unreadable`` ≤ 1.
    """
    pictures = find_pictures(source, max_unreadable=max_unreadable, class_order=class_order)
    for note in pictures.notes:
        warnings.warn(note, stacklevel=2)
    return pictures


def find_pictures(
    source: str | os.PathLike[str], *, max_unreadable: float = 0.1, class_order: str | None = None
) -> Pictures:
    """What :func:`open_pictures` opens, with what there is to say in ``notes`` alone and not in warnings."""
    source, class_order = _with_order(source, class_order)
    found = _find(source)
    pictures = Pictures(found, max_unreadable=max_unreadable)
    if class_order is not None:
        return _in_order(pictures, class_order)
    class_order, note = _likely_order(found, printable(str(source)))
    pictures = pictures if class_order is None else _in_order(pictures, class_order)
    pictures.order_note = note
    return pictures


def _with_order(source: str | os.PathLike[str], order: str | None) -> tuple[str | os.PathLike[str], str | None]:
    """The source without the order of classes at its end, and that order."""
    match = _ORDERED.fullmatch(source) if isinstance(source, str) else None
    if match is not None and not os.path.lexists(os.path.expanduser(match.string)):
        if order not in (None, match["order"]):
            raise SettingsError(f"got class_order={order!r} and {source!r}; expected one order of classes")
        source, order = match["source"], match["order"]
    if order is not None:
        expect_one_of("class_order", order, _ORDERS)
    return source, order


def _likely_order(source: Source, text: str) -> tuple[str | None, str | None]:
    """The order of classes where nobody chose one (None: as the source has it), and what to say of it if another was
    likely meant."""
    names = source.labelling.names or ()
    natural, by_text = in_natural_order(names), tuple(sorted(names))
    if source.labelling.ordered and natural != by_text:
        place = next(place for place, pair in enumerate(zip(natural, by_text, strict=True)) if pair[0] != pair[1])
        return None, (
            f"the classes of {source.name} are numbered in natural order, as timm does: {natural[place]!r} is {place}; "
            f"in the order of text, as torchvision does, {by_text[place]!r} is. Write {text}:class_order=text for "
            "that, or class_order=natural to say that this is meant"
        )
    numbers = [whole(name) for name in names]
    if set(numbers) != set(range(len(names))) or numbers == list(range(len(names))):
        return None, None
    place = next(place for place, number in enumerate(numbers) if place != number)
    if names != by_text:
        return None, (
            f"{source.name} has numbers for classes, but its own order of them: {names[place]!r} has the label "
            f"{place}. Write {text}:class_order=number to have the numbers as labels"
        )
    return "natural", (
        f"{source.name} lists its classes, numbers, in the order of text ({names[place]!r} as {place}); here the "
        f"numbers are the labels. Write {text}:class_order=text for the other, or class_order=natural to say that this "
        "is meant"
    )


def _in_order(pictures: Pictures, order: str) -> Pictures:
    """The same pictures with their classes numbered in the order that was asked for."""
    names = pictures.class_names
    if names is None:
        return pictures
    if order != "number":
        ordered = sorted(names) if order == "text" else in_natural_order(names)
        return pictures.in_terms_of(ordered, f"in the order {order!r}")
    numbers = [whole(name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None or number < 0:
            raise DataError(
                f"class_order=number: {pictures.name} has the class {name!r}, which is no whole number from 0"
            )
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise DataError(f"class_order=number: {pictures.name} has several classes that spell {twice}")
    return pictures.relabelled([number or 0 for number in numbers], None, "by their numbers")


def _find(source: str | os.PathLike[str]) -> Source:
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"got {source!r} as the source of pictures; expected a path or a name")
    text = os.fsdecode(source)
    if isinstance(source, str):
        if text in _DIGITS:
            found = DigitsSource(_DIGITS[text])
            if os.path.lexists(text):
                found.notes.append(f"{text!r} is the built-in data set; for what lies here write ./{text}")
            return found
        if text.startswith("hf:"):
            return HubSource(text)
    if not text:
        raise DataError("got an empty name as the source of pictures")
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        try:
            return _folder(path)
        except OSError as error:
            raise DataError(f"the folder {printable(str(path))} cannot be read: {error}") from error
    if os.path.exists(path):
        return _files([path], path.parent, str(path))
    if any(mark in text for mark in "{*?["):
        files = _expand(str(path))
        return _files(files, Path(os.path.commonpath([file.parent for file in files])), text)
    raise _missing(path, text)


def _folder(path: Path) -> Source:
    names = sorted(name for name in os.listdir(path) if is_data(name))
    if {"dataset_dict.json", "state.json"} & set(names):
        return SavedSource(path)
    for suffixes in ((".parquet",), _TARS):
        files = [path / name for name in names if name.lower().endswith(suffixes)]
        files = [file for file in files if not file.is_dir() and not _is_metadata(file)]
        if files:
            _one_split(files)
            found = _files(files, path, str(path))
            beside = [name for name in names if name.lower().endswith(tuple(SUFFIXES)) or os.path.isdir(path / name)]
            if beside:
                found.notes.append(
                    f"{found.name} is read as {counted(len(files), 'file')} such as {printable(files[0].name)}; "
                    f"pictures and folders beside, such as {printable(beside[0])}, are not read"
                )
            return found
    return FolderSource(path)


def _is_metadata(file: Path) -> bool:
    """Whether a parquet file lists the pictures beside it rather than holding any."""
    if file.name not in METADATA:
        return False
    try:
        columns = require("pyarrow.parquet", "parquet files").read_schema(file).names
    except (OSError, ValueError):
        return False
    return "file_name" in columns and "image" not in columns


def _files(files: Sequence[Path], root: Path, name: str) -> Source:
    """The source of files of one kind."""
    for file in files:
        if file.exists() and not file.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{printable(str(file))} is no regular file")
    names = [file.name.lower() for file in files]
    if all(file.endswith(".parquet") for file in names):
        return ParquetSource(files, root, name)
    if all(file.endswith(_TARS) for file in names):
        return ShardSource(files, root, name)
    if len(files) == 1 and files[0].suffix.lower() in SUFFIXES:
        return FileSource(files[0])
    raise DataError(
        f"{name} is no source of pictures: expected a folder, parquet or tar files, a picture, 'digits' or 'hf:NAME'"
    )


def _expand(pattern: str) -> list[Path]:
    """The files that a pattern with braces or wildcards names."""
    try:
        spelled = (
            list(require("braceexpand", "patterns of files").braceexpand(pattern)) if "{" in pattern else [pattern]
        )
    except ValueError as error:
        raise DataError(f"the pattern {pattern!r} is malformed: {error}") from error
    files: list[Path] = []
    for text in spelled:
        if not any(mark in text for mark in "*?["):
            if not os.path.isfile(text):
                raise _missing(Path(text), text)
            files.append(Path(text))
            continue
        found = [Path(name) for name in sorted(glob.glob(text))]
        if not found:
            raise DataError(f"no file matches {text!r}")
        files += found
    return list(dict.fromkeys(files))


def _one_split(files: Sequence[Path]) -> None:
    """Raises if the names of files that lie together say that they belong to different splits."""
    splits: dict[str, Path] = {}
    for file in files:
        for word in _SPLIT_WORD.findall(file.name.lower()):
            splits.setdefault(SPLITS[word], file)
    if len(splits) > 1:
        listed = ", ".join(str(file) for file in splits.values())
        raise DataError(
            f"{files[0].parent} holds several splits; open one file ({listed}) or a pattern such as 'train*'"
        )


def _missing(path: Path, text: str) -> DataError:
    """The error for a path that does not exist, with the nearest name where it goes wrong."""
    absolute = Path(os.path.abspath(path))
    parent, name = absolute.parent, absolute.name
    while not os.path.isdir(parent):
        parent, name = parent.parent, parent.name
    try:
        known = os.listdir(parent)
    except OSError:
        known = []
    hint = nearest(name, [*known, *(_DIGITS if os.sep not in text else ())])
    return DataError(f"no pictures at {text!r}: {parent} has no {name!r}{hint}")

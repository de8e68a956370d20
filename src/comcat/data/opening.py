"""From what a user writes to a set of pictures."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError, nearest
from .picture import SUFFIXES
from .pictures import Pictures
from .shards import ShardSource
from .sources import SPLITS, DigitsSource, FileSource, FolderSource, Source, require
from .tables import HubSource, ParquetSource, SavedSource

_DIGITS = {"digits": None, "digits:train": "train", "digits:test": "test"}
_TARS = (".tar", ".tar.gz", ".tgz")
_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(" + "|".join(SPLITS) + r")(?![a-z])")


def open_pictures(source: str | os.PathLike[str], *, max_unreadable: float = 0.1) -> Pictures:
    """The pictures in ``source``, which is one of:

    - ``digits``, ``digits:train``, ``digits:test``: scikit-learn's scans of handwritten digits, built in;
    - a folder: of one sub-folder a class (sorted by name, labels count from 0), or of pictures without labels;
      also of parquet files, of tar shards, or written by ``datasets``' ``save_to_disk``;
    - a ``.parquet`` file with a column ``image`` and perhaps ``label``; a ``.tar`` file in WebDataset's convention;
      a single picture;
    - a pattern of parquet or tar files, ``shards-{000..009}.tar`` or ``train-*.parquet``;
    - ``hf:OWNER/NAME[/CONFIG][:SPLIT][[:FIRST]]``: a data set of the Hugging Face hub, streamed. The split may be
      left out if there is only one. ``[:FIRST]`` stops after that many pictures; without it a sample made with
      :meth:`Pictures.take` is spread over the whole data set, and each pass over the sample downloads nearly all of it.
      A local folder in the hub's layout is written ``hf:./FOLDER``.

    Hidden files are ignored. A pass over the pictures leaves out the unreadable ones, but fails if they are more than
    ``max_unreadable`` of all. Raises :class:`~comcat.errors.DataError` if the source is missing, empty, damaged, holds
    no pictures, mixes several splits, or has labels that are no classes; :class:`~comcat.errors.SettingsError` unless
    0 ≤ ``max_unreadable`` ≤ 1.
    """
    return Pictures(_find(source), max_unreadable=max_unreadable)


def _find(source: str | os.PathLike[str]) -> Source:
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"got {source!r} as the source of pictures; expected a path or a name")
    text = os.fsdecode(source)
    if isinstance(source, str):
        if text in _DIGITS:
            return DigitsSource(_DIGITS[text])
        if text.startswith("hf:"):
            return HubSource(text)
    if not text:
        raise DataError("got an empty name as the source of pictures")
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        try:
            return _folder(path)
        except OSError as error:
            raise DataError(f"the folder {path} cannot be read: {error}") from error
    if os.path.exists(path):
        return _files([path], path.parent, str(path))
    if any(mark in text for mark in "{*?["):
        files = _expand(str(path))
        return _files(files, Path(os.path.commonpath([file.parent for file in files])), text)
    raise _missing(path, text)


def _folder(path: Path) -> Source:
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if {"dataset_dict.json", "state.json"} & set(names):
        return SavedSource(path)
    for suffixes in ((".parquet",), _TARS):
        files = [path / name for name in names if name.lower().endswith(suffixes)]
        if files:
            _one_split(files)
            return _files(files, path, str(path))
    return FolderSource(path)


def _files(files: Sequence[Path], root: Path, name: str) -> Source:
    """The source of files of one kind."""
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

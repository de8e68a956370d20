"""What every source of pictures offers, and the sources that list their pictures: folders and the built-in digits."""

from __future__ import annotations

import importlib
import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from ..errors import DataError
from .picture import SUFFIXES, Content

T = TypeVar("T")

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""How people name the parts of a data set, and which of them mean the same."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture not yet decoded. ``content`` is None where the source names a picture but does not hold it."""

    key: str
    label: int | None
    content: Content | None


class Source(Protocol):
    """A stream of entries that can be passed over again and again, in the same order.

    ``shuffles_fully`` says whether ``entries`` with a seed come in a fully random order, or are just reordered chunk
    by chunk; ``lists_keys`` whether ``keys`` needs no pass over the data.
    """

    name: str
    class_names: tuple[str, ...] | None
    has_labels: bool
    shuffles_fully: bool
    lists_keys: bool

    @property
    def count(self) -> int | None:
        """How many entries there are, if that is known."""
        ...

    def keys(self) -> Iterator[str]:
        """The key of every entry, in order."""
        ...

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        """The entries whose key ``keep`` wants (None: all), in the source's order, or with ``seed`` in another."""
        ...


class Listed(ABC):
    """A source whose pictures have positions 0…count − 1 and can be reached one by one."""

    name: str
    class_names: tuple[str, ...] | None
    has_labels: bool
    shuffles_fully = True
    lists_keys = True

    @property
    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def key(self, position: int) -> str: ...

    @abstractmethod
    def entry(self, position: int) -> Entry: ...

    def keys(self) -> Iterator[str]:
        return (self.key(position) for position in range(self.count))

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for position in shuffled(range(self.count), seed):
            if keep is None or keep(self.key(position)):
                yield self.entry(position)


class FolderSource(Listed):
    """Pictures in class sub-folders, as torchvision's ``ImageFolder`` reads them, or without labels."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`~comcat.errors.DataError` if the folder holds no pictures, or splits instead of classes."""
        self.name = str(folder)
        self._root = folder
        self.has_labels = False
        self.class_names = None
        items = sorted((item.name, item.is_dir()) for item in os.scandir(folder) if not item.name.startswith("."))
        if not items:
            raise DataError(f"the folder {folder} is empty; expected pictures, or one sub-folder of them a class")
        classes = [name for name, is_dir in items if is_dir]
        self._files = [(name, None) for name, is_dir in items if not is_dir and _is_picture(name)]
        inside = {name: sorted(_pictures_under(folder, name)) for name in classes}
        nested = sum(len(files) for files in inside.values())
        if not self._files and not nested:
            raise DataError(
                f"no pictures in the folder {folder}: expected names ending in {' '.join(sorted(SUFFIXES))}, "
                f"found {', '.join(repr(name) for name, _ in items[:5])}{', …' if len(items) > 5 else ''}"
            )
        if self._files:  # a flat folder, in which sub-folders are no classes
            if nested:
                warnings.warn(
                    f"{len(self._files)} pictures lie directly in {folder}, so its sub-folders are not taken for "
                    "classes and its pictures have no labels",
                    stacklevel=5,
                )
            self._files = sorted(self._files + [(file, None) for files in inside.values() for file in files])
            return
        if all(name.lower() in SPLITS for name in classes):
            raise DataError(
                f"the sub-folders of {folder} are splits, not classes ({', '.join(classes)}); open one of them, "
                f"such as {folder / classes[0]}"
            )
        barren = [name for name, files in inside.items() if not files]
        if barren:
            warnings.warn(
                f"{len(barren)} sub-folders of {folder} hold no pictures but count as classes: {', '.join(barren[:5])}",
                stacklevel=5,
            )
        self.has_labels = True
        self.class_names = tuple(classes)
        self._files = [(file, label) for label, name in enumerate(classes) for file in inside[name]]

    @property
    def count(self) -> int:
        return len(self._files)

    def key(self, position: int) -> str:
        return self._files[position][0]

    def entry(self, position: int) -> Entry:
        key, label = self._files[position]
        return Entry(key, label, self._root / key)


class FileSource(Listed):
    """A single picture file, without a label."""

    has_labels = False
    class_names: tuple[str, ...] | None = None

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self._file = file

    @property
    def count(self) -> int:
        return 1

    def key(self, position: int) -> str:
        return self._file.name

    def entry(self, position: int) -> Entry:
        return Entry(self._file.name, None, self._file)


class DigitsSource(Listed):
    """scikit-learn's 1,797 scans of handwritten digits, 8×8 grey, 10 classes.

    The split is fixed: of each class, every fifth scan is for testing, the others for training.
    """

    has_labels = True
    class_names: tuple[str, ...] | None = tuple("0123456789")

    def __init__(self, part: str | None = None) -> None:
        digits = require("sklearn.datasets", "the built-in digits", package="scikit-learn").load_digits()
        self.name = f"digits:{part}" if part else "digits"
        self._scans = (digits.images * (255 / 16) + 0.5).astype("uint8")  # from 0…16
        self._labels = [int(label) for label in digits.target]
        seen = [0] * 10
        self._rows: list[int] = []
        for row, label in enumerate(self._labels):
            seen[label] += 1
            if part is None or (seen[label] % 5 == 0) == (part == "test"):
                self._rows.append(row)

    @property
    def count(self) -> int:
        return len(self._rows)

    def key(self, position: int) -> str:
        return f"digits:{self._rows[position]}"

    def entry(self, position: int) -> Entry:
        row = self._rows[position]
        return Entry(f"digits:{row}", self._labels[row], Image.fromarray(self._scans[row]))


def shuffled(items: Sequence[T], seed: int | None) -> Sequence[T]:
    """The items in an order that depends on ``seed`` alone; in their own if it is None."""
    if seed is None:
        return items
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def require(module: str, purpose: str, *, package: str | None = None) -> Any:
    """The module, imported now. Raises :class:`~comcat.errors.DataError` naming the package if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{purpose} need the package {package or module.partition('.')[0]!r}: {error}") from error


def guarded(items: Iterator[T], what: str) -> Iterator[T]:
    """The same items; a library's error while it reads the next one becomes a DataError that begins with ``what``."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # each library has its own kinds
            raise DataError(f"{what}: {type(error).__name__}: {error}") from error
        yield item


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _pictures_under(root: Path, name: str, ancestors: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths, relative to ``root``, of all pictures below its sub-folder ``name``; hidden files and folders left out."""
    real = os.path.realpath(root / name)
    if real in ancestors:  # a symbolic link back up
        return
    for item in os.scandir(root / name):
        if item.name.startswith("."):
            continue
        path = f"{name}/{item.name}"
        if item.is_dir():
            yield from _pictures_under(root, path, ancestors | {real})
        elif _is_picture(item.name):
            yield path

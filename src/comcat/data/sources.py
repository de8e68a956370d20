"""What every source of pictures offers, and the two smallest: a single file and the built-in digits."""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from ..errors import DataError
from .decoding import Content
from .labels import Labelling

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

    ``labelling`` says what is known of its labels, ``notes`` what a person should know of how it was read,
    ``shuffles_fully`` whether ``entries`` with a seed come in a fully random order, or are just reordered chunk by
    chunk, and ``lists_keys`` whether ``keys`` needs no pass over the data.
    """

    name: str
    labelling: Labelling
    notes: list[str]
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
    notes: list[str]
    labelling = Labelling()
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


class FileSource(Listed):
    """A single picture file, without a label."""

    def __init__(self, file: Path) -> None:
        self.name, self.notes = printable(str(file)), []
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

    labelling = Labelling(origin="scikit-learn's targets", names=tuple("0123456789"), largest=9)

    def __init__(self, part: str | None = None) -> None:
        digits = require("sklearn.datasets", "the built-in digits", package="scikit-learn").load_digits()
        self.name, self.notes = f"digits:{part}" if part else "digits", []
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


_NOT_DATA = frozenset(
    {"__macosx", "@eadir", "#recycle", "@recycle", "@tmp", "$recycle.bin", "system volume information", "lost+found"}
    | {"__pycache__", "thumbs.db", "desktop.ini"}
)
"""What systems, network drives and tools leave in folders, in lower case."""


def is_data(name: str) -> bool:
    """Whether a file or folder belongs to the data: it is not hidden, and nothing that a system left there."""
    return not name.startswith(".") and name.lower() not in _NOT_DATA


def printable(text: str) -> str:
    """The same text; bytes of a file name that are no UTF-8 become escapes, since no file or terminal takes them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

"""Pictures in tar files, in the WebDataset convention.

Files of one sample stand together and share their name up to the first dot.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from .labels import LabelCoder, class_names_of, whole
from .picture import SUFFIXES
from .sources import Entry, guarded, shuffled


class ShardSource:
    """Tar shards: the (first) picture of each sample, its label from ``.cls``, or else from ``"label"`` in ``.json``.

    Labels are whole numbers, or words, which are then sorted and numbered. Shards are read one after the other.
    """

    shuffles_fully = False
    lists_keys = False
    count = None

    def __init__(self, files: Sequence[Path], root: Path, name: str) -> None:
        """Raises :class:`~comcat.errors.DataError` if a shard is damaged or none holds a picture."""
        self.name = name
        self._files = [(file, file.relative_to(root).as_posix()) for file in files]
        first = next(self._samples(labels=True), None)
        if first is None:
            held = [
                name
                for file, _ in self._files
                for name, _ in guarded(_members(file), f"the shard {file} cannot be read")
            ]
            raise DataError(
                f"no pictures in {name}: expected files ending in {' '.join(sorted(SUFFIXES))}, "
                f"found {', '.join(repr(name) for name in held[:5]) or 'none'}{', …' if len(held) > 5 else ''}"
            )
        _, label, _ = first
        self.has_labels = label is not None and whole(label) != -1
        words = isinstance(label, str) and whole(label) is None
        self.class_names = class_names_of([label for _, label, _ in self._samples(labels=True)]) if words else None
        self._coder = LabelCoder(self.class_names)

    def keys(self) -> Iterator[str]:
        return (key for key, _, _ in self._samples())

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for key, label, content in self._samples(keep, seed, labels=self.has_labels, pictures=True):
            yield Entry(key, self._coder(label, key) if self.has_labels else None, content)

    def _samples(
        self,
        keep: Callable[[str], bool] | None = None,
        seed: int | None = None,
        *,
        labels: bool = False,
        pictures: bool = False,
    ) -> Iterator[tuple[str, object, bytes | None]]:
        """Key, label and encoded picture of each sample that has one; what is not asked for is skipped, and None."""
        for file, key in shuffled(self._files, seed):
            samples = _samples_of(file, f"{key}:", keep, labels, pictures)
            yield from guarded(samples, f"the shard {file} cannot be read")


def _samples_of(
    file: Path, prefix: str, keep: Callable[[str], bool] | None, labels: bool, pictures: bool
) -> Iterator[tuple[str, object, bytes | None]]:
    current, wanted, has_picture = None, False, False
    label: object = None
    label_is_cls = False
    content = None
    for name, read in _members(file):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = suffix.lower()
        if not dot or not stem:  # without an extension, or hidden
            continue
        key = prefix + folder + slash + stem
        if key != current:
            if current is not None and has_picture:
                yield current, label, content
            current, wanted = key, keep is None or keep(key)
            has_picture, label, label_is_cls, content = False, None, False, None
        if not wanted:
            continue
        if labels and suffix == "cls":
            label, label_is_cls = read().decode().strip() or None, True
        elif labels and suffix == "json" and not label_is_cls:
            try:
                values = json.loads(read())
            except ValueError as error:
                raise DataError(f"{key}.{suffix} is no JSON: {error}") from error
            label = values.get("label") if isinstance(values, dict) else None
        elif not has_picture and f".{suffix.rpartition('.')[2]}" in SUFFIXES:
            has_picture, content = True, read() if pictures else None
    if current is not None and has_picture:
        yield current, label, content


def _members(file: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each regular file in a tar file, and how to read it (before the next one is asked for)."""
    with tarfile.open(file, "r:*") as tar:
        for member in tar:
            if member.isreg():
                yield member.name, lambda member=member: tar.extractfile(member).read()  # type: ignore[union-attr]

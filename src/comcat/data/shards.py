"""Pictures in tar files, in the WebDataset convention.

Files of one sample share their name up to the first dot: ``0001.png`` and ``0001.cls``. Where names hold dots of their
own, ``v0.5.png`` and ``v0.5.cls``, it is up to the last one.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, counted
from ..files import parsed
from .decoding import SUFFIXES
from .labels import Labelling, code_labels
from .sources import Entry, guarded, is_data, printable, shuffled

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ShardSource:
    """Tar shards: the (first) picture of each sample, its label from ``.cls``, or else from ``"label"`` in ``.json``.

    Labels are whole numbers, or words, which are then put in order and numbered. Names and labels of all shards are
    read at once, pictures one after the other.
    """

    shuffles_fully = False
    lists_keys = True

    def __init__(self, files: Sequence[Path], root: Path, name: str) -> None:
        """Raises :class:`~comcat.errors.DataError` if a shard is damaged or holds two files of one name, or none holds
        a picture."""
        self.name = printable(name)
        self.notes: list[str] = []
        contents = [_Contents.of(file, f"{file.relative_to(root).as_posix()}:") for file in files]
        if not any(shard.pictures for shard in contents):
            raise self._no_pictures([name for shard in contents for name in shard.others])
        dotted = _names_hold_dots(contents)
        samples = [shard.samples(dotted) for shard in contents]
        self._shards = list(zip(files, samples, strict=True))
        self._keys = [key for found in samples for key in found.values()]
        self._label(contents, [shard.labels(found, dotted) for shard, found in zip(contents, samples, strict=True)])
        left = [
            n
            for shard, found in zip(contents, samples, strict=True)
            for p, n in shard.pictures.items()
            if p not in found
        ]
        if left:
            out = f"{counted(len(left), 'picture')} left out, such as {printable(left[0])}"
            self.notes.append(f"samples of {self.name} have several pictures, of which one is used: {out}")

    def _label(self, contents: list[_Contents], labels: list[dict[str, object]]) -> None:
        """The labels of all samples, and what there is to say of them; ``labels`` are those of each shard, by key."""
        kinds = [".cls"] * any(shard.cls for shard in contents) + [".json"] * any(shard.json for shard in contents)
        raws = [raw for found in labels for raw in found.values()]
        values, self.labelling = code_labels(raws, self._keys.__getitem__, origin=f"{' and '.join(kinds)} files")
        self._labels = dict(zip(self._keys, values or [None] * len(raws), strict=True))
        if values is None and self.labelling.absent_because is None:
            self.labelling = Labelling(absent_because=self._why_none(contents, labels))

    def _why_none(self, contents: list[_Contents], labels: list[dict[str, object]]) -> str | None:
        """Why no picture has a label, if something in the shards looks like one."""
        stray = [
            key
            for shard, found in zip(contents, labels, strict=True)
            for stem in shard.cls
            if (key := shard.prefix + stem) not in found
        ]
        if stray:
            held = f"{counted(len(stray), 'label file')} of {self.name} without a picture of the same name"
            return f"no labels: {held}, such as {printable(stray[0])}.cls"
        if len({name.rpartition("/")[0] for shard in contents for name in shard.pictures.values()}) > 1:
            way_out = "unpack it, or put .cls files beside the pictures"
            return f"no labels: the folders in {self.name} are not taken for classes; {way_out}"
        return None

    def _no_pictures(self, held: list[str]) -> DataError:
        found = ", ".join(repr(printable(name)) for name in held[:5]) or "none"
        return DataError(
            f"no pictures in {self.name}: expected files ending in {' '.join(sorted(SUFFIXES))}, "
            f"found {found}{', …' if len(held) > 5 else ''}"
        )

    @property
    def count(self) -> int:
        return len(self._keys)

    def keys(self) -> Iterator[str]:
        return iter(self._keys)

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for file, samples in shuffled(self._shards, seed):
            wanted = {place: key for place, key in samples.items() if keep is None or keep(key)}
            for key, content in guarded(_read(file, wanted), f"the shard {printable(str(file))} cannot be read"):
                yield Entry(key, self._labels[key], content)


@dataclass(frozen=True)
class _Contents:
    """What one shard holds: pictures by their place in it, and labels by the name of their file without its end."""

    prefix: str
    pictures: dict[int, str] = field(default_factory=dict)
    cls: dict[str, str] = field(default_factory=dict)
    json: dict[str, object] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, file: Path, prefix: str) -> _Contents:
        contents = cls(prefix)
        seen: set[str] = set()
        for place, name, read in guarded(_members(file), f"the shard {printable(str(file))} cannot be read"):
            if name in seen:
                raise DataError(f"the shard {printable(str(file))} holds {printable(name)!r} twice; names must differ")
            seen.add(name)
            contents._add(place, name, read)
        return contents

    def _add(self, place: int, name: str, read: Callable[[], bytes]) -> None:
        stem, suffix = _up_to_last_dot(name)
        if suffix in SUFFIXES:
            self.pictures[place] = name
        elif suffix == ".cls":
            self.cls[stem] = _text(read(), name).strip()
        elif suffix == ".json":
            values = _parsed(read(), name, self.prefix)
            if isinstance(values, DataError) or (isinstance(values, dict) and "label" in values):
                self.json[stem] = values["label"] if isinstance(values, dict) else values
        else:
            self.others.append(name)

    def samples(self, dotted: bool) -> dict[int, str]:
        """The key of each sample, by the place of its picture: the one of its very name, or else the first."""
        chosen: dict[str, int] = {}
        exact = set()
        for place, name in self.pictures.items():
            stem, is_exact = _stem(name, dotted), _stem(name, dotted) == _stem(name, True)
            if stem not in chosen or (is_exact and stem not in exact):
                chosen[stem] = place
            if is_exact:
                exact.add(stem)
        return dict(sorted((place, self.prefix + stem) for stem, place in chosen.items()))

    def labels(self, samples: dict[int, str], dotted: bool) -> dict[str, object]:
        """The label of each sample as it is written, None where there is none. Raises where it is in a broken file."""
        found: dict[str, object] = {}
        for place, key in samples.items():
            stem = _stem(self.pictures[place], dotted)
            label = self.cls[stem] if stem in self.cls else self.json.get(stem)
            if isinstance(label, DataError):
                raise label
            found[key] = label
        return found


def _names_hold_dots(contents: list[_Contents]) -> bool:
    """Whether a dot in a name is a part of it (``v0.5.png``) and not the start of a field's name (``a.mask.png``).

    It is where a picture has a label of its own under its whole name; it is not where pictures share the label of the
    name up to the first dot. Without any label, names are whole where what stands between the dots names no field.
    """
    between = [
        (shard, name)
        for shard in contents
        for name in shard.pictures.values()
        if _stem(name, True) != _stem(name, False)
    ]
    for dotted in (True, False):
        if any(_stem(name, dotted) in labels for shard, name in between for labels in (shard.cls, shard.json)):
            return dotted
    return any(
        not _FIELD.fullmatch(part)
        for _, name in between
        for part in _stem(name, True)[len(_stem(name, False)) + 1 :].split(".")
    )


def _stem(name: str, dotted: bool) -> str:
    """A file's name up to the last dot, or to the first; folders before it stay."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".") if dotted else base.partition("."))[0]


def _up_to_last_dot(name: str) -> tuple[str, str]:
    """A file's name without its end, and the end in lower case."""
    stem = _stem(name, True)
    return stem, name[len(stem) :].lower()


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(name)} is no UTF-8 text: {error}") from error


def _parsed(data: bytes, name: str, prefix: str) -> object:
    """What a JSON file holds; an error where it is broken, to be raised if its label is needed."""
    try:
        return parsed(data)
    except ValueError as error:
        return DataError(f"{prefix}{printable(name)} is no JSON: {error}")


def _members(file: Path) -> Iterator[tuple[int, str, Callable[[], bytes]]]:
    """Place and name of each file of the data in a tar file, and how to read it before the next one is asked for."""
    try:
        opened = tarfile.open(file, "r:*")
    except tarfile.ReadError as error:  # its message is of five lines
        raise DataError(f"the shard {printable(str(file))} cannot be read: it is no tar file, or damaged") from error
    with opened as tar:
        for place, member in enumerate(tar):
            parts = [part for part in member.name.split("/") if part not in (".", "..")]
            if member.isreg() and parts and all(map(is_data, parts)):
                yield place, member.name, partial(_bytes, tar, member)
        _check_end(tar, file)


def _check_end(tar: tarfile.TarFile, file: Path) -> None:
    """Raise DataError where a tar file goes on behind what was read of it, or stops in the middle of a header.

    Python's reader takes a header that it cannot read for the end, in silence. An end is blocks of zeros, or nothing.
    """
    read: Any = tar.fileobj
    read.seek(tar.offset)
    block = read.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
        told = "it is cut off or damaged"
    elif any(rest.strip(b"\0") for rest in iter(partial(read.read, tarfile.RECORDSIZE), b"")):
        told = "another follows behind its end; give each its own file, or join them with tar --concatenate"
    else:
        return
    raise DataError(f"the shard {printable(str(file))} cannot be read to its end: {told}")


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    return b"" if opened is None else opened.read()  # None for what is no regular file


def _read(file: Path, wanted: dict[int, str]) -> Iterator[tuple[str, bytes]]:
    """Key and encoded picture of the samples wanted, by place; nothing is read after the last."""
    if not wanted:
        return
    last = max(wanted)
    for place, _, read in _members(file):
        if place in wanted:
            yield wanted[place], read()
        if place >= last:
            return

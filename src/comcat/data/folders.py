"""Pictures in a folder: one sub-folder a class, or labels in a metadata file beside them, or none."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, counted
from .decoding import SUFFIXES
from .labels import Labelling, code_labels, in_natural_order
from .metadata import METADATA, labels_in
from .sources import SPLITS, Entry, Listed, is_data, printable

_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(" + "|".join(SPLITS) + r")(?![a-z])")


class FolderSource(Listed):
    """Pictures in class sub-folders, as torchvision's ``ImageFolder`` reads them, with labels from ``metadata.csv`` or
    its like, as ``datasets``' imagefolder reads them, or without labels."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`~comcat.errors.DataError` if the folder holds no pictures, or splits instead of classes."""
        self.name = printable(str(folder))
        self.notes: list[str] = []
        self._root = folder
        found = _look_into(folder)
        if not found.pictures:
            raise _no_pictures(self.name, found)
        labels = labels_in(folder, found.metadata, set(found.pictures), self.notes) if found.metadata else None
        if labels is None:
            self._label_by_folders(found)
        else:
            found.check_splits(self.name, alone=False)
            self._files = sorted(found.pictures)
            raws = [labels.raws.get(file) for file in self._files]
            values, self.labelling = code_labels(raws, self.key, origin=labels.origin)
            self._labels = values or [None] * len(raws)

    def _label_by_folders(self, found: _Found) -> None:
        """Labels by the sub-folder that a picture lies in, unless some lie in none."""
        inside: dict[str, list[str]] = {name: [] for name in found.folders}
        for file in sorted(found.pictures):
            inside.setdefault(file.partition("/")[0], []).append(file)
        if any("/" not in file for file in found.pictures):
            self._files = sorted(found.pictures)
            self._labels = [None] * len(self._files)
            direct = sum("/" not in file for file in self._files)
            if direct < len(self._files):
                self.labelling = Labelling(
                    absent_because=f"because of {counted(direct, 'picture')} directly in {self.name}, its sub-folders "
                    "are not taken for classes and its pictures have no labels"
                )
            return
        found.check_splits(self.name)
        classes = in_natural_order(inside)
        barren = [printable(name) for name in classes if not inside[name]]
        if barren:
            held = f"{counted(len(barren), 'sub-folder')} of {self.name} without pictures"
            self.notes.append(f"{held}, counted as classes: {_some(barren)}")
        deeper = sorted({"/".join(file.split("/")[:2]) for file in found.pictures})
        if all(file.count("/") > 1 for file in found.pictures) and len(deeper) > len(classes):
            self.notes.append(
                f"the classes of {self.name} are its sub-folders ({_some(classes)}), but their pictures lie deeper "
                f"({_some(deeper)}); if those are the classes, open the folder that they lie in"
            )
        self._files = [file for name in classes for file in inside[name]]
        self._labels = [label for label, name in enumerate(classes) for _ in inside[name]]
        names = tuple(printable(name) for name in classes)
        self.labelling = Labelling(origin="class folders", names=names, ordered=True, largest=len(classes) - 1)

    @property
    def count(self) -> int:
        return len(self._files)

    def key(self, position: int) -> str:
        return self._files[position]

    def entry(self, position: int) -> Entry:
        key = self._files[position]
        return Entry(key, self._labels[position], self._root / key)


@dataclass(frozen=True)
class _Found:
    """What lies in a folder, as paths relative to it: pictures and metadata files at any depth, its own sub-folders
    and what else it holds itself."""

    pictures: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def check_splits(self, name: str, *, alone: bool = True) -> None:
        """Raises if the sub-folders that hold pictures are the splits of a data set, or (``alone``) one of them."""
        if any("/" not in file for file in self.pictures):
            return
        holding = sorted({file.partition("/")[0] for file in self.pictures})
        words = [_SPLIT_WORD.findall(folder.lower()) for folder in holding]
        several = all(words) and len({SPLITS[word] for found in words for word in found}) > 1
        if several or (alone and all(folder.lower() in SPLITS for folder in holding)):
            raise DataError(
                f"the sub-folders of {name} are splits, not classes ({_some(holding)}); open one of them, "
                f"such as {name}/{printable(holding[0])}"
            )


def _look_into(root: Path) -> _Found:
    """Everything below a folder but what is hidden or no data. Symbolic links are followed, but not back up."""
    found = _Found()
    waiting = [("", os.path.realpath(root), frozenset[str]())]
    while waiting:
        prefix, real, above = waiting.pop()
        if real in above:
            continue
        for item in os.scandir(root / prefix):
            path = prefix + item.name
            if not is_data(item.name):
                continue
            if _is_folder(item):
                # a link alone leads elsewhere: a real path asks for every folder above it
                place = os.path.realpath(item.path) if item.is_symlink() else os.path.join(real, item.name)
                waiting.append((f"{path}/", place, above | {real}))
                if not prefix:
                    found.folders.append(path)
            elif os.path.splitext(item.name)[1].lower() in SUFFIXES:
                found.pictures.append(path)
            elif item.name in METADATA:
                found.metadata.append(path)
            elif not prefix:
                found.others.append(path)
    return found


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _no_pictures(name: str, found: _Found) -> DataError:
    held = sorted(found.folders + found.others + [file for file in found.metadata if "/" not in file])
    if not held:
        return DataError(f"the folder {name} is empty; expected pictures, or one sub-folder of them a class")
    return DataError(
        f"no pictures in the folder {name}: expected names ending in {' '.join(sorted(SUFFIXES))}, "
        f"found {_some([repr(printable(entry)) for entry in held])}"
    )


def _some(names: list[str] | tuple[str, ...]) -> str:
    """The first few names, for a message."""
    return ", ".join(printable(name) for name in names[:5]) + (", …" if len(names) > 5 else "")

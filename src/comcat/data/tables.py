"""Pictures in rows: parquet files, and data sets of the ``datasets`` library, saved or streamed from the hub."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from .labels import LabelCoder, choose_columns, class_names_of, code_column
from .picture import Content
from .sources import Entry, Listed, guarded, require, shuffled

_READ_ROWS = 64
_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+?)(?::(?P<split>[^:\[\]]+))?(?:\[:(?P<first>\d+)\])?")


class ParquetSource:
    """Parquet files with a column ``image`` (encoded bytes, alone or as ``struct<bytes, path>``) and perhaps ``label``.

    Labels are read at once, pictures row group by row group.
    """

    shuffles_fully = False
    lists_keys = True

    def __init__(self, files: Sequence[Path], root: Path, name: str) -> None:
        """Raises :class:`~comcat.errors.DataError` on damaged files, missing columns and labels that are no classes."""
        parquet = require("pyarrow.parquet", "parquet files")
        self.name = name
        self._files = [(str(file), file.relative_to(root).as_posix()) for file in files]
        self._rows: list[int] = []
        self._groups: list[tuple[int, int, int, int]] = []  # file, row group, its first row in the file, its rows
        columns: _Columns | None = None
        raws: list[object] = []
        for index, (file, _) in enumerate(self._files):
            try:
                with parquet.ParquetFile(file) as opened:
                    found = _parquet_columns(opened.schema_arrow, file)
                    columns = columns or found
                    if (found.image, found.label) != (columns.image, columns.label):
                        ours, first = (f"{c.image!r} and {c.label!r}" for c in (found, columns))
                        raise DataError(f"{file} has the columns {ours}, but {self._files[0][0]} has {first}")
                    if found.label is not None:
                        raws += opened.read(columns=[found.label])[found.label].to_pylist()
                    self._rows.append(opened.metadata.num_rows)
                    first_row = 0
                    for group in range(opened.num_row_groups):
                        rows = opened.metadata.row_group(group).num_rows
                        self._groups.append((index, group, first_row, rows))
                        first_row += rows
            except DataError:
                raise
            except Exception as error:
                raise DataError(f"the parquet file {file} cannot be read: {error}") from error
        if columns is None or not sum(self._rows):
            raise DataError(f"{name} has no rows")
        self._image = columns.image
        self._offsets = [0, *accumulate(self._rows)][:-1]
        self._labels, self.class_names = code_column(raws, columns.class_names, self._key)
        self.has_labels = self._labels is not None

    @property
    def count(self) -> int:
        return sum(self._rows)

    def keys(self) -> Iterator[str]:
        for (_, key), rows in zip(self._files, self._rows, strict=True):
            yield from (f"{key}:{row}" for row in range(rows))

    def _key(self, row: int) -> str:
        """The key of a row counted over all files."""
        index = bisect_right(self._offsets, row) - 1
        return f"{self._files[index][1]}:{row - self._offsets[index]}"

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for index, group, first, rows in shuffled(self._groups, seed):
            file, key = self._files[index]
            wanted = [keep is None or keep(f"{key}:{row}") for row in range(first, first + rows)]
            if not any(wanted):
                continue
            cells = guarded(self._cells(file, group), f"the parquet file {file} cannot be read")
            for row, (cell, is_wanted) in enumerate(zip(cells, wanted, strict=True), first):
                if is_wanted:
                    label = None if self._labels is None else self._labels[self._offsets[index] + row]
                    yield Entry(f"{key}:{row}", label, _content(cell.as_py(), Path(file).parent))

    def _cells(self, file: str, group: int) -> Iterator[Any]:
        """The cells of the picture column in a row group, still arrow's."""
        parquet = require("pyarrow.parquet", "parquet files")
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_READ_ROWS, row_groups=[group], columns=[self._image]):
                yield from batch.column(0)


class SavedSource(Listed):
    """A data set that ``datasets`` wrote with ``save_to_disk``, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`~comcat.errors.DataError` if the folder is damaged, holds several splits or no pictures."""
        datasets = require("datasets", "saved data sets")
        self.name = str(folder)
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise DataError(f"the saved data set {folder} cannot be read: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if len(loaded) != 1:
                raise DataError(
                    f"{folder} holds several splits; open one: {', '.join(str(folder / s) for s in loaded)}"
                )
            loaded = next(iter(loaded.values()))
        if not len(loaded):
            raise DataError(f"{folder} has no rows")
        columns = _declared_columns(loaded.features, self.name)
        self._image = columns.image
        self._data = _undecoded(datasets, loaded, self._image)
        raws = [] if columns.label is None else list(loaded[columns.label])
        self._labels, self.class_names = code_column(raws, columns.class_names, self.key)
        self.has_labels = self._labels is not None

    @property
    def count(self) -> int:
        return len(self._data)

    def key(self, position: int) -> str:
        return f"row:{position}"

    def entry(self, position: int) -> Entry:
        label = None if self._labels is None else self._labels[position]
        return Entry(self.key(position), label, _content(self._data[position][self._image], None))


class HubSource:
    """A split of a hub data set, streamed: each pass reads it from the hub again, as far as it is needed."""

    shuffles_fully = False

    def __init__(self, source: str) -> None:
        """Raises :class:`~comcat.errors.DataError` if the name is malformed or unknown, or lacks the split."""
        datasets = require("datasets", "hub data sets")
        match = _HUB.fullmatch(source)
        if match is None:
            raise DataError(
                f"got {source!r}, expected hf:OWNER/NAME[/CONFIG][:SPLIT][[:FIRST]], such as hf:a/b:train[:5000]"
            )
        self.name = source
        path, config = _hub_name(match["name"])
        try:
            splits = datasets.load_dataset(path, config, streaming=True)
        except Exception as error:
            raise DataError(f"the data set {source!r} cannot be opened: {error}") from error
        split = match["split"]
        if split is None and len(splits) > 1:
            raise DataError(f"{source!r} has several splits; name one: {', '.join(f'{source}:{s}' for s in splits)}")
        split = split or next(iter(splits))
        if split not in splits:
            known = [str(name) for name in splits]
            raise DataError(f"{source!r}: no split {split!r}, there are {', '.join(known)}{nearest(split, known)}")
        data = splits[split]
        if data.features is None:
            raise DataError(f"{source!r} does not say which columns it has, so its pictures cannot be found")
        columns = _declared_columns(data.features, source)
        self._image, self._label = columns.image, columns.label
        self._data = _undecoded(datasets, data, self._image)
        self._split = split
        self._first = None if match["first"] is None else int(match["first"])
        self.count = self._known_count(data.info)
        self.lists_keys = self.count is not None
        self.has_labels, self.class_names = self._peek(columns.class_names)
        self._coder = LabelCoder(self.class_names)

    def keys(self) -> Iterator[str]:
        rows = range(self.count) if self.count is not None else (row for row, _ in self._read())
        return (f"{self._split}:{row}" for row in rows)

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for row, values in self._read():
            key = f"{self._split}:{row}"
            if keep is None or keep(key):
                label = self._coder(values[self._label], key) if self.has_labels and self._label else None
                yield Entry(key, label, _content(values[self._image], None, remote=True))

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = guarded(iter(self._data), f"the data set {self.name!r} cannot be read further")
        return enumerate(islice(rows, self._first))

    def _known_count(self, info: Any) -> int | None:
        split = (info.splits or {}).get(self._split)
        count = split.num_examples if split is not None and split.num_examples else None
        return count if self._first is None or count is None else min(count, self._first)

    def _peek(self, names: tuple[str, ...] | None) -> tuple[bool, tuple[str, ...] | None]:
        """Whether the first row has a label, and the classes; if those are words not listed, all are read."""
        first = next(self._read(), None)
        if first is None:
            raise DataError(f"{self.name!r} has no rows")
        raw = None if self._label is None else first[1][self._label]
        if raw is None or raw == -1:
            return False, None
        if names is None and isinstance(raw, str):
            labels = (values[self._label] for values in islice(self._data.select_columns([self._label]), self._first))
            names = class_names_of(list(guarded(labels, f"the labels of {self.name!r} cannot be read")))
        return True, names


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    class_names: tuple[str, ...] | None


def _declared_columns(features: Any, where: str) -> _Columns:
    """The columns by the types that ``datasets`` gives them."""
    kinds, names = _kinds_of(features.to_dict())
    image, label = choose_columns(kinds, where)
    return _Columns(image, label, names.get(label or ""))


def _parquet_columns(schema: Any, file: str) -> _Columns:
    """The columns by a parquet file's schema, and the types that ``datasets`` wrote into its metadata."""
    from pyarrow import types

    kinds = {field.name: str(field.type) for field in schema}
    names: dict[str, tuple[str, ...]] = {}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        declared, names = _kinds_of(features)
        kinds |= {name: kind for name, kind in declared.items() if name in kinds and kind in ("picture", "class")}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # written by something else than `datasets`: the types alone must do
    image, label = choose_columns(kinds, file)
    kind = schema.field(image).type
    fields = {field.name for field in kind} if types.is_struct(kind) else set()
    if not (fields & {"bytes", "path"} or types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{file}: column {image!r} has the type {kind}; expected binary or struct<bytes, path>")
    if label is not None:
        kind = schema.field(label).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
        if not (numbers or types.is_string(kind) or types.is_large_string(kind)):
            raise DataError(f"{file}: column {label!r} has the type {kind}; expected whole numbers or strings")
    return _Columns(image, label, names.get(label or ""))


def _kinds_of(features: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """From features as JSON: what each column is (see :func:`choose_columns`), and the classes' names."""
    types = {"Image": "picture", "ClassLabel": "class"}
    kinds, names = {}, {}
    for name, feature in features.items():
        kind = feature.get("_type", "?") if isinstance(feature, dict) else "list"
        kinds[name] = types.get(kind, feature.get("dtype", kind) if isinstance(feature, dict) else kind)
        if kind == "ClassLabel" and feature.get("names"):
            names[name] = tuple(feature["names"])
    return kinds, names


def _undecoded(datasets: Any, data: Any, column: str) -> Any:
    """The same data with the pictures left encoded, so that a damaged one can be skipped and threads can decode."""
    if isinstance(data.features[column], datasets.Image):
        return data.cast_column(column, datasets.Image(decode=False))
    return data


def _content(cell: object, folder: Path | None, *, remote: bool = False) -> Content | None:
    """What a cell of the picture column holds: bytes, or a file beside the table (in a stream, maybe a URL)."""
    path = None
    if isinstance(cell, dict):
        path, cell = cell.get("path"), cell.get("bytes")
    if isinstance(cell, bytes):
        return cell
    if not path:
        return None
    if remote and "://" in path:
        return str(path)
    return Path(path) if folder is None else folder / path


def _hub_name(name: str) -> tuple[str, str | None]:
    """Path and configuration: OWNER/NAME/CONFIG has two slashes; a local folder has no configuration."""
    if name.startswith((".", "/", "~")):
        return os.path.expanduser(name), None
    owner_and_name, slash, config = name.rpartition("/")
    return (owner_and_name, config) if slash and "/" in owner_and_name else (name, None)

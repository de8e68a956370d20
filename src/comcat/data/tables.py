"""Pictures in rows: parquet files, and data sets that the ``datasets`` library saved."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import DataError
from .decoding import Content
from .labels import Labelling, choose_columns, code_labels
from .sources import Entry, Listed, guarded, printable, require, shuffled

_READ_ROWS = 64


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
        self.notes: list[str] = []
        self._files = [(str(file), file.relative_to(root).as_posix()) for file in files]
        self._rows: list[int] = []
        self._groups: list[tuple[int, int, int, int]] = []  # file, row group, its first row in the file, its rows
        columns: Columns | None = None
        raws: list[object] = []
        for index, (file, _) in enumerate(self._files):
            try:
                with parquet.ParquetFile(file) as opened:
                    found = _parquet_columns(opened.schema_arrow, file)
                    columns = columns or found
                    _check_agreement(found, file, columns, self._files[0][0])
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
        self._labels, self.labelling = columns.coded(raws, self._key, self.notes)

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
                    yield Entry(f"{key}:{row}", label, content_of(cell.as_py(), Path(file).parent))

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
        self.name, self.notes = printable(str(folder)), []
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
        columns = declared_columns(loaded.features, self.name)
        self._image = columns.image
        self._data = undecoded(datasets, loaded, self._image)
        raws = [] if columns.label is None else list(loaded[columns.label])
        self._labels, self.labelling = columns.coded(raws, self.key, self.notes)

    @property
    def count(self) -> int:
        return len(self._data)

    def key(self, position: int) -> str:
        return f"row:{position}"

    def entry(self, position: int) -> Entry:
        label = None if self._labels is None else self._labels[position]
        return Entry(self.key(position), label, content_of(self._data[position][self._image], None))


@dataclass(frozen=True)
class Columns:
    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    notes: list[str]

    def coded(
        self, raws: list[object], where: Callable[[int], str], notes: list[str]
    ) -> tuple[list[int] | None, Labelling]:
        """The labels of all rows, and what is known of them; what there is to say joins ``notes``."""
        labels, labelling = code_labels(raws, where, origin=f"the column {self.label!r}", names=self.class_names)
        notes += self.notes
        return labels, labelling


def declared_columns(features: Any, where: str) -> Columns:
    """The columns by the types that ``datasets`` gives them."""
    kinds, names = _kinds_of(features.to_dict())
    image, label, notes = choose_columns(kinds, where)
    return Columns(image, label, names.get(label or ""), notes)


def _parquet_columns(schema: Any, file: str) -> Columns:
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
    image, label, notes = choose_columns(kinds, file)
    kind = schema.field(image).type
    fields = {field.name for field in kind} if types.is_struct(kind) else set()
    if not (fields & {"bytes", "path"} or types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{file}: column {image!r} has the type {kind}; expected binary or struct<bytes, path>")
    return Columns(image, label, names.get(label or ""), notes)


def _check_agreement(found: Columns, file: str, columns: Columns, first: str) -> None:
    """Raises unless a parquet file has the same columns and classes as the first."""
    if (found.image, found.label) != (columns.image, columns.label):
        ours, theirs = (f"{c.image!r} and {c.label!r}" for c in (found, columns))
        raise DataError(f"{file} has the columns {ours}, but {first} has {theirs}")
    if found.class_names != columns.class_names:
        raise DataError(
            f"{file} names other classes than {first}, or in another order, so their labels do not go together"
        )


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


def undecoded(datasets: Any, data: Any, column: str) -> Any:
    """The same data with the pictures left encoded, so that a damaged one can be skipped and threads can decode."""
    if isinstance(data.features[column], datasets.Image):
        return data.cast_column(column, datasets.Image(decode=False))
    return data


def content_of(cell: object, folder: Path | None, *, remote: bool = False) -> Content | None:
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

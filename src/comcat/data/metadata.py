"""Labels in ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet``: imagefolder's convention in ``datasets``."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import counted
from ..files import parsed
from .labels import is_missing, no_label_column
from .sources import printable, require

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of the files. A row has ``file_name``, the path of a picture relative to the file, and what is known of it."""


@dataclass(frozen=True)
class MetadataLabels:
    """Labels as metadata files list them, by the path of the picture, and which files those are."""

    raws: Mapping[str, object]
    origin: str


def labels_in(root: Path, files: Iterable[str], pictures: Collection[str], notes: list[str]) -> MetadataLabels | None:
    """The labels in the metadata files below a folder, or None if no file gives any.

    ``files`` and ``pictures`` are paths relative to ``root``. What is wrong with a file joins ``notes``: a file that
    cannot be read or has no ``file_name`` counts as not there, a row without its picture is passed over, and a picture
    with two different labels has none.
    """
    raws: dict[str, object] = {}
    used = []
    for file in sorted(files):
        where = printable(str(root / file))
        try:
            columns, rows = _table(root / file)
        except (OSError, ValueError, csv.Error) as error:
            notes.append(f"{where} cannot be read, so its labels are not known: {error}")
            continue
        if "file_name" not in columns:
            listed = ", ".join(map(repr, columns)) or "none"
            notes.append(f"{where} is not read: it has no column 'file_name'; its columns: {listed}")
        elif "label" not in columns:
            notes += no_label_column(columns, where)
        else:
            used.append(file)
            _add(raws, rows, posixpath.dirname(file), pictures, where, notes)
    if all(is_missing(raw) for raw in raws.values()):
        return None
    return MetadataLabels(raws, " and ".join(map(printable, used[:3])) + (" and others" if len(used) > 3 else ""))


def _add(
    raws: dict[str, object],
    rows: list[dict[str, Any]],
    folder: str,
    pictures: Collection[str],
    where: str,
    notes: list[str],
) -> None:
    """The labels of one file's rows join those of others."""
    absent, torn = [], []
    for row in rows:
        path = _path(folder, row.get("file_name"), pictures)
        if path is None:
            absent.append(repr(row.get("file_name")))
        elif path in raws and str(raws[path]) != str(row.get("label")):
            torn.append(path)
        else:
            raws[path] = row.get("label")
    if absent:
        are = "is" if len(absent) == 1 else "are"
        notes.append(f"{where} names {counted(len(absent), 'picture')} that {are} not there, such as {absent[0]}")
    if torn:
        notes.append(
            f"{where} gives {counted(len(torn), 'picture')} another label than before, such as {printable(torn[0])}"
        )
    raws |= dict.fromkeys(torn)


def _path(folder: str, name: object, pictures: Collection[str]) -> str | None:
    """The picture that a row names, with either slash, or None if there is none."""
    for spelled in (name, name.replace("\\", "/")) if isinstance(name, str) else ():
        path = posixpath.normpath(posixpath.join(folder, spelled))
        if path in pictures:
            return path
    return None


def _table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a metadata file. Raises ``OSError``, ``ValueError`` or ``csv.Error`` where it is damaged."""
    if file.suffix == ".parquet":
        with require("pyarrow.parquet", "metadata in parquet files").ParquetFile(file) as table:
            columns = list(table.schema_arrow.names)
            wanted = [name for name in columns if name in ("file_name", "label")]
            return columns, table.read(columns=wanted).to_pylist()
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            table = csv.DictReader(lines, skipinitialspace=True)
            columns = [name.strip() for name in table.fieldnames or ()]
            table.fieldnames = columns
            return columns, list(table)
        rows = [_json_row(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _json_row(number: int, line: str) -> dict[str, Any]:
    try:
        row = parsed(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row

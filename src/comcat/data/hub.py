"""Pictures in data sets of the Hugging Face hub, streamed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..errors import DataError, nearest
from .labels import LabelCoder, Labelling, class_names_of, is_missing
from .sources import Entry, guarded, require
from .tables import content_of, declared_columns, undecoded

_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+?)(?::(?P<split>[^:\[\]]+))?(?:\[:(?P<first>\d+)\])?")


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
        self.name, self.notes, self._warned = source, [], False
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
        columns = declared_columns(data.features, source)
        self._image, self._label = columns.image, columns.label
        self._data = undecoded(datasets, data, self._image)
        self._split = split
        self._first = None if match["first"] is None else int(match["first"])
        self.count = self._known_count(data.info)
        self.lists_keys = self.count is not None
        self.notes += columns.notes
        self.labelling = self._peek(columns.class_names)
        self._coder = LabelCoder(self.labelling.names)

    def keys(self) -> Iterator[str]:
        rows = range(self.count) if self.count is not None else (row for row, _ in self._read())
        return (f"{self._split}:{row}" for row in rows)

    def entries(self, keep: Callable[[str], bool] | None = None, seed: int | None = None) -> Iterator[Entry]:
        for row, values in self._read():
            key = f"{self._split}:{row}"
            if keep is None or keep(key):
                yield Entry(key, self._code(values, key), content_of(values[self._image], None, remote=True))

    def _code(self, values: Mapping[str, Any], key: str) -> int | None:
        """A row's label as an index; None where the first row had none, with a warning if this one has."""
        raw = None if self._label is None else values[self._label]
        if self.labelling.origin is not None:
            return self._coder(raw, key)
        if not is_missing(raw) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{key} of {self.name} has the label {raw!r}, but the first picture has none: all labels were left out",
                stacklevel=2,
            )
        return None

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        # Batches of one: iterated over row by row, `datasets` gives each worker process of torch a share alone.
        rows = ({name: cells[0] for name, cells in batch.items()} for batch in self._data.iter(batch_size=1))
        return enumerate(islice(guarded(rows, f"the data set {self.name!r} cannot be read further"), self._first))

    def _known_count(self, info: Any) -> int | None:
        split = (info.splits or {}).get(self._split)
        count = split.num_examples if split is not None and split.num_examples else None
        return count if self._first is None or count is None else min(count, self._first)

    def _peek(self, names: tuple[str, ...] | None) -> Labelling:
        """What the first row says of the labels; if they are words that nobody lists, all are read."""
        first = next(self._read(), None)
        if first is None:
            raise DataError(f"{self.name!r} has no rows")
        raw = None if self._label is None else first[1][self._label]
        if is_missing(raw):
            return Labelling()
        ordered = names is None and isinstance(raw, str)
        if ordered:
            labels = (values[self._label] for values in islice(self._data.select_columns([self._label]), self._first))
            names = class_names_of(list(guarded(labels, f"the labels of {self.name!r} cannot be read")))
        return Labelling(origin=f"the column {self._label!r}", names=names, ordered=ordered and names is not None)


def _hub_name(name: str) -> tuple[str, str | None]:
    """Path and configuration: OWNER/NAME/CONFIG has two slashes; a local folder has no configuration."""
    if name.startswith((".", "/", "~")):
        return os.path.expanduser(name), None
    owner_and_name, slash, config = name.rpartition("/")
    return (owner_and_name, config) if slash and "/" in owner_and_name else (name, None)

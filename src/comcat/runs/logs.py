"""The log of a run: one JSON object a line, and the same curve in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import parsed


class Log:
    """Lines of a run, appended to a file as they come; without a file they are in memory alone.

    ``position`` is the file's length in bytes, which a checkpoint notes: a run that goes on from there cuts off what
    came after it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.position = 0

    def begin(self, position: int = 0) -> None:
        """Begin a new file, or go on after its first ``position`` bytes.

        Raises StoreError if it is shorter, damaged, or cannot be written.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() < position:
                    raise StoreError(
                        f"{self.path} has {file.tell()} bytes, the checkpoint knows of {position}: it was changed"
                    )
                file.truncate(position)
            self.lines = [parsed(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise StoreError(f"the log {self.path} cannot be gone on with: {error}") from error
        self.position = position

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises StoreError where that fails, for example because the disk is full."""
        self.lines.append(dict(line))
        if self.path is None:
            return
        text = (json.dumps(dict(line)) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.write(text)
        except OSError as error:
            raise StoreError(f"the log {self.path} cannot be written: {error}") from error
        self.position += len(text)

    def sync(self) -> None:
        """Make sure that all lines are on the disk. Raises StoreError where that fails."""
        if self.path is None or not self.path.exists():
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(f"the log {self.path} cannot be written: {error}") from error


class Meter:
    """Sums over the steps since the last line of the log; plain data, so that a checkpoint can keep them."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self.sums = dict(sums or {})

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, over: str) -> dict[str, float]:
        """The sums divided by one of them, which is left out; that and all others begin anew."""
        count = self.sums.pop(over, 0.0)
        means = {name: value / max(count, 1.0) for name, value in self.sums.items()}
        self.sums = {}
        return means

"""Times kept in the user's cache folder, under one key of machine, library, type and batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import parsed, write_text
from ..machine import environment


class Store:
    """Times kept on the disk, under one key of circumstances."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.about = dict(about)
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.path, self.changed = folder / f"{name}.json", False
        self.times: dict[str, dict[str, float]] = {}
        try:
            held = parsed(self.path.read_text())
            if held.get("about") == self.about:
                self.times = dict(held["times"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no table yet, or one that is damaged: measured anew

    def get(self, name: str) -> dict[str, float] | None:
        return self.times.get(name)

    def put(self, times: Mapping[str, dict[str, float]]) -> None:
        self.times |= times
        self.changed = True

    def save(self) -> None:
        if self.changed:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps({"about": self.about, "times": self.times}, indent=1))
            except OSError:
                pass  # a table that cannot be kept is measured again the next time


def place_of(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "comcat" / "latency"


def circumstances(p: Tensor, batch: int, compile: bool, quick: bool) -> dict[str, Any]:
    """What times depend on beside a part's shape."""
    found = environment()
    return {
        "device": found["device"] if p.device.type == "cuda" else found["cpu"], "where": p.device.type,
        "torch": found["versions"]["torch"], "comcat": found["versions"]["comcat"], "threads": found["threads"],
        "cores": found["cores"], "dtype": str(p.dtype), "batch": batch, "compile": compile, "quick": quick,
        "float32_matmul": found["float32_matmul"],
    }  # fmt: skip

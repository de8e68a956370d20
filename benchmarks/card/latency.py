"""Predicted against measured time of plans under a budget of time on a card: a few of ``benchmarks/latency.py``.

At batch 1 a card waits for Python to launch its kernels, and smaller layers save next to nothing. Where a budget cannot
be met, the row says so in the words of the error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latency

from comcat.errors import ComcatError

PLANS = (
    ("deit_small", "bfloat16", 256, 0.25, "ranks,units"),
    ("deit_base", "bfloat16", 256, 0.35, "ranks,units"),
    ("deit_small", "bfloat16", 256, 0.3, "ranks,units,tokens"),
    ("deit_small", "bfloat16", 1, 0.1, "ranks,units"),
)
TINY = (("tiny", "float32", 4, 0.02, "units"), ("tiny", "float32", 4, 0.99, "units"))


def rows(device: str, *, tiny: bool, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One row a plan, those that were refused with why. ``done`` is told after each."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for plan in TINY if tiny else PLANS:
            name, dtype, batch, reduce, forms = plan
            try:
                row = latency.row(*plan, device=device, cache=Path(cache))
            except ComcatError as error:
                row = {"model": name, "dtype": dtype, "batch": batch, "forms": forms, "target": 1 - reduce}
                row["refused"] = str(error)
                print(f"{name} {dtype} b{batch} {forms}: {error}", flush=True)
            found.append(row)
            done({"rows": found})
    return latency.with_errors(found)

"""Tables, numbers and warnings as the command line prints them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import counted

LABELS = {
    "parameters": "parameters", "macs": "MACs", "size_bytes": "size", "peak_memory_bytes": "peak memory",
    "latency_s": "latency, median", "low_s": "latency, lower quartile",
    "high_s": "latency, upper quartile", "throughput": "throughput", "top1": "top-1", "top5": "top-5", "loss": "loss",
    "agreement": "agreement", "cosine": "cosine agreement",
    "divergence": "KL divergence", "count": "pictures", "compiled_latency_s": "latency, compiled",
}  # fmt: skip


def number(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key in ("parameters", "macs"):
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{value / size:.2f} {unit}"
        return str(int(value))
    if key.endswith("_bytes"):
        return f"{value / 2**20:.1f} MiB"
    if key.endswith("_s"):
        return f"{1e3 * value:.2f} ms"
    if key == "throughput":
        return f"{value:.1f} images/s"
    if key in ("top1", "top5", "agreement"):
        return f"{value:.2f} %"
    return str(int(value)) if key == "count" else f"{value:.4f}"


def print_report(report: Any, seconds: float) -> None:
    rows = []
    for key in ("parameters", "macs", "size_bytes", "latency_s", "throughput", "peak_memory_bytes", "top1", "loss"):
        old, new = report.before.get(key), report.after.get(key)
        if old is not None and new is not None:
            change = f"{new - old:+.2f} points" if key == "top1" else f"{100 * (new / old - 1):+.1f} %" if old else ""
            rows.append([LABELS[key], number(key, old), number(key, new), change])
    print()
    table(["", "before", "after", "change"], rows)
    said = [
        f"{LABELS[k]} {number(k, report.agreement[k])}"
        for k in ("agreement", "cosine", "divergence")
        if report.agreement.get(k) is not None
    ]
    if said:
        print(
            f"\nAgainst the model before, on {counted(int(report.agreement['count'] or 0), 'picture')}: "
            f"{', '.join(said)}."
        )
    if report.predicted_loss is not None and report.measured_loss is not None:
        print(f"Rise of the loss: predicted {report.predicted_loss:.4f}, measured {report.measured_loss:.4f} nats.")
    for note in report.notes:
        print(note)
    print(f"Took {seconds:.0f} s.")


def table(head: list[str], rows: list[list[str]], *, left: Collection[int] = ()) -> None:
    """Print a table. The first column and those at ``left`` begin at the left, the others end at the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for i, row in enumerate([head, *rows]):
        print(
            "  ".join(
                c.ljust(w) if j == 0 or j in left else c.rjust(w)
                for j, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
        if i == 0:
            print("  ".join("─" * w for w in widths))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line without the file that they come from; of a hub that is away, one line that it is tried
    again.
    """
    formatted, hub, once = warnings.formatwarning, logging.getLogger("huggingface_hub.utils._http"), _FirstRetry()
    warnings.formatwarning = lambda message, *where, **more: f"comcat: warning: {' '.join(str(message).split())}\n"
    hub.addFilter(once)
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        hub.removeFilter(once)


class _FirstRetry(logging.Filter):
    """Lets pass the first line about another try, and none of those that tell why."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" in text:
            return False
        if "[Retry " not in text:
            return True
        first, self.told = not self.told, True
        return first

"""What the commands of README and how-to take on this machine, from the shell to the last line: seconds and bytes.

    python benchmarks/commands.py                          # all of them, one after the other; needs a quiet machine
    python benchmarks/commands.py --only explore faster

``explore``: the page of every budget of a DeiT-small, 256 pictures; goal: four minutes and 1.5 MB. ``faster``: a
DeiT-small that takes 30 % of its time at batch 16, by one command; goal: measured at least three times as fast.
``tiny``: a DeiT-tiny at 55 % of its time, 1.8 times as fast (CAIT's abstract says 1.7 for DeiT-tiny, 1.9 for small).
``demo``: the embedded demo of a new concept, the first time; goal: six minutes. Weights of DeiT-small are random: they
say nothing of accuracy, and times do not depend on them. Rows that are not asked for stay as they were measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

DEIT = ["timm:deit_small_patch16_224", "--no-pretrained", "--data", "{data}"]
COMMANDS: dict[str, list[str]] = {
    "explore": ["explore", *DEIT, "--pictures", "256", "--out", "explore.html"],
    "faster": [
        "compress", *DEIT, "--pictures", "64", "--eval-limit", "32", "--budget", "latency", "--reduce", "0.7",
        "--batch", "16", "--batch-size", "16", "--forms", "ranks,units,tokens", "--quick", "--out", "small",
    ],
    "tiny": [
        "compress", *(w.replace("small", "tiny") for w in DEIT), "--pictures", "64", "--eval-limit", "32", "--budget",
        "latency", "--reduce", "0.45", "--batch", "16", "--batch-size", "16", "--forms", "ranks,units,tokens",
        "--quick", "--out", "small",
    ],
    "demo": ["demo", "customize", "--out", "demo"],
}  # fmt: skip
BEFORE_AFTER = ("before", "after")


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = common.parser(__doc__)
    p.add_argument("--only", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    p.add_argument("--data", default=str(common.SHARED / "data" / "cifar10" / "train.parquet"))
    a = p.parse_args(given)
    rows = {name: run(name, a.data) | {"date": time.strftime("%Y-%m-%d")} for name in a.only}
    for name, row in rows.items():
        print(name, {k: v for k, v in row.items() if k != "command"})
    if not a.no_write:
        path = common.RESULTS / common.machine() / "commands.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else {}
        common.write("commands", {"rows": {name: (kept | rows)[name] for name in COMMANDS if name in kept | rows}})
    return rows


def run(name: str, data: str) -> dict[str, Any]:
    """One command in a fresh folder and with an empty cache."""
    words = [word.format(data=Path(data).resolve()) for word in COMMANDS[name]]
    with tempfile.TemporaryDirectory() as folder:
        fresh = os.environ | {"XDG_CACHE_HOME": str(Path(folder) / "cache")}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "-m", "comcat", *words], cwd=folder, env=fresh, check=True)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "command": f"comcat {' '.join(COMMANDS[name])}", "seconds": seconds,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            **(FACTS[name](Path(folder)) if name in FACTS else {}),
        }  # fmt: skip


def page(folder: Path) -> dict[str, Any]:
    return {"bytes": (folder / "explore.html").stat().st_size}


def speed(folder: Path) -> dict[str, Any]:
    before, after = (json.loads((folder / "small" / "config.json").read_text())["results"][k] for k in BEFORE_AFTER)
    return {
        "speed_up": before["latency_s"] / after["latency_s"],
        "latency_s": [before["latency_s"], after["latency_s"]],
    }


FACTS: dict[str, Callable[[Path], dict[str, Any]]] = {"explore": page, "faster": speed, "tiny": speed}


if __name__ == "__main__":
    main()

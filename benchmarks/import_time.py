"""What ``import comcat`` adds to ``import torch``: medians over fresh processes in turns. Goal: at most 0.3 s."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from common import parser, write


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    seconds: dict[str, list[float]] = {
        "import torch": [],
        "import torch, comcat": [],
        "import torch, comcat; comcat.compress": [],
    }
    for _ in range(a.repeats):
        for code, times in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - start)
    base = seconds["import torch"]
    added = {
        k: median([x - y for x, y in zip(v, base, strict=True)]) for k, v in seconds.items() if k != "import torch"
    }
    summary = (
        f"`import torch` takes {median(base):.2f} s; `import comcat` adds {added['import torch, comcat']:.3f} "
        f"s, and reaching for `comcat.compress` {added['import torch, comcat; comcat.compress']:.2f} s."
    )
    print(summary)
    if not a.no_write:
        write(
            "import",
            {
                "seconds": {k: median(v) for k, v in seconds.items()},
                "added": added,
                "samples": seconds,
                "summary": summary,
            },
        )


if __name__ == "__main__":
    main()

"""Calibrating DeiT-small at 224 on 128 pictures: how much more than the forward passes alone, and whether memory grows
with pictures.

Goals: ``activation`` at most 1.5× the forward passes, ``loss`` at most 5×, peak memory flat in the number of pictures.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from common import interleaved, parser, random_pictures, vit, write

from comcat.hosts import find_sites
from comcat.statistics import calibrate


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--pictures", type=int, default=128)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--memory-of", type=str, default=None, help=argparse_note())
    a = p.parse_args()
    model = vit(a.model, a.device)
    sites = find_sites(model)
    if a.memory_of:
        calibrate(model, _stream(a.pictures, a.batch_size), statistic=a.memory_of, sites=sites)
        # not ru_maxrss, which a child process takes over from its parent
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        return
    batches = random_pictures(a.pictures, a.batch_size, device=a.device)

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    calls = {
        "forward": forward,
        "activation": lambda: calibrate(model, batches, statistic="activation", sites=sites),
        "loss": lambda: calibrate(model, batches, statistic="loss", sites=sites),
    }
    interleaved(calls, 1)
    seconds = interleaved(calls, a.repeats)
    times = {k: median(v) for k, v in seconds.items()}
    ratios = {
        k: median([s / f for s, f in zip(seconds[k], seconds["forward"], strict=True)]) for k in ("activation", "loss")
    }
    memory = {}
    for statistic in ("activation", "loss"):
        for pictures in (a.batch_size, 4 * a.batch_size, 8 * a.batch_size):
            done = subprocess.run(
                [sys.executable, __file__, "--model", a.model, "--memory-of", statistic, "--pictures", str(pictures),
                    "--batch-size", str(a.batch_size), "--device", a.device],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            memory[f"{statistic}-{pictures}"] = int(done.stdout.split()[-1])
    print(
        f"{a.model}, {a.pictures} pictures: forward {times['forward']:.1f} s, activation {ratios['activation']:.2f}×, "
        f"loss {ratios['loss']:.2f}×"
    )
    for k, v in memory.items():
        print(f"  peak resident memory, {k} pictures: {v / 2**20:.0f} MiB")
    if not a.no_write:
        write(
            f"calibrate-{a.model}",
            {
                "seconds": times,
                "ratios": ratios,
                "samples": seconds,
                "peak_rss_bytes": memory,
                "pictures": a.pictures,
                "batch_size": a.batch_size,
            },
        )


def argparse_note() -> str:
    return (
        "calibrate once with this statistic on a stream of pictures and print the peak resident memory (used by "
        "the script itself)"
    )


def _stream(pictures: int, batch: int):
    for i in range(0, pictures, batch):
        yield torch.randn(min(batch, pictures - i), 3, 224, 224, generator=torch.Generator().manual_seed(i))


if __name__ == "__main__":
    main()

"""Everything that is measured on one card, in at most eight minutes, one result a part.

    make gpu                                        # all that is not there yet, into benchmarks/results/<the card>/
    python benchmarks/gpu.py --parts speed-small    # some of it
    python benchmarks/gpu.py --device cpu --tiny    # that everything runs

Speed of DeiT-small −50 % and DeiT-base −61 %, and of DeiT-tiny and DeiT-small with fewer tokens
(``benchmarks/card/speed.py``), predicted and measured time under a budget of time (``benchmarks/card/latency.py``),
accuracy on real weights (``benchmarks/card/accuracy.py``), the cost of an adapter's training step
(``benchmarks/card/adapter.py``). Each part runs in a process of its own and is stopped at its time limit. Its result is
written as soon as it is done, and then it is not run again: remove the file to have it anew. What a part had when it
was stopped is kept as ``<part>.partial.json``. The exit status is 1 where a part failed or was not begun.

Real weights and pictures are read from ``.gpu/``, which ``python benchmarks/gpu_pack.py`` makes where there is a
network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from comcat.errors import ComcatError
from comcat.files import write_json
from comcat.measure import environment

ROOT = Path(__file__).resolve().parents[1]
LEAST = 15.0
"""Seconds under which no part is begun."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: how it is run, and its time limit in seconds."""

    run: Callable[[argparse.Namespace], dict[str, Any]]
    seconds: float


def main(given: list[str] | None = None) -> int:
    a = arguments(given)
    if a.one:
        return run_one(a.one, a)
    began, missing = time.perf_counter(), []
    for name in a.parts or PARTS:
        path = a.out / f"{name}.json"
        if path.is_file():
            print(f"{name}: kept, {path}", flush=True)
            continue
        left = 60 * a.minutes - (time.perf_counter() - began)
        limit = min(PARTS[name].seconds if a.limit is None else a.limit, left)
        told = f"not begun, {left:.0f} s are left" if left < LEAST else in_process(name, limit, a)
        print(f"{name}: {told or 'done'}, {time.perf_counter() - began:.0f} s since the start", flush=True)
        if told:
            missing.append(f"{name} ({told})")
    if missing:
        print(f"error: without {'; '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def arguments(given: list[str] | None) -> argparse.Namespace:
    p = common.parser(__doc__)
    p.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results/<the card>/")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="NAME", help=f"of {', '.join(PARTS)}")
    p.add_argument("--packed", type=Path, default=ROOT / ".gpu", help="what benchmarks/gpu_pack.py packed")
    p.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    p.add_argument("--limit", type=float, help="seconds for each part, instead of its own limit")
    p.add_argument("--tiny", action="store_true", help="tiny settings, to see that everything runs")
    p.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)  # run this part here
    a = p.parse_args(given)
    a.out = a.out or common.RESULTS / common.machine()
    a.given = sys.argv[1:] if given is None else given
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        p.error(f"got --device {a.device}, but torch sees no card; expected cpu")
    return a


def in_process(name: str, limit: float, a: argparse.Namespace) -> str | None:
    """Run a part in a process of its own; what went wrong, or None."""
    words = [sys.executable, "-u", str(Path(__file__).resolve()), *a.given, "--one", name, "--limit", str(limit)]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too
            process.wait()
    return f"failed with status {status}" if status else None


def run_one(name: str, a: argparse.Namespace) -> int:
    """Run a part here and write its result."""
    start = time.perf_counter()
    try:
        result = PARTS[name].run(a)
    except ComcatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_part(a, name, {"seconds": time.perf_counter() - start, **result})
    partial_path(a, name).unlink(missing_ok=True)
    return 0


def write_part(a: argparse.Namespace, name: str, result: Mapping[str, Any], *, whole: bool = True) -> None:
    """A part's result with what it was measured on."""
    about = {
        "benchmark": f"gpu {name}", "command": "python benchmarks/gpu.py " + " ".join(a.given),
        "date": time.strftime("%Y-%m-%d"), "environment": environment(), "tiny": a.tiny, "whole": whole,
    }  # fmt: skip
    write_json(a.out / f"{name}.json" if whole else partial_path(a, name), about | dict(result))


def partial_path(a: argparse.Namespace, name: str) -> Path:
    return a.out / f"{name}.partial.json"


def speed(
    model: str, reduce: float, modes: tuple[str, ...], name: str, a: argparse.Namespace, *, keep: float = 1.0
) -> dict[str, Any]:
    """Time of one model in some modes, at batch 256 and 1."""
    from card.speed import Subject, Timer, kept_plans, made_plans

    arguments = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2} if a.tiny else {}
    subject = Subject(
        model=model, reduce=0.2 if a.tiny else reduce, keep=keep, multiple=4 if a.tiny else 16,
        size=32 if a.tiny else 224, pictures=4 if a.tiny else 64, arguments=arguments,
    )  # fmt: skip
    start = time.perf_counter()
    earlier = a.out / f"{name.removesuffix('-compiled')}.json"
    plans = kept_plans(earlier, subject) or made_plans(subject, a.device)
    about = {
        "subject": asdict(subject), "plan_seconds": time.perf_counter() - start,
        "plans": {n: p.to_dict() for n, p in plans.items()},
    }  # fmt: skip
    print(f"plans made in {about['plan_seconds']:.0f} s", flush=True)
    timer = Timer(
        device=a.device, repeats=2 if a.tiny else 30, min_seconds=0 if a.tiny else 1.0,
        done=lambda rows: write_part(a, name, {**about, "rows": rows}, whole=False),
    )  # fmt: skip
    cells = [(mode, batch) for mode in modes for batch in ((2, 1) if a.tiny else (256, 1))]
    if a.device.startswith("cuda") and "eager" in modes:
        cells.append(("graph", 1))
    return {**about, "rows": timer.rows(subject, plans, cells)}


def latency(a: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured time of plans under a budget of time."""
    from card.latency import rows

    return rows(a.device, tiny=a.tiny, done=lambda result: write_part(a, "latency", result, whole=False))


def accuracy(a: argparse.Namespace) -> dict[str, Any]:
    """Top-1 of the packed classifier."""
    from card.packed import Packed

    packed = Packed(a.packed)  # what is not there is told before the models' libraries are imported
    from card.accuracy import Judging

    judging = Judging(
        device=a.device, budgets=(0.2, 0.3) if a.tiny else (0.2, 0.3, 0.4, 0.5, 0.6), seeds=packed.seeds() or 1,
        pictures=8 if a.tiny else 512, judged=20 if a.tiny else None,
        seconds=(a.limit or PARTS["accuracy"].seconds) - 15,  # what it takes to begin and to end
        done=lambda result: write_part(a, "accuracy", result, whole=False),
    )  # fmt: skip
    return judging.result(packed)


def adapter(model: str, a: argparse.Namespace) -> dict[str, Any]:
    """An adapter's training step."""
    from card.adapter import cost

    return cost("sd14" if a.tiny else model, a.device, tiny=a.tiny)


def transformer(side: int, a: argparse.Namespace) -> dict[str, Any]:
    """An adapter's training step in FLUX.2 [klein]'s transformer alone."""
    from card.adapter import klein

    return klein(side, a.device, tiny=a.tiny)


SMALL, BASE = ("deit_small_patch16_224", 0.5), ("deit_base_patch16_224", 0.61)
FEWER_SMALL, FEWER_TINY = ("deit_small_patch16_224", 0.3), ("deit_tiny_patch16_224", 0.3)
PARTS: dict[str, Part] = {
    "speed-small": Part(run=partial(speed, *SMALL, ("eager",), "speed-small"), seconds=60),
    "speed-base": Part(run=partial(speed, *BASE, ("eager",), "speed-base"), seconds=90),
    "tokens-small": Part(run=partial(speed, *FEWER_SMALL, ("eager",), "tokens-small", keep=0.7), seconds=70),
    "tokens-tiny": Part(run=partial(speed, *FEWER_TINY, ("eager",), "tokens-tiny", keep=0.7), seconds=60),
    "latency": Part(run=latency, seconds=110),
    "speed-small-compiled": Part(run=partial(speed, *SMALL, ("compiled",), "speed-small-compiled"), seconds=110),
    "speed-base-compiled": Part(run=partial(speed, *BASE, ("compiled",), "speed-base-compiled"), seconds=120),
    "accuracy": Part(run=accuracy, seconds=120),
    "adapter-sd14": Part(run=partial(adapter, "sd14"), seconds=90),
    "adapter-sdxl": Part(run=partial(adapter, "sdxl"), seconds=120),
    "adapter-klein-512": Part(run=partial(transformer, 512), seconds=90),
    "adapter-klein-1024": Part(run=partial(transformer, 1024), seconds=120),
}

if __name__ == "__main__":
    sys.exit(main())

"""How the cost of compressing grows with the model: seconds, peak memory and bytes, step by step, on true shapes.

    python benchmarks/growth.py                                  # DeiT-T, S, B, ViT-L and ViT-H; half of the parameters
    python benchmarks/growth.py --models deit_tiny_patch16_224 --pictures 16

Weights are random, pictures are noise: shapes alone decide the cost. Each model runs in a process of its own, and what
is done is kept in ``--work``, so a killed run goes on. The yardstick is the model's own forward on the same pictures:
no step may grow faster than a constant times that, and the table says the constants.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import kept_result, parser, random_pictures, rows_of, vit, where, write

import comcat
from comcat.factors import spectra
from comcat.hosts import find_sites
from comcat.methods.allocate import of_forms, shrinkable
from comcat.statistics import calibrate

MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)


def main(given: list[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--models", nargs="+", default=list(MODELS))
    p.add_argument("--pictures", type=int, default=64)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--reduce", type=float, default=0.5)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-growth"), help="finished models")
    p.add_argument("--one", help="measure this model here, and print the result")
    a = p.parse_args(given)
    if a.one:
        torch.set_num_threads(a.threads)
        print(json.dumps(measure(a.one, a.pictures, a.batch, a.reduce, a.device)))
        return {}
    rows = []
    for name in a.models:
        asked = {"model": name, **{k: getattr(a, k) for k in ("pictures", "batch", "reduce", "device", "threads")}}
        rows.append(kept_result(a.work / f"{name}.json", asked, lambda name=name: _alone(name, a)))
        print(f"{name}: {json.dumps(rows[-1]['seconds'])}", flush=True)
    settings = {k: getattr(a, k) for k in ("pictures", "batch", "reduce", "threads")}
    result = {"settings": settings, "rows": rows}
    if not a.no_write:
        write("growth", result)
    return result


def _alone(name: str, a: Any) -> dict[str, Any]:
    words = {k: getattr(a, k) for k in ("pictures", "batch", "reduce", "threads", "device")}
    command = [sys.executable, __file__, "--one", name, *(w for k, v in words.items() for w in (f"--{k}", str(v)))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, pictures: int, batch: int, reduce: float, device: str) -> dict[str, Any]:
    """Every step of compressing one model, once."""
    model = vit(name, device)
    batches = random_pictures(pictures, batch, device=device)
    row: dict[str, Any] = {"model": name, "parameters": comcat.count_parameters(model), "seconds": {}, "peak_bytes": {}}

    def step(called: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        row["seconds"][called] = time.perf_counter() - start
        row["peak_bytes"][called] = _peak()
        return found

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    with torch.no_grad():
        model(batches[0])
    step("forward", forward)
    sites = shrinkable(step("sites", lambda: find_sites(model)))
    statistic = step("calibrate", lambda: calibrate(model, batches, statistic="loss", sites=sites))
    ladders = step("ladders", lambda: spectra(model, of_forms(sites, ("ranks", "units")), statistic))
    plan = step(
        "choose",
        lambda: comcat.allocate(model, statistic, reduce=reduce, sites=sites, factorizations=ladders),
    )
    step("apply", lambda: comcat.apply_(model, plan, statistic, sites=sites, factorizations=ladders))
    with tempfile.TemporaryDirectory() as folder:
        step("save", lambda: comcat.save(model, f"{folder}/small", plan=plan))
        saved = sum(p.stat().st_size for p in Path(folder, "small").rglob("*") if p.is_file())
    return {**row, "kept": comcat.count_parameters(model) / row["parameters"], "saved_bytes": saved}


def _peak() -> int:
    """The most memory that this process held so far; not ru_maxrss, which a child takes over from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def page(r: dict[str, Any]) -> str:
    """The section of the page of results."""
    steps = [k for k in r["rows"][0]["seconds"] if k != "forward"]
    rows = []
    for x in r["rows"]:
        forward = x["seconds"]["forward"]
        times = [f"{x['seconds'][k]:.1f} ({x['seconds'][k] / forward:.2f})" for k in steps]
        peak = max(x["peak_bytes"].values()) / 2**30
        rows.append([x["model"], x["parameters"] / 1e6, forward, *times, peak, x["saved_bytes"] / 1e6])
    head = ["model", "M parameters", "forward, s", *(f"{k}, s" for k in steps), "peak GiB", "saved MB"]
    worst = {k: max(x["seconds"][k] / x["seconds"]["forward"] for x in r["rows"]) for k in steps}
    told = ", ".join(f"{k} {v:.2f}" for k, v in worst.items())
    about = r["settings"]
    return (
        f"True shapes, random weights, {about['pictures']} pictures, float32; −{100 * about['reduce']:g} % of the "
        f"parameters. In brackets: times the model's own forward on the same pictures. At most: {told}. "
        "Ladders decompose matrices, which grows with the cube of the width, and a forward with its square: their "
        "share is the one that rises with the model.\n\n"
        f"{rows_of(head, rows)}\n\n{where(r)}"
    )


if __name__ == "__main__":
    main()

"""Predicted against measured time of whole plans under a budget of time, on true shapes with random weights.

    python benchmarks/latency.py                     # 12 plans, eager
    python benchmarks/latency.py --device cuda --dtypes bfloat16 --batches 1 256

Parts are timed once a model, type and batch; a plan is chosen for a share of the time, without a look at the whole, and
then timed whole beside the dense model in one interleaved run. Goal: within 7 % on the mean, 12 % at worst. What the
choice minimises has no meaning with random weights; what is measured has.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import kept_result, parser, random_pictures, shaped, table, vit, write

import comcat
from comcat.measure import benchmark, ratio
from comcat.measure.latency import measure_latency
from comcat.methods.allocate import allocate, shrinkable
from comcat.methods.ladders import searchable
from comcat.methods.merging.merge import blank_tokens
from comcat.methods.request import blank_spectrum

DINO = {"model": "vit_small_patch14_dinov2", "img_size": 224}
TINY = {
    "model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "embed_dim": 384, "depth": 2, "num_heads": 6,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"model": "deit_tiny_patch16_224"},
    "deit_small": {"model": "deit_small_patch16_224"},
    "deit_base": {"model": "deit_base_patch16_224"},
    "dinov2_small": DINO,
    "tiny": TINY,
}
PLANS = (
    ("deit_tiny", "float32", 1, 0.3, "ranks,units"), ("deit_tiny", "float32", 16, 0.5, "ranks,units,tokens"),
    ("deit_tiny", "bfloat16", 16, 0.3, "ranks,units"), ("deit_small", "float32", 1, 0.5, "ranks,units"),
    ("deit_small", "float32", 16, 0.5, "ranks,units"), ("deit_small", "float32", 16, 0.6, "ranks,units,tokens"),
    ("deit_small", "bfloat16", 1, 0.25, "ranks,units"), ("deit_small", "bfloat16", 16, 0.5, "ranks,units,tokens"),
    ("deit_base", "float32", 1, 0.5, "ranks,units"), ("deit_base", "float32", 16, 0.5, "ranks,units"),
    ("dinov2_small", "float32", 16, 0.5, "ranks,units,tokens"), ("dinov2_small", "bfloat16", 16, 0.2, "units"),
)  # fmt: skip


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--models", nargs="*", default=sorted({plan[0] for plan in PLANS}))
    p.add_argument("--dtypes", nargs="*", help="only plans of these types, or with --batches all models at them")
    p.add_argument("--batches", type=int, nargs="*", help="instead of the 12 plans: every model at these batches")
    p.add_argument("--name", default="latency")
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-latency"), help="finished rows")
    a = p.parse_args()
    plans = [plan for plan in PLANS if plan[0] in a.models and (not a.dtypes or plan[1] in a.dtypes)]
    if a.batches:
        plans = [(m, d, b, 0.5, "ranks,units") for m in a.models for d in a.dtypes or ["float32"] for b in a.batches]
    rows = []
    for plan in plans:
        path = a.work / ("-".join(map(str, plan)) + f"-{a.device}.json")
        rows.append(kept_result(path, {"plan": plan}, partial(row, *plan, device=a.device)))
    shown = []
    for r in rows:
        what = f"{r['model']} {r['dtype']} b{r['batch']} {r['forms']}"
        shown.append([what, r["dense_ms"], r["target"], r["predicted"], r["measured"], f"{100 * r['error']:+.1f} %"])
    table(["plan", "dense ms", "asked", "predicted", "measured", "error"], shown)
    result = with_errors(rows)
    print(f"mean {100 * result['mean_error']:.1f} %, worst {100 * result['worst_error']:.1f} %")
    if not a.no_write:
        write(a.name, result)


def with_errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with their mean and worst error; None where every plan was refused."""
    errors = [abs(r["error"]) for r in rows if "error" in r]
    mean = sum(errors) / len(errors) if errors else None
    return {"rows": rows, "mean_error": mean, "worst_error": max(errors, default=None)}


def row(
    name: str, dtype: str, batch: int, reduce: float, forms: str, *, device: str, cache: Path | None = None
) -> dict[str, Any]:
    """One plan: chosen by the parts' times, then measured whole. ``cache`` is a folder of parts timed before."""
    settings = dict(MODELS[name])
    model = vit(settings.pop("model"), device, **settings).to(getattr(torch, dtype))
    example = random_pictures(1, 1, settings.get("img_size", 224), device)[0].to(getattr(torch, dtype))
    sites = shrinkable(comcat.find_sites(model))
    ladders = blank_tokens(model, example) if "tokens" in forms else []
    with tempfile.TemporaryDirectory() as fresh:
        latency = measure_latency(
            model, sites, example, tokens=[t.site for t in ladders], batch=batch, cache=cache or Path(fresh)
        )  # fmt: skip
    spectra = {n: blank_spectrum(site) for n, site in sites.items()}
    plan = allocate(
        model, _Loss(), reduce=reduce, forms=forms, budget="latency", sites=sites, factorizations=spectra, multiple=8,
        tie=True, total=latency.whole, cost=latency, tokens=ladders,
    )  # fmt: skip
    small = shaped(model, plan, sites)
    images = torch.randn(batch, *example.shape[1:], device=device, dtype=example.dtype)
    timings = benchmark({"dense": model, "small": small}, images, repeats=11, min_seconds=2.0)
    speed = ratio(timings, "small", "dense")
    measured, predicted = speed[0], 1 - plan.made_by["saved"]
    r = {
        "model": name, "dtype": dtype, "batch": batch, "forms": forms, "dense_ms": 1e3 * timings["dense"].median_s,
        "target": 1 - reduce, "predicted": predicted, "measured": measured, "measured_quartiles": speed[1:],
        "error": predicted / measured - 1, "facts": dict(latency.facts), "sites": len(searchable(sites)),
    }  # fmt: skip
    print(f"{name} {dtype} b{batch} {forms}: predicted {predicted:.3f}, measured {measured:.3f}", flush=True)
    return r


class _Loss:
    """Every column loses the same, in nats, so that all forms can be weighed."""

    name, zero_biases = "loss", False


if __name__ == "__main__":
    main()

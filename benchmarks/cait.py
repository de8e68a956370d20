"""Tokens and channels after a short tuning, at measured speed: the claims of CAIT on models that are here.

    python benchmarks/cait.py                              # the small CIFAR ViT, one epoch a run, 3 seeds
    python benchmarks/cait.py --variants dense both --seeds 1
    python benchmarks/cait.py --model dinov2-small --epochs 0.1 --lr 2e-5 --judged 2000 --name cait-dinov2-small

For every variant and seed: a plan that saves a share of the MACs (channels: ranks and hidden units; tokens: look-alikes
or windows of the grid; both: the one choice over all), the closed-form weights, and the same tuning with the model
before compression as the teacher. Accuracy is on the validation pictures, before and after the tuning. At the end
all plans are timed beside the dense model in one interleaved run at batch 16. The dense model is tuned as well, so
that tuning itself is not taken for a gain. Goal: at least 1.9 times as fast with at most 0.5 points lost. Finished runs
are kept, so the script can be stopped and goes on.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import torch

import comcat
from comcat.measure import benchmark, ratio
from comcat.plan import Plan

TUNE: dict[str, Any] = {"batch_size": 128, "lr": 1e-4, "crop_scale": (0.6, 1.0), "precision": "bf16"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "channels": {"forms": "ranks,units", "reduce": 0.55},
    "look-alikes": {"how": "similar", "keep": 0.55},
    "grid": {"how": "grid", "keep": 0.55},
    "both": {"forms": "ranks,units,tokens", "reduce": 0.6},
    "both, more": {"forms": "ranks,units,tokens", "reduce": 0.7},
    "channels, half the time": {"forms": "ranks,units", "budget": "latency", "reduce": 0.5, "batch": 16},
    "both, half the time": {"forms": "ranks,units,tokens", "budget": "latency", "reduce": 0.5, "batch": 16},
}


def main() -> None:
    p = common.training_parser(__doc__, "cait")
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--judged", type=int, help="judge so many validation pictures; by default all")
    p.add_argument("--lr", type=float, default=TUNE["lr"], help="of tuning")
    a = p.parse_args()
    model, train, judged = common.opened(a)
    if a.judged:
        judged = judged.take(a.judged, 0)
    dense = common.top1(model, judged)
    runs = []
    for seed in range(a.seeds):
        for variant in a.variants:
            path = a.work / Path(a.model).name / f"{variant}-{seed}-{a.epochs:g}.json"
            asked = {k: getattr(a, k) for k in ("limit", "pictures", "data", "eval")}
            asked |= {"tune": TUNE | {"lr": a.lr}, "variant": VARIANTS[variant]}
            asked |= {"judged": a.judged} if a.judged else {}
            run = common.kept_result(path, asked, partial(one_run, a, model, train, judged, variant, seed))
            print(f"{variant} seed {seed}: {run['before']:.2f} → {run['after']:.2f} ({dense:.2f} dense)", flush=True)
            runs.append(run)
    rows = summary(runs, timed(model, runs))
    for row in rows:
        print(row)
    if not a.no_write:
        shown = [{k: v for k, v in run.items() if k != "plan"} for run in runs]
        settings = {**common.settings_of(a), "tune": TUNE | {"lr": a.lr}}
        common.write(a.name, {"dense": dense, "settings": settings, "rows": rows, "runs": shown})


def plan_for(a: Any, model: torch.nn.Module, train: Any, variant: str, seed: int) -> tuple[torch.nn.Module, Plan]:
    """The model as a variant has it, with closed-form weights, and its plan."""
    wish, calibration = VARIANTS[variant], comcat.batches(train.take(a.pictures, seed), comcat.preprocess_of(model))
    if not wish:
        return copy.deepcopy(model), Plan(sites={})
    if "forms" in wish:
        asked = {"budget": "macs", "only": ("blocks",), "pictures": a.pictures, "seed": seed, **wish}
        small: Any = comcat.compress(model, calibration, **asked)
        return small, small.comcat_record.plan
    plan = comcat.merge(model, calibration, **wish)
    return comcat.compress(model, calibration, plan=plan), plan


def one_run(a: Any, model: torch.nn.Module, train: Any, judged: Any, variant: str, seed: int) -> dict[str, Any]:
    """One variant: before and after the tuning."""
    small, plan = plan_for(a, model, train, variant, seed)
    example = torch.zeros(1, 3, *comcat.preprocess_of(model).size)
    before, start = common.top1(small, judged), time.monotonic()
    tuned = comcat.tune(small, train, teacher=model, epochs=a.epochs, seed=seed, **TUNE | {"lr": a.lr})
    return {
        "variant": variant, "seed": seed, "before": before, "after": common.top1(tuned, judged),
        "macs": comcat.count_macs(small, example) / comcat.count_macs(model, example),
        "parameters": comcat.count_parameters(small) / comcat.count_parameters(model),
        "tuning_s": time.monotonic() - start, "plan": plan.to_dict(),
    }  # fmt: skip


def timed(model: torch.nn.Module, runs: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Speed-up of each variant over the dense model at batch 16, all plans of all seeds in one interleaved run.

    Median and quartiles, each the mean over the seeds.
    """
    models = {"dense": model}
    for run in runs:
        if run["plan"]["sites"]:
            models[f"{run['variant']}-{run['seed']}"] = small = copy.deepcopy(model)
            comcat.apply_(small, Plan.from_dict(run["plan"]))
    images = torch.randn(16, 3, *comcat.preprocess_of(model).size, generator=torch.Generator().manual_seed(0))
    timings = benchmark(models, images, repeats=21, min_seconds=2.0)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for run in runs:
        if run["plan"]["sites"]:
            speed = ratio(timings, "dense", f"{run['variant']}-{run['seed']}")
            run["speed_up"] = speed
            found.setdefault(run["variant"], []).append(speed)
    return {variant: tuple(map(mean, zip(*speeds, strict=True))) for variant, speeds in found.items()}


def summary(runs: list[dict[str, Any]], speeds: dict[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, with the measured speed."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        ours = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "seeds": len(ours), "speed_up": speeds.get(variant, (1.0, 1.0, 1.0))}
        for key in ("before", "after", "macs", "parameters"):
            values = [run[key] for run in ours]
            row[key] = mean(values)
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

"""Trained channels against the closed form: top-1 of the CIFAR-10 model at equal cost and equal training.

For every saving and seed, four ways with the same steps, batches, learning rate and teacher (the model before):

- ``ranks + units``: the closed form with every form it has, then tuning;
- ``channels``: the closed form on the very sites that gates act on (heads' products and hidden units), then tuning;
- ``cdcp``: gates that begin at that closed form; ``cdcp blind``: gates that begin at nothing.

Channels are chosen, and everything is trained, on training pictures alone; accuracy is on the validation pictures. Each
finished run is kept, so the script can be stopped and goes on.

    python benchmarks/cdcp.py                                  # one epoch a run, 3 seeds
    python benchmarks/cdcp.py --epochs 3 --savings 0.5 0.7 0.9
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common

import comcat

WAYS = ("ranks + units", "channels", "cdcp", "cdcp blind")
TUNE: dict[str, Any] = {"batch_size": 128, "lr": 1e-4, "crop_scale": (0.6, 1.0)}


def main(given: list[str] | None = None) -> None:
    p = common.training_parser(__doc__, "cdcp", "for calibration, and to measure gates on")
    p.add_argument("--savings", type=float, nargs="+", default=[0.7, 0.9])
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    p.add_argument("--choices", type=int, default=8, help="how often gates are marked")
    arguments = p.parse_args(given)
    model, train, judged = common.opened(arguments)
    work = arguments.work / Path(arguments.model).name
    asked = {k: getattr(arguments, k) for k in ("limit", "pictures", "choices", "precision", "data", "eval")}
    asked |= {"tune": TUNE}
    results: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for saving in arguments.savings:
            for way in arguments.ways:
                kept = work / f"{way.replace(' ', '-')}-{saving:g}-{seed}-{arguments.epochs:g}.json"
                run = partial(one_run, arguments, model, train, judged, way, saving, seed)
                results.append(r := common.kept_result(kept, asked, run))
                print(f"{way} -{saving:.0%} seed {seed}: {r['top1']:.2f} ({r['seconds']:.0f} s)", flush=True)
    rows = [row_of(saving, way, results) for saving in arguments.savings for way in arguments.ways]
    dense = common.top1(model, judged)
    print(f"dense {dense:.2f}")
    shown = ("way", "saved", "top1_mean", "top1_spread", "returned_mean", "seconds_mean")
    common.table(
        ["saving", "way", "saved", "top-1", "±", "came back", "seconds"],
        [[f"{r['saving']:.0%}", *(r[k] for k in shown)] for r in rows],
    )
    if not arguments.no_write:
        settings = {
            "tune": {**TUNE, "epochs": arguments.epochs, "precision": arguments.precision},
            "model": Path(arguments.model).name, "training_pictures": train.count, "pictures": arguments.pictures,
            "choices": arguments.choices,
        }  # fmt: skip
        common.write(arguments.name, {"dense": dense, "settings": settings, "rows": rows, "runs": results})


def row_of(saving: float, way: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the spread of the accuracy."""
    of = [r for r in results if r["way"] == way and r["saving"] == saving]
    return {
        "saving": saving, "way": way, "seeds": len(of), "saved": mean(r["saved"] for r in of),
        **{f"{k}_mean": mean(r[k] for r in of) for k in ("top1", "returned", "seconds")},
        "top1_spread": stdev([r["top1"] for r in of]) if len(of) > 1 else 0.0,
    }  # fmt: skip


def one_run(arguments: Any, model: Any, train: Any, judged: Any, way: str, saving: float, seed: int) -> dict[str, Any]:
    started, returned = time.monotonic(), 0
    training = {**TUNE, "epochs": arguments.epochs, "seed": seed, "precision": arguments.precision}
    if way.startswith("cdcp"):
        start = "blind" if way.endswith("blind") else "closed"
        small = comcat.prune(
            model, train, reduce=saving, start=start, pictures=arguments.pictures, choices=arguments.choices, **training
        )
        returned = sum(c["returned"] for c in small.comcat_record.plan.made_by["gates"]["choices"])  # type: ignore[union-attr]
    else:
        small = closed_form(arguments, model, train, way, saving, seed)
        comcat.tune(small, train, teacher=model, **training)
    return {
        "way": way, "saving": saving, "seed": seed, "returned": returned, "seconds": time.monotonic() - started,
        "saved": 1 - comcat.count_parameters(small) / comcat.count_parameters(model),
        "top1": common.top1(small, judged),
    }  # fmt: skip


def closed_form(arguments: Any, model: Any, train: Any, way: str, saving: float, seed: int) -> Any:
    loader = comcat.batches(train.take(arguments.pictures, seed), comcat.preprocess_of(model), batch_size=64)
    only = ("qk", "vo", "units") if way == "channels" else ()
    return comcat.compress(model, loader, reduce=saving, pictures=arguments.pictures, seed=seed, multiple=1, only=only)


if __name__ == "__main__":
    main()

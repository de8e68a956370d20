"""What tuning wins back: top-1 of the trained CIFAR-10 model after an epoch, by how its ranks were chosen.

For every saving and seed, four plans (uniform, energy, waterfill, searched), the same closed-form weights, the same
tuning with the model before compression as the teacher. The classifier head stays as it is (10 classes: `uniform` would
cut it to one or two). Ranks are found, and everything is trained, on training pictures alone; accuracy is on the 5,000
validation pictures. Seconds to find the plan are part of the result. Each finished run is kept, so the script can be
stopped and goes on.

    python benchmarks/tuning.py                        # one epoch a run, 3 seeds
    python benchmarks/tuning.py --epochs 3 --savings 0.5 0.6 0.7 0.8 0.9
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common

import comcat
from comcat.methods.compress import CompressSettings, compress_

RULES = ("uniform", "energy", "waterfill", "search")
SEARCH: dict[str, Any] = {"rounds": 3, "rank_steps": 24, "weight_steps": 12, "batch_size": 64, "precision": "bf16"}
ONLY = ("blocks",)
TUNE: dict[str, Any] = {"batch_size": 128, "lr": 1e-4, "crop_scale": (0.6, 1.0), "precision": "bf16"}


def main() -> None:
    p = common.training_parser(__doc__, "tuning")
    p.add_argument("--savings", type=float, nargs="+", default=[0.7, 0.9])
    p.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    arguments = p.parse_args()
    model, train, judged = common.opened(arguments)
    work = arguments.work / Path(arguments.model).name
    asked = {k: getattr(arguments, k) for k in ("limit", "pictures", "data", "eval")}
    asked |= {"search": SEARCH, "tune": TUNE, "only": ONLY}
    dense = common.top1(model, judged)
    results: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for saving in arguments.savings:
            for rule in arguments.rules:
                kept = work / f"{rule}-{saving:g}-{seed}-{arguments.epochs:g}.json"
                run = partial(one_run, arguments, model, train, judged, rule, saving, seed)
                results.append(r := common.kept_result(kept, asked, run))
                print(
                    f"{rule} -{saving:.0%} seed {seed}: {r['before']:.2f} -> {r['after']:.2f} (ranks "
                    f"{r['ranks_s']:.0f} s, tuning {r['tuning_s']:.0f} s)",
                    flush=True,
                )
    rows = []
    for saving in arguments.savings:
        for rule in arguments.rules:
            of = [r for r in results if r["rule"] == rule and r["saving"] == saving]
            rows.append({
                "saving": saving, "rule": rule, "seeds": len(of), "saved": mean(r["saved"] for r in of),
                **{f"{k}_mean": mean(r[k] for r in of) for k in ("before", "after", "ranks_s", "tuning_s")},
                **{f"{k}_spread": stdev([r[k] for r in of]) if len(of) > 1 else 0.0 for k in ("before", "after")},
            })  # fmt: skip
    print(f"dense {dense:.2f}")
    common.table(
        ["saving", "ranks", "before tuning", "after", "±", "seconds for ranks", "for tuning"],
        [[f"{r['saving']:.0%}", r["rule"], r["before_mean"], r["after_mean"], r["after_spread"], r["ranks_s_mean"],
            r["tuning_s_mean"]] for r in rows],
    )  # fmt: skip
    if not arguments.no_write:
        settings = {
            "search": SEARCH, "tune": {**TUNE, "epochs": arguments.epochs}, "model": Path(arguments.model).name,
            "training_pictures": train.count
        }  # fmt: skip
        common.write(arguments.name, {"dense": dense, "settings": settings, "rows": rows, "runs": results})


def one_run(arguments: Any, model: Any, train: Any, judged: Any, rule: str, saving: float, seed: int) -> dict[str, Any]:
    loader = comcat.batches(train.take(arguments.pictures, seed), comcat.preprocess_of(model), batch_size=64)
    started = time.monotonic()
    plan = None
    if rule == "search":
        plan = comcat.search(model, train, reduce=saving, pictures=arguments.pictures, seed=seed, only=ONLY, **SEARCH)
    small = copy.deepcopy(model)
    settings = CompressSettings(
        reduce=saving, ranks=rule, pictures=arguments.pictures, seed=seed, multiple=1, only=ONLY
    )  # type: ignore[arg-type]
    compress_(small, loader, settings, plan=plan)
    ranks_s = time.monotonic() - started
    before = common.top1(small, judged)
    started = time.monotonic()
    comcat.tune(small, train, teacher=model, epochs=arguments.epochs, seed=seed, **TUNE)
    return {
        "rule": rule, "saving": saving, "seed": seed,
        "saved": 1 - comcat.count_parameters(small) / comcat.count_parameters(model),
        "before": before, "after": common.top1(small, judged), "ranks_s": ranks_s,
        "tuning_s": time.monotonic() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()

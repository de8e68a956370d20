"""What each budget loses at equal *measured* time, on a real DINOv2-small with a CIFAR-10 head.

    python benchmarks/equal_time.py                             # 0.7, 0.5 and 0.35 of the dense model's time, batch 16
    python benchmarks/equal_time.py --tune 235                  # and one epoch of 15,000 pictures for the fastest

A budget of time, of parameters and of multiply-accumulates, the uniform rule, and tokens alone each shrink the model by
a few shares; their forwards are timed beside the dense model's in one interleaved run, and the share at which a method
takes the time of the plan under the budget of time is read off. Those plans are then timed again, all in one run, and
what is lost is KL(dense ‖ small) on held-out pictures. A method that cannot get so fast has no row. Goals: the budget
of time loses no more than the best of the others, and at half the time at least 20 % less than their median.

The timing needs a quiet machine, the rest does not: ``--parts times`` stops after it. Finished parts are kept in
``--work``.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from real.measure import Table, paired
from real.methods import Shrinker
from real.tasks import TASKS
from real_weights import Bench
from torch import nn

import comcat
from comcat.errors import BudgetError
from comcat.measure import benchmark, ratio
from comcat.methods.propose import propose
from comcat.methods.settings import CompressSettings
from comcat.plan import Plan

ALL = "ranks,units,tokens"
METHODS: dict[str, dict[str, Any]] = {
    "time": {"forms": ALL, "budget": "latency", "multiple": None},
    "parameters": {"multiple": None},
    "MACs": {"forms": ALL, "budget": "macs", "multiple": None},
    "uniform": {"ranks": "uniform", "multiple": None},
    "tokens alone": {"forms": "tokens", "budget": "macs"},
}
OURS = "time"
TRIED = (0.2, 0.35, 0.5, 0.6, 0.7)
"""Shares of a method's own cost that are timed first."""
LESS_THAN_MEDIAN = 0.2


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = common.parser(__doc__)
    p.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="of the dense model's time")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    p.add_argument("--parts", nargs="+", default=["times", "judge"], choices=("times", "judge"))
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--pictures", type=int, default=512, help="for calibration")
    p.add_argument("--judged", type=int, default=2000)
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of judging; times are float32")
    p.add_argument("--tune", type=int, default=0, metavar="STEPS", help="distil the fastest for so many steps")
    p.add_argument("--tuning-pictures", type=int, default=15_000, help="that tuning draws from")
    p.add_argument("--repeats", type=int, default=11)
    p.add_argument("--seed", type=int, default=0, help="of the calibration sample")
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-equal-time"), help="finished parts")
    p.add_argument("--name", default="equal-time")
    a = p.parse_args(given)
    task = TASKS["classifier"]
    model = task.build().to(a.device).eval()
    asked = {k: getattr(a, k) for k in ("shares", "methods", "batch", "pictures", "repeats", "seed")}
    timed = common.kept_result(a.work / f"times-{a.batch}-{a.seed}.json", asked, partial(times, model, a))
    if "judge" not in a.parts:
        return timed
    result = {
        "about": task.about, "settings": {k: v for k, v in vars(a).items() if k not in ("work", "no_write")},
        "threads_of_times": timed["threads"], "tried": timed["tried"], **judged(timed["rows"], a),
    }  # fmt: skip
    show(result)
    if not a.no_write:
        common.write(a.name, result)
    return result


def times(model: nn.Module, a: Namespace) -> dict[str, Any]:
    """The plans of every method at every share of the time, and the time then measured.

    The budget of time is asked for the share itself; the others are looked up at what its plan measured.
    """
    maker = Maker(model, a)
    plans: dict[tuple[str, float], Plan] = {}
    asked = {share: maker.plan(OURS, 1 - share) for share in a.shares}
    plans |= {(OURS, share): plan for share, plan in asked.items() if plan is not None}
    aims = {key[1]: measured[0] for key, measured in maker.times(plans).items()}
    print(f"the budget of time measures {aims}", flush=True)
    tried = {}
    for name in [name for name in a.methods if name != OURS]:
        found = {reduce: plan for reduce in TRIED if (plan := maker.plan(name, reduce)) is not None}
        tried[name] = maker.times(found)
        print(f"{name}: {tried[name]}", flush=True)
        for share, aim in aims.items():
            reduce = crossing(tried[name], aim)
            if reduce and (plan := maker.plan(name, reduce)) is not None:
                plans[name, share] = plan
    rows = [
        {"method": name, "share": share, "measured": measured, "plan": plans[name, share].to_dict()}
        for (name, share), measured in maker.times(plans).items()
    ]
    shown = {name: list(found.items()) for name, found in tried.items()}
    return {"threads": torch.get_num_threads(), "tried": shown, "rows": rows}


class Maker:
    """Plans of one model, and how long they take."""

    def __init__(self, model: nn.Module, a: Namespace) -> None:
        self.model, self.a, self.task = model, a, TASKS["classifier"]
        self.shrinker = Shrinker(self.task, model, pictures=a.pictures)
        self.images = self.task.calibration_batches(a.seed, a.batch)[0][: a.batch].to(a.device)

    def plan(self, name: str, reduce: float) -> Plan | None:
        """What a method proposes; None where it cannot save so much."""
        settings = CompressSettings(
            **METHODS[name], only=self.task.only, batch=self.a.batch, pictures=self.a.pictures, seed=self.a.seed,
            reduce=reduce,
        )  # fmt: skip
        prepared, _ = self.shrinker._prepared(settings)
        try:
            return propose(self.model, prepared, settings)
        except BudgetError:
            return None

    def times(self, plans: dict[Any, Plan]) -> dict[Any, tuple[float, float, float]]:
        """Of each plan's forward in the dense one's: median and quartiles, all timed in turn in one run."""
        small = {str(key): common.shaped(self.model, plan, self.shrinker.sites) for key, plan in plans.items()}
        with torch.no_grad():
            timings = benchmark({"dense": self.model, **small}, self.images, repeats=self.a.repeats)
        return {key: ratio(timings, str(key), "dense") for key in plans}


def crossing(tried: dict[float, tuple[float, float, float]], share: float) -> float | None:
    """The saving at which a method takes a share of the dense model's time, linear between those tried."""
    saved = [0.0, *tried]
    took = [1.0, *(middle for middle, _, _ in tried.values())]
    falling = np.minimum.accumulate(took)  # noise must not turn the line back
    if share < falling[-1]:
        return None
    return round(float(np.interp(-share, -falling, saved)), 4)


def judged(rows: list[dict[str, Any]], a: Namespace) -> dict[str, Any]:
    """What every row loses, and how the budget of time stands against the others."""
    judge = Judge(a)
    tables = {}
    found = []
    for row in rows:
        tables[row["method"], row["share"]], told = judge.row(row)
        found.append({k: v for k, v in row.items() if k != "plan"} | told)
    for row in found:
        ours, theirs = ([tables[name, row["share"]]] for name in (OURS, row["method"]))
        if row["method"] != OURS:
            row["more than time"] = paired(theirs, ours, judge.bench.weights)
    return {"dense": judge.bench.dense["scores"], "rows": found, "goals": [goal(found, share) for share in a.shares]}


class Judge:
    """The dense model, what it says of the pictures that are judged, and what plans lose."""

    def __init__(self, a: Namespace) -> None:
        self.a = a
        wanted = {name: getattr(a, name) for name in ("pictures", "judged", "dtype", "device", "tuning_pictures")}
        task = TASKS["classifier"]
        self.bench = Bench(task, Namespace(tune=a.tune, tune_dtype="float32", **wanted), {"ranks + units": {}})
        settings = CompressSettings(reduce=0.5, pictures=a.pictures, seed=a.seed, only=task.only)
        self.prepared, _ = self.bench.shrinker._prepared(settings)

    def row(self, row: dict[str, Any]) -> tuple[Table, dict[str, Any]]:
        """Divergences of one plan, and what is said of it."""
        handle = comcat.apply_(
            self.bench.model, Plan.from_dict(row["plan"]), self.prepared.statistic, sites=self.prepared.sites,
            factorizations=self.prepared.factorizations,
        )  # fmt: skip
        try:
            student = copy.deepcopy(self.bench.model)
        finally:
            handle.revert()
        tables = self.bench._tables(self.bench._said(student))
        told = {"scores": scores(tables), "parameters": comcat.count_parameters(student)}
        if self.a.tune and row["method"] == OURS and row["share"] == min(self.a.shares):
            self.bench._tuned(student, self.a.seed)
            told["tuned"] = scores(self.bench._tables(self.bench._said(student)))
        print(f"{row['method']} at {row['share']:g} of the time: {told}", flush=True)
        return tables["divergence"], told


def scores(tables: dict[str, Table]) -> dict[str, float]:
    return {name: table.score() for name, table in tables.items()}


def goal(rows: list[dict[str, Any]], share: float) -> dict[str, Any]:
    """Whether the budget of time loses no more than the best of the others, and how much less than their median."""
    lost = {row["method"]: row["scores"]["divergence"] for row in rows if row["share"] == share}
    others = [value for name, value in lost.items() if name != OURS]
    if OURS not in lost or not others:
        return {"share": share}
    less = 1 - lost[OURS] / median(others)
    return {
        "share": share, "best": lost[OURS] <= min(others), "less_than_median": less,
        "reached": less >= LESS_THAN_MEDIAN,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    head = ["share of time", "method", "measured", "KL, 0.01 nats", "top-1", "tuned"]
    common.table(
        head,
        [
            [f"{r['share']:g}", r["method"], r["measured"][0], r["scores"]["divergence"],
             r["scores"]["top1"], r.get("tuned", {}).get("top1", "–")]
            for r in sorted(result["rows"], key=lambda r: -r["share"])
        ],
    )  # fmt: skip
    for found in result["goals"]:
        print(found)


if __name__ == "__main__":
    main()

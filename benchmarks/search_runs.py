"""Long searches for ranks on the trained CIFAR-10 model: where they end, and with which weights they are better.

    python benchmarks/search_runs.py                 # at −70 %, 510 steps a run
    python benchmarks/search_runs.py --rounds 1 --rank-steps 2 --weight-steps 1 --judged 64     # to try the script

``paper``: blind, on the grid of the paper's code, ranks alone, with the code's rate, decay and penalty. ``closed form,
searched on``: from the closed form's sizes, candidates around them, with a cost that weighs above the budget alone; in
the third run it weighs always, as the paper's Eq. 6 has it. Beside them the closed form itself, with the forms of
either. Final sizes are published. Top-1 is on the validation pictures and nothing is tuned after: with weights ``kept``
from the search, as the paper does, and with weights ``derived`` anew in closed form from the model before it. Runs go
on where they were stopped.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

import comcat
from comcat.methods.compress import CompressSettings, compress_
from comcat.methods.search import SearchSettings
from comcat.methods.search.run import Search
from comcat.methods.search.schedule import Schedule
from comcat.plan import Plan
from comcat.runs.checkpoints import Checkpoints
from comcat.runs.loop import carry_out, find_checkpoint

RUNS: dict[str, dict[str, Any]] = {
    "paper": {
        "start": "blind", "grid": "paper", "forms": "ranks", "rank_lr": 1e-2, "rank_weight_decay": 5e-4,
        "penalty": "above",
    },
    "closed form, searched on": {
        "start": "waterfill", "grid": "near", "forms": "ranks,units", "penalty": "above",
    },
    "closed form, by Eq. 6 as printed": {
        "start": "waterfill", "grid": "near", "forms": "ranks,units", "penalty": "always",
    },
}  # fmt: skip
ONLY = ("blocks",)


def main(given: Sequence[str] | None = None) -> None:
    p = common.training_parser(__doc__, "search-runs")
    p.add_argument("--reduce", type=float, default=0.7, help="share of the parameters to save")
    p.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--rank-steps", type=int, default=60)
    p.add_argument("--weight-steps", type=int, default=30)
    p.add_argument("--judged", type=int, help="judge the first so many validation pictures; by default all")
    a = p.parse_args(given)
    model, train, judged = common.opened(a)
    judged = judged if a.judged is None else judged.take(a.judged, 0)
    schedule = {name: getattr(a, name) for name in ("rounds", "rank_steps", "weight_steps")}
    rows = []
    for name in a.runs:
        wish = RUNS[name] | schedule | {"batch_size": 64, "precision": "bf16"}
        asked = wish | {"reduce": a.reduce, "pictures": a.pictures, "data": a.data, "judged": a.judged, "seed": 0}
        path = a.work / Path(a.model).name / f"{name.replace(' ', '-')}-{a.reduce:g}.json"
        rows.append(common.kept_result(path, asked, partial(one, a, model, train, judged, name, wish)))
        print({k: v for k, v in rows[-1].items() if k not in ("sizes", "curve")}, flush=True)
    if not a.no_write:
        about = {"dense": common.top1(model, judged), "reduce": a.reduce, "schedule": schedule, "judged": judged.count}
        common.write(a.name, {**about, "runs": RUNS, "rows": rows})


def one(a: Any, model: torch.nn.Module, train: Any, judged: Any, name: str, wish: dict[str, Any]) -> dict[str, Any]:
    """One search beside the closed form of the same forms."""
    closed, closed_s = derived(a, model, train, wish["forms"], None)
    started = time.monotonic()
    plan, kept = searched(a, model, train, wish, a.work / "checkpoints" / name.replace(" ", "-"))
    seconds = time.monotonic() - started
    ours, _ = derived(a, model, train, wish["forms"], plan)
    sizes = {
        site: [
            None if entry is None else entry.keep for entry in (at.sites.get(site) for at in (plan_of(closed), plan))
        ]
        for site in sorted({*plan_of(closed).sites, *plan.sites})
    }
    return {
        "run": name, "steps": Schedule(SearchSettings(**wish)).steps, "seconds": seconds,
        "closed_seconds": closed_s, "saved": plan.made_by["saved"], "closed": common.top1(closed, judged),
        "derived": common.top1(ours, judged), "kept": common.top1(kept, judged), "sizes": sizes,
        "moved": sum(before != after for before, after in sizes.values()),
        "curve": plan.made_by["search"]["curve"],
    }  # fmt: skip


def plan_of(small: torch.nn.Module) -> Plan:
    return small.comcat_record.plan  # type: ignore[union-attr, return-value]


def derived(a: Any, model: torch.nn.Module, train: Any, forms: str, plan: Plan | None) -> tuple[torch.nn.Module, float]:
    """The model with closed-form weights, at a plan or at the closed form's own; and the seconds that took."""
    started, small = time.monotonic(), copy.deepcopy(model)
    shown = comcat.batches(train.take(a.pictures, 0), comcat.preprocess_of(model), batch_size=64)
    settings = CompressSettings(reduce=a.reduce, forms=forms, pictures=a.pictures, multiple=1, only=ONLY)
    compress_(small, shown, settings, plan=plan)
    return small, time.monotonic() - started


def searched(
    a: Any, model: torch.nn.Module, train: Any, wish: dict[str, Any], out: Path
) -> tuple[Plan, torch.nn.Module]:
    """What a search comes to, and its model with the weights that it learned, at the sizes that it settled on."""
    run = Search(model, train, SearchSettings(reduce=a.reduce, pictures=a.pictures, only=ONLY, **wish), None)
    checkpoints = Checkpoints(out, keep=2)
    found = find_checkpoint(checkpoints, run.identity, run.processes, restart=False)
    run.prepare(progress=True)
    if found is None:
        run.begin()
    try:
        carry_out(run, run.processes, checkpoints=checkpoints, every=(30,), since=found, progress=True)
    finally:
        run.close()
    plan = run.plan()
    run.mixture.relaxation.decide(run.space.ranks_of(run.space.best(run.mixture.losses())))
    return plan, run.model.eval()


if __name__ == "__main__":
    main()

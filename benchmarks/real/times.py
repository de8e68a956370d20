"""How long a forward of a real DINOv2-small takes when it is made smaller, by the methods of ``real_weights.py``.

    python benchmarks/real/times.py                              # the classifier, batch 16, float32
    python benchmarks/real/times.py --task saliency --batch 4

The methods and budgets are those of README's picture; each method is timed with the dense model in one interleaved run,
on the task's own pictures. Shapes decide the time, so a small calibration sample is enough.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

import comcat
from comcat.errors import BudgetError, ComcatError
from comcat.measure import benchmark, ratio
from real.methods import Shrinker, chosen_methods
from real.tasks import TASKS

DRAWN = ("ranks + units", "ranks", "SVD-LLM", "product + svd", "tokens alike", "product + magnitude")


def main(given: list[str] | None = None) -> dict[str, Any]:
    p = common.parser(__doc__)
    p.add_argument("--task", choices=TASKS, default="classifier")
    p.add_argument("--methods", nargs="+", default=list(DRAWN), metavar="NAME")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6])
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--pictures", type=int, default=64, help="calibration pictures")
    p.add_argument("--repeats", type=int, default=15)
    a = p.parse_args(given)
    try:
        result = run(a)
    except ComcatError as error:
        raise SystemExit(f"error: {error}") from None
    if not a.no_write:
        common.write(f"forward-{a.task}", result)
    return result


def run(a: Any) -> dict[str, Any]:
    """One row a method and budget."""
    task = TASKS[a.task]
    model = task.build().to(a.device).eval()
    shrinker = Shrinker(task, model, pictures=a.pictures)
    x = task.calibration_batches(0, a.batch)[0][: a.batch].to(a.device)
    rows = []
    for name, keywords in chosen_methods(a.methods).items():
        small = {reduce: found for reduce in a.budgets if (found := _small(shrinker, keywords, reduce)) is not None}
        models = {"dense": model, **{f"{reduce:g}": found for reduce, found in small.items()}}
        with torch.no_grad():
            timings = benchmark(models, x, repeats=a.repeats)
        for reduce, found in small.items():
            speed, low, high = ratio(timings, "dense", f"{reduce:g}")
            rows.append({
                "method": name, "reduce": reduce, "speed_up": speed, "speed_up_quartiles": [low, high],
                "milliseconds": 1000 * timings[f"{reduce:g}"].median_s,
                "dense_milliseconds": 1000 * timings["dense"].median_s, "parameters": comcat.count_parameters(found),
            })  # fmt: skip
            print(f"{name} −{100 * reduce:g} %: {speed:.2f}× ({low:.2f}–{high:.2f})", flush=True)
    return {
        "task": task.name, "about": task.about, "batch": len(x), "parameters": comcat.count_parameters(model),
        "settings": {k: v for k, v in vars(a).items() if k != "no_write"}, "rows": rows,
    }  # fmt: skip


def _small(shrinker: Shrinker, keywords: dict[str, Any], reduce: float) -> torch.nn.Module | None:
    try:
        applied, _ = shrinker.shrink(keywords, reduce, 0)
    except BudgetError:
        return None
    try:
        return copy.deepcopy(shrinker.model)
    finally:
        applied.revert()


if __name__ == "__main__":
    main()

"""Accuracy without any fine-tuning: every statistic and baseline, every share, on a trained vision transformer.

    python benchmarks/accuracy.py                       # ../shared/models/vit_cifar10 on CIFAR-10
    python benchmarks/accuracy.py --quick               # one calibration seed, 1,000 pictures
    python benchmarks/accuracy.py --choose              # on a slice of the training pictures: how the defaults were chosen

Columns are shares of parameters saved in the attention (MHA), in the feed-forward layers (FFN) or in the whole model. Calibration draws 512 training pictures per
seed; accuracy is top-1 on the whole validation set. Rank multiple 1. Statistics of data are means over seeds with their spread;
data-free methods have none. Results are kept as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import statistics as stats
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, SHARED, machine, parser, table, write

from comcat import batches, load_model, open_pictures, preprocess_of
from comcat.calibrate import calibrate
from comcat.factors import PaperCode, Statistic, Unilateral, Weights
from comcat.hosts import find_sites
from comcat.measure import count_parameters, evaluate
from comcat.methods.allocate import allocate, spectra
from comcat.methods.baselines import ffn_sites, matrix_plan, mha_sites, tensor_train_plan, tucker_plan
from comcat.plan import apply_

SHARES = {
    "mha": [0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97],
    "ffn": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95],
    "model": [0.4, 0.5, 0.7, 0.8, 0.9],
}
DEFAULT = "loss waterfill"


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default=str(SHARED / "models" / "vit_cifar10"))
    p.add_argument("--train", default=str(SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--validation", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--pictures", type=int, default=512)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--choose", action="store_true", help="evaluate on 2,000 held-out training pictures instead of the validation set")
    p.add_argument("--only", nargs="*", default=list(SHARES))
    p.add_argument("--shares", type=float, nargs="*", default=None)
    p.add_argument("--variants", nargs="*", default=[], help="also: no-refit, sequential")
    p.add_argument("--name", default=None)
    a = p.parse_args()
    seeds = 1 if a.quick else a.seeds
    model = load_model(a.model, device=a.device)
    prepare = preprocess_of(model)
    train = open_pictures(a.train)
    rest, held = train.split(0.1, seed=1)
    judged = held.take(2000, seed=0) if a.choose else open_pictures(a.validation)
    judged = judged.take(1000, seed=0) if a.quick else judged
    cached = [(x.to(a.device), y) for x, y in batches(judged, prepare, batch_size=250)]  # decoded once
    calibration = {s: [x for x, _ in batches(rest.take(a.pictures, seed=s), prepare, batch_size=64)] for s in range(seeds)}
    name = a.name or ("accuracy-choose" if a.choose else "accuracy-quick" if a.quick else "accuracy")
    store = _Store(RESULTS / machine() / f".{name}-partial.json")

    sites = find_sites(model)
    parts = {"mha": mha_sites(sites), "ffn": ffn_sites(sites), "model": sites}
    totals = {"mha": _cost(parts["mha"]), "ffn": _cost(parts["ffn"]), "model": count_parameters(model)}
    measured: dict[tuple[str, int], Statistic] = {}

    def statistic(kind: str, seed: int) -> Statistic:
        if (kind, seed) not in measured:
            measured[kind, seed] = calibrate(model, calibration[seed], statistic=kind, sites=sites, seed=seed)  # type: ignore[arg-type]
        return measured[kind, seed]

    def judge(plan, found: Statistic | None, refit: bool = True, factorizations=None) -> float:
        handle = apply_(model, plan, found, sites=sites, joint_refit=refit, factorizations=factorizations)
        try:
            return float(evaluate(model, [(x, y) for x, y in cached]).top1 or 0.0)
        finally:
            handle.revert()

    dense = store.get("dense", lambda: float(evaluate(model, cached).top1 or 0.0))
    print(f"dense {dense:.2f} %")
    rows = []
    for part in a.only:
        chosen, total = parts[part], totals[part]
        for share in a.shares or SHARES[part]:
            result: dict[str, list[float]] = {}
            for label, found in (("weights", Weights()), ("paper code", PaperCode()), ("unilateral", Unilateral())):
                for rule in ("uniform", "waterfill"):
                    if part == "ffn" and label != "weights":
                        continue  # the same as weights there
                    key = f"{part} {share} {label} {rule}"
                    result[f"{label} {rule}"] = [store.get(key, lambda f=found, r=rule: judge(allocate(model, f, reduce=share, rule=r, sites=chosen, total=total), f))]
            for label, build in _baselines(part):
                key = f"{part} {share} {label}"
                result[label] = [store.get(key, lambda b=build: judge(b(model, chosen, share, total), None))]
            for kind in ("activation", "loss"):
                for rule in ("uniform", "waterfill"):
                    for variant in ("", *a.variants):
                        label = f"{kind} {rule}{' ' + variant if variant else ''}"
                        values = [
                            store.get(f"{part} {share} {label} {seed}", lambda k=kind, s=seed, r=rule, v=variant: _data(model, judge, statistic(k, s), chosen, share, total, r, v, calibration[s], s, cached))
                            for seed in range(seeds)
                        ]
                        result[label] = values
            rows.append({"part": part, "reduce": share, "top1": {k: {"mean": stats.mean(v), "spread": (max(v) - min(v)) if len(v) > 1 else None, "values": v} for k, v in result.items()}})
            base = result["weights uniform"][0]
            best = stats.mean(result[DEFAULT])
            won = 100 * (best - base) / (dense - base) if dense - base > 0 else float("nan")
            rows[-1]["won_back_of_weights_uniform_percent"] = won
            if "paper code uniform" in result and dense - result["paper code uniform"][0] > 0:
                rows[-1]["won_back_of_paper_code_percent"] = 100 * (best - result["paper code uniform"][0]) / (dense - result["paper code uniform"][0])
            print(f"\n{part} −{100 * share:g} %  (default wins back {won:.0f} % of what weights uniform loses)", flush=True)
            table(["method", "top-1", "spread"], [[k, stats.mean(v), max(v) - min(v) if len(v) > 1 else "–"] for k, v in result.items()])
    if not a.no_write:
        write(name, {"model": Path(a.model).name, "dense_top1": dense, "pictures": sum(len(y) for _, y in cached), "seeds": seeds, "calibration_pictures": a.pictures, "default": DEFAULT, "rows": rows})
        store.path.unlink(missing_ok=True)


def _baselines(part: str) -> list[tuple[str, Callable]]:
    if part == "mha":
        return [("matrix-level SVD", matrix_plan)]
    if part == "ffn":
        return [("Tucker", tucker_plan), ("tensor train", tensor_train_plan)]
    return []


def _data(model, judge, found, chosen, share, total, rule, variant, calibration, seed, cached) -> float:
    factorizations = spectra(model, chosen, found)
    plan = allocate(model, found, reduce=share, rule=rule, sites=chosen, total=total, factorizations=factorizations)
    if variant == "sequential":
        from comcat.methods.compress import compress_, make_settings

        small = copy.deepcopy(model)
        compress_(small, calibration, make_settings({"reduce": share, "statistic": found.name, "sequential": True, "seed": seed}), plan=plan)
        return float(evaluate(small, cached).top1 or 0.0)
    return judge(plan, found, refit=variant != "no-refit", factorizations=factorizations)


def _cost(sites) -> int:
    return sum(s.parameters() for s in sites.values())


class _Store:
    """Results by key in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, compute: Callable[[], float]) -> float:
        if key not in self.values:
            self.values[key] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.values))
            temporary.replace(self.path)
        return self.values[key]


if __name__ == "__main__":
    main()

"""Accuracy without any fine-tuning: every statistic and baseline, every share, on a trained vision transformer.

    python benchmarks/accuracy.py                       # ../shared/models/vit_cifar10 on CIFAR-10
    python benchmarks/accuracy.py --quick               # one calibration seed, 1,000 pictures
    python benchmarks/accuracy.py --choose              # on a slice of the training pictures: how the defaults were chosen

Columns are shares of parameters saved in the attention (MHA), in the feed-forward layers (FFN) or in the whole model. Calibration draws 512 training pictures per
seed; accuracy is top-1 on the whole validation set. Rank multiple 1; accuracy in bfloat16. Statistics of data are means over seeds with their spread;
data-free methods have none. Results are kept as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import statistics as stats
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHARED, machine, parser, table, write
from torch import nn

from comcat import batches, load_model, open_pictures, preprocess_of
from comcat.apply import apply_
from comcat.factors import PaperCode, Statistic, Unilateral, Weights
from comcat.files import write_json
from comcat.hosts import find_sites
from comcat.measure import count_parameters, evaluate
from comcat.methods.allocate import allocate, spectra
from comcat.methods.baselines import ffn_sites, matrix_plan, mha_sites, tensor_train_plan, tucker_plan
from comcat.methods.compress import CompressSettings, compress_
from comcat.modules.tensor import TensorTrainLinear, TuckerLinear
from comcat.statistics import calibrate

SHARES = {
    "mha": [0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97],
    "ffn": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95],
    "model": [0.5, 0.7, 0.8, 0.9],
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
    p.add_argument(
        "--choose",
        action="store_true",
        help="evaluate on 2,000 held-out training pictures instead of the validation set",
    )
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
    cached = [(x.to(a.device, torch.bfloat16), y) for x, y in batches(judged, prepare, batch_size=50)]  # decoded once
    calibration = {
        s: [x for x, _ in batches(rest.take(a.pictures, seed=s), prepare, batch_size=64)] for s in range(seeds)
    }
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

    def top1(judged: nn.Module) -> float:
        """In bfloat16, which on these processors is three times as fast; calibration and factorisation are in float32."""
        return float(evaluate(multiplied_out(copy.deepcopy(judged)).to(torch.bfloat16), cached).top1 or 0.0)

    def judge(plan, found: Statistic | None, refit: bool = True, factorizations=None) -> float:
        handle = apply_(model, plan, found, sites=sites, joint_refit=refit, factorizations=factorizations)
        try:
            return top1(model)
        finally:
            handle.revert()

    dense = store.get("dense", lambda: top1(model))
    print(f"dense {dense:.2f} %")

    def results(part: str, share: float) -> dict[str, list[float]]:
        chosen, total = parts[part], totals[part]
        found: dict[str, list[float]] = {}

        def keep(label: str, seed: int | None, compute: Callable[[], float]) -> None:
            key = f"{part} {share} {label}" + ("" if seed is None else f" {seed}")
            found.setdefault(label, []).append(store.get(key, compute))

        def data_free(statistic: Statistic, rule: str) -> float:
            return judge(allocate(model, statistic, reduce=share, rule=rule, sites=chosen, total=total), statistic)  # type: ignore[arg-type]

        def data_aware(kind: str, rule: str, seed: int, variant: str) -> float:
            seen = statistic(kind, seed)
            factorizations = spectra(model, chosen, seen)
            plan = allocate(
                model,
                seen,
                reduce=share,
                rule=rule,  # type: ignore[arg-type]
                sites=chosen,
                total=total,
                factorizations=factorizations,
            )
            if variant == "sequential":
                small = copy.deepcopy(model)
                asked = CompressSettings(reduce=share, statistic=kind, sequential=True, seed=seed)
                compress_(small, calibration[seed], asked, plan=plan)
                return top1(small)
            return judge(plan, seen, refit=variant != "no-refit", factorizations=factorizations)

        for label, free in (("weights", Weights()), ("paper code", PaperCode()), ("unilateral", Unilateral())):
            for rule in ("uniform", "waterfill"):
                if part != "ffn" or label == "weights":  # elsewhere the three are the same there
                    keep(f"{label} {rule}", None, partial(data_free, free, rule))
        for label, build in BASELINES.get(part, {}).items():
            keep(label, None, lambda build=build: judge(build(model, chosen, share, total), None))
        for kind in ("activation", "loss"):
            for rule in ("uniform", "waterfill"):
                for variant in ("", *a.variants):
                    for seed in range(seeds):
                        label = f"{kind} {rule}{' ' + variant if variant else ''}"
                        keep(label, seed, partial(data_aware, kind, rule, seed, variant))
        return found

    rows = []
    for part in a.only:
        for share in a.shares or SHARES[part]:
            result = results(part, share)
            row = {"part": part, "reduce": share, "top1": {k: summary(v) for k, v in result.items()}}
            best = stats.mean(result[DEFAULT])
            for baseline in ("weights uniform", "paper code uniform"):
                lost = dense - result[baseline][0] if baseline in result else 0.0
                if lost > 0:
                    row[f"won back of {baseline}, %"] = 100 * (best - result[baseline][0]) / lost
            rows.append(row)
            print(
                f"\n{part} −{100 * share:g} %", {k: round(v) for k, v in row.items() if k.startswith("won")}, flush=True
            )
            spread = [max(v) - min(v) if len(v) > 1 else "–" for v in result.values()]
            table(
                ["method", "top-1", "spread"],
                [[k, stats.mean(v), d] for (k, v), d in zip(result.items(), spread, strict=True)],
            )
    if not a.no_write:
        write(
            name,
            {
                "model": Path(a.model).name,
                "dense_top1": dense,
                "pictures": sum(len(y) for _, y in cached),
                "seeds": seeds,
                "calibration_pictures": a.pictures,
                "default": DEFAULT,
                "rows": rows,
            },
        )
        store.path.unlink(missing_ok=True)


BASELINES: dict[str, dict[str, Callable]] = {
    "mha": {"matrix-level SVD": matrix_plan},
    "ffn": {"Tucker": tucker_plan, "tensor train": tensor_train_plan},
}


def multiplied_out(model: nn.Module) -> nn.Module:
    """Tensor forms as the dense layers they equal: a tensor train's own forward costs many times the dense one, and only accuracy is asked here."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TensorTrainLinear | TuckerLinear):
            dense = nn.Linear(module.in_features, module.out_features)
            with torch.no_grad():
                bias = module(torch.zeros(module.in_features))
                dense.bias.copy_(bias)
                dense.weight.copy_((module(torch.eye(module.in_features)) - bias).mT)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, dense)
    return model


def summary(values: list[float]) -> dict[str, Any]:
    spread = max(values) - min(values) if len(values) > 1 else None
    return {"mean": stats.mean(values), "spread": spread, "values": values}


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
            write_json(self.path, self.values)
        return self.values[key]


if __name__ == "__main__":
    main()

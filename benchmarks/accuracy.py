"""Accuracy without any fine-tuning: every statistic and baseline, every share, on a trained vision transformer.

    python benchmarks/accuracy.py                       # ../shared/models/vit_cifar10 on CIFAR-10
    python benchmarks/accuracy.py --quick               # one calibration seed, 1,000 pictures
    python benchmarks/accuracy.py --choose              # on a slice of the training pictures: how defaults were chosen

Shares are of the parameters of attention (MHA), of feed-forward layers (FFN) or of the whole model. The classifier
head stays as it is for every method. Calibration draws 512 training pictures a seed; accuracy is top-1 on the whole
validation set, judged in bfloat16. Rank multiple 1. Methods without data have one run. ``std`` is over seeds;
``picture_error`` is that of having judged these pictures and no others, from a bootstrap, paired for shares won back.
Results are kept as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, SHARED, machine, parser, table, write
from numpy.typing import NDArray
from real.measure import Table, packed, resamples, summary, unpacked
from torch import nn

from comcat import batches, load_model, open_pictures, preprocess_of
from comcat.apply import apply_
from comcat.factors import PaperCode, Spectrum, Statistic, Unilateral, Weights
from comcat.files import write_json
from comcat.hosts import find_sites
from comcat.measure import count_parameters, model_output
from comcat.methods.allocate import allocate, shrinkable, spectra
from comcat.methods.baselines import ffn_sites, hidden_sites, matrix_plan, mha_sites, tensor_train_plan, tucker_plan
from comcat.methods.compress import CompressSettings, compress_
from comcat.modules.tensor import TensorTrainLinear, TuckerLinear
from comcat.plan import Plan
from comcat.sites import Sites
from comcat.statistics import calibrate

SHARES = {
    "mha": [0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.97],
    "ffn": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95],
    "model": [0.5, 0.7, 0.8, 0.9],
}
FREE: dict[str, Statistic] = {"weights": Weights(), "paper code": PaperCode(), "unilateral": Unilateral()}
BASELINES: dict[str, dict[str, Callable]] = {
    "mha": {"matrix-level SVD": matrix_plan},
    "ffn": {"Tucker": tucker_plan, "tensor train": tensor_train_plan},
}
UNITS = ", units too"
DEFAULTS = {"mha": "loss waterfill", "ffn": f"loss waterfill{UNITS}", "model": f"loss waterfill{UNITS}"}
COMPARED = ("weights uniform", "paper code uniform")


def arguments(given: list[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--model", default=str(SHARED / "models" / "vit_cifar10"))
    p.add_argument("--train", default=str(SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--validation", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--pictures", type=int, default=512, help="to calibrate on, of each seed")
    p.add_argument("--quick", action="store_true", help="one seed, 1,000 pictures")
    p.add_argument("--choose", action="store_true", help="judge 2,000 held-out training pictures instead")
    p.add_argument("--only", nargs="*", choices=list(SHARES), default=list(SHARES))
    p.add_argument("--shares", type=float, nargs="*")
    p.add_argument("--methods", nargs="*", help="rows by name, by default all; the default of a part is always there")
    p.add_argument("--variants", nargs="*", choices=("no-refit", "sequential"), default=[])
    p.add_argument("--name", help="of the result")
    a = p.parse_args(given)
    a.seeds = 1 if a.quick else a.seeds
    a.name = a.name or ("accuracy-choose" if a.choose else "accuracy-quick" if a.quick else "accuracy")
    return a


def main(given: list[str] | None = None) -> dict[str, Any]:
    a = arguments(given)
    bench = Bench(a)
    print(f"dense {bench.dense.score():.2f} %", flush=True)
    rows = [bench.row(part, share) for part in a.only for share in a.shares or SHARES[part]]
    result = {
        "model": Path(a.model).name,
        "dense_top1": bench.dense.score(),
        "pictures": len(bench.dense.numerator),
        "seeds": a.seeds,
        "calibration_pictures": a.pictures,
        "head": "kept",
        "default": DEFAULTS,
        "rows": rows,
    }
    if not a.no_write:
        write(a.name, result)
        bench.store.path.unlink(missing_ok=True)
    return result


class Bench:
    """The model, its parts, the pictures, and what was judged already."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.model = load_model(a.model, device=a.device)
        prepare = preprocess_of(self.model)
        rest, held = open_pictures(a.train).split(0.1, seed=1)
        judged = held.take(2000, seed=0) if a.choose else open_pictures(a.validation)
        judged = judged.take(1000, seed=0) if a.quick else judged
        self.judged = [(x.to(a.device, torch.bfloat16), y) for x, y in batches(judged, prepare, batch_size=50)]
        self.calibration = {
            s: [x for x, _ in batches(rest.take(a.pictures, seed=s), prepare, batch_size=64)] for s in range(a.seeds)
        }
        self.store = Store(RESULTS / machine() / f".{a.name}-partial.json")
        sites = shrinkable(find_sites(self.model))
        feed = {**ffn_sites(sites), **hidden_sites(sites)}
        self.sites = {"mha": mha_sites(sites), "ffn": Sites(feed, sites.refused), "model": sites}
        self.totals = {part: sum(s.parameters() for s in cut(sites).values()) for part, cut in PARTS.items()}
        self.totals["model"] = count_parameters(self.model)
        self.known: dict[Any, Any] = {}
        self.dense = self.store.get("dense", lambda: right(self.model, self.judged))
        self.weights = resamples(np.arange(len(self.dense.numerator)))

    def row(self, part: str, share: float) -> dict[str, Any]:
        """Every method at one share of one part."""
        found = {
            label: [self.store.get(f"{part} {share} {label} {run}", make) for run, make in enumerate(makes)]
            for label, makes in self.methods(part, share).items()
        }
        top1 = {label: told(tables, self.weights) for label, tables in found.items()}
        row: dict[str, Any] = {"part": part, "reduce": share, "top1": top1}
        for baseline in COMPARED:
            if baseline in found:
                row[f"won back of {baseline}"] = self.won_back(found[DEFAULTS[part]], found[baseline][0])
        print(f"\n{part} −{100 * share:g} %", {k: v["mean"] for k, v in row.items() if k.startswith("won")}, flush=True)
        table(
            ["method", "top-1", "std"], [[k, v["mean"], "–" if v["std"] is None else v["std"]] for k, v in top1.items()]
        )
        return row

    def won_back(self, ours: list[Table], theirs: Table) -> dict[str, Any]:
        """The share, in percent, of what a baseline loses that the default does not, and its error by pictures."""
        best = np.mean([t.score() for t in ours])
        drawn = np.mean([t.score(self.weights) for t in ours], axis=0)
        lost, lost_drawn = (
            self.dense.score() - theirs.score(),
            self.dense.score(self.weights) - theirs.score(self.weights),
        )
        if lost <= 0:
            return {"lost": float(lost), "mean": None, "picture_error": None}
        shares = 100 * (drawn - theirs.score(self.weights)) / np.where(lost_drawn == 0, np.nan, lost_drawn)
        low, high = np.nanpercentile(shares, [15.87, 84.13])
        mean = 100 * (best - theirs.score()) / lost
        return {"lost": float(lost), "mean": float(mean), "picture_error": float((high - low) / 2)}

    def methods(self, part: str, share: float) -> dict[str, list[Callable[[], NDArray[Any]]]]:
        """By label, one function a run; each gives which pictures are right."""
        made: dict[str, list[Callable[[], NDArray[Any]]]] = {}
        for label, free in FREE.items():
            for rule in ("uniform", "waterfill"):
                if part != "ffn" or label == "weights":  # elsewhere the three are the same there
                    made[f"{label} {rule}"] = [partial(self.data_free, part, share, free, rule)]
        for label, build in BASELINES.get(part, {}).items():
            made[label] = [partial(self.baseline, part, share, build)]
        for kind in ("activation", "loss"):
            for forms in ("ranks",) if part == "mha" else ("ranks", "ranks,units"):
                for rule in ("uniform", "waterfill"):
                    for variant in ("", *self.a.variants):
                        label = f"{kind} {rule}{UNITS if 'units' in forms else ''}{variant and f' {variant}'}"
                        words = (part, share, kind, forms, rule, variant)
                        made[label] = [partial(self.data_aware, *words, seed) for seed in range(self.a.seeds)]
        wanted = [DEFAULTS[part], *(self.a.methods if self.a.methods is not None else made)]
        if unknown := [label for label in wanted if label not in made]:
            raise SystemExit(f"error: got method {unknown[0]!r}, expected one of {', '.join(made)}")
        return {label: runs for label, runs in made.items() if label in wanted}

    def data_free(self, part: str, share: float, statistic: Statistic, rule: Any) -> NDArray[Any]:
        return self.judge(self.plan(part, share, statistic, "ranks", rule, None), statistic)

    def baseline(self, part: str, share: float, build: Callable) -> NDArray[Any]:
        linear = PARTS[part](self.sites[part])
        return self.judge(build(self.model, linear, share, self.totals[part]), None)

    def data_aware(
        self, part: str, share: float, kind: Any, forms: str, rule: Any, variant: str, seed: int
    ) -> NDArray[Any]:
        seen, found = self.measured(part, kind, seed)
        plan = self.plan(part, share, seen, forms, rule, found)
        if variant == "sequential":
            small = copy.deepcopy(self.model)
            asked = CompressSettings(reduce=share, statistic=kind, sequential=True, seed=seed)
            compress_(small, self.calibration[seed], asked, plan=plan)
            return right(small, self.judged)
        return self.judge(plan, seen, joint_refit=variant != "no-refit", factorizations=found)

    def measured(self, part: str, kind: Any, seed: int) -> tuple[Statistic, dict[str, Spectrum]]:
        """A statistic and what it says of every site of a part; made once."""
        if (kind, seed) not in self.known:
            sites = self.sites["model"]
            self.known[kind, seed] = calibrate(
                self.model, self.calibration[seed], statistic=kind, sites=sites, seed=seed
            )
        if (part, kind, seed) not in self.known:
            self.known[part, kind, seed] = spectra(self.model, self.sites[part], self.known[kind, seed])
        return self.known[kind, seed], self.known[part, kind, seed]

    def plan(
        self, part: str, share: float, statistic: Statistic, forms: str, rule: Any, found: dict[str, Spectrum] | None
    ) -> Plan:
        return allocate(
            self.model, statistic, reduce=share, rule=rule, forms=forms, sites=self.sites[part],
            total=self.totals[part], factorizations=found, multiple=1,
        )  # fmt: skip

    def judge(self, plan: Plan, statistic: Statistic | None, **keywords: Any) -> NDArray[Any]:
        handle = apply_(self.model, plan, statistic, sites=self.sites["model"], **keywords)
        try:
            return right(self.model, self.judged)
        finally:
            handle.revert()


PARTS: dict[str, Callable[[Sites], Sites]] = {"mha": mha_sites, "ffn": ffn_sites}


@torch.no_grad()
def right(model: nn.Module, judged: list[Any]) -> NDArray[Any]:
    """Which pictures a model says right, in bfloat16."""
    small = multiplied_out(copy.deepcopy(model)).to(torch.bfloat16).eval()
    return np.concatenate([(model_output(small, x).argmax(1).cpu() == y).numpy() for x, y in judged])


def multiplied_out(model: nn.Module) -> nn.Module:
    """Tensor forms as the dense layers that they equal: only accuracy is asked here, and a train's forward is slow."""
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


def told(tables: list[Table], weights: NDArray[Any]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, error by pictures, and the values."""
    said = summary(tables, weights)
    return {"values": said.pop("scores"), **said}


class Store:
    """Which pictures were right, by key in a JSON file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, compute: Callable[[], NDArray[Any]]) -> Table:
        if key not in self.values:
            self.values[key] = packed(compute())
            write_json(self.path, self.values)
        return Table.of_means(unpacked(self.values[key]))


if __name__ == "__main__":
    main()

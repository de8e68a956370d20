"""Two disagreements looked into, on a trained vision transformer.

1. Prediction against outcome: the loss that a plan predicts, under the loss-aware statistic, is the rise of the loss on
   the model's own labels, KL(dense ‖ compressed). How far does that hold, site by site alone and all together? Over
   calibration samples.
2. Product against unilateral: unilateral puts the identity where the product has W_QᵀW_Q (or W_VᵀW_V). Which of the two
   is nearer to the second moment that really occurs? Told as the cosine between the Gram matrices, mean over heads and
   layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import SHARED, parser, table, write
from torch import Tensor, nn

from comcat import batches, calibrate, evaluate, find_sites, load_model, open_pictures, preprocess_of
from comcat.apply import apply_
from comcat.factors import Weights
from comcat.methods.allocate import allocate, shrinkable, spectra, tail_loss
from comcat.plan import Plan, SitePlan
from comcat.sites import Sites

SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
ALONE = ("attn:qk", "attn:vo", "mlp.fc1", "mlp.fc2", "mlp:units")


def main(given: list[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--model", default=str(SHARED / "models" / "vit_cifar10"))
    p.add_argument("--train", default=str(SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--validation", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--pictures", type=int, default=1000, help="to judge")
    p.add_argument("--calibration", type=int, default=512, help="pictures of each sample")
    p.add_argument("--seeds", type=int, default=5, help="calibration samples")
    p.add_argument("--shares", type=float, nargs="+", default=SHARES, help="saved in the whole model")
    p.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5], help="blocks whose sites shrink alone")
    a = p.parse_args(given)
    bench = Bench(a)
    together: dict[float, list[tuple[float, float]]] = {}
    alone: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(a.seeds):
        bench.measure(seed, together, alone)
    rows = {
        "together": [[share, *map(list, zip(*found, strict=True))] for share, found in together.items()],
        "alone": [[*key, *map(list, zip(*found, strict=True))] for key, found in alone.items()],
        "cosine_to_occurring_moment": bench.nearer(),
    }
    for name in ("together", "alone"):
        table(["", "predicted", "measured KL"], [[" ".join(map(str, r[:-2])), *map(told, r[-2:])] for r in rows[name]])
    print("cosine of the left Gram to the second moment that occurs:", rows["cosine_to_occurring_moment"])
    result = {"model": Path(a.model).name, "pictures": a.pictures, "seeds": a.seeds, **rows}
    if not a.no_write:
        write("prediction", result)
    return result


class Bench:
    """The model, its twin that stays dense, and the pictures."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.model, self.dense = (load_model(a.model, device=a.device) for _ in range(2))
        prepare = preprocess_of(self.model)
        self.judged = list(batches(open_pictures(a.validation).take(a.pictures, seed=0), prepare, batch_size=50))
        self.sites = shrinkable(find_sites(self.model))

    def calibration(self, seed: int) -> list[Any]:
        pictures = open_pictures(self.a.train).take(self.a.calibration, seed=seed)
        return list(batches(pictures, preprocess_of(self.model), batch_size=64))

    def measure(self, seed: int, together: dict[Any, Any], alone: dict[Any, Any]) -> None:
        """Add the predicted and the measured loss of every plan under one calibration sample."""
        loss = calibrate(self.model, self.calibration(seed), statistic="loss", sites=self.sites, seed=seed)
        found = spectra(self.model, self.sites, loss)
        for share in self.a.shares:
            plan = allocate(self.model, loss, reduce=share, sites=self.sites, factorizations=found, multiple=1)
            pair = float(plan.made_by["predicted_loss"]), self.measured(plan, loss, found)
            together.setdefault(share, []).append(pair)
        for name in (f"blocks.{layer}.{part}" for layer in self.a.layers for part in ALONE):
            site = self.sites[name]
            keep = max(1, site.full // 16)
            form = "units" if site.kind == "units" else "product"
            plan = Plan(sites={name: SitePlan(keep=keep, full=site.full, form=form)})
            pair = float(tail_loss(found[name])[keep]), self.measured(plan, loss, found)
            alone.setdefault((name, keep), []).append(pair)

    def measured(self, plan: Plan, statistic: Any, found: Any) -> float:
        handle = apply_(self.model, plan, statistic, sites=self.sites, factorizations=found)
        divergence = evaluate(self.model, self.judged, against=self.dense).divergence
        handle.revert()
        return float(divergence or 0.0)

    def nearer(self) -> dict[str, dict[str, float]]:
        """The cosine of either Gram to what occurs, by product."""
        seen = calibrate(self.model, self.calibration(0), statistic="activation", sites=self.sites)
        return {kind: cosines(self.model, self.sites.only(kind), seen) for kind in ("qk", "vo")}


def cosines(model: nn.Module, sites: Sites, seen: Any) -> dict[str, float]:
    """The mean cosine of the second moment that occurs to that of the weights, and to the identity."""
    weights, identity = [], []
    for site in sites.values():
        real = seen.grams(model, site)[0]
        weights.append(cosine(real, Weights().grams(model, site)[0]))
        identity.append(cosine(real, torch.eye(site.full_rank, dtype=real.dtype).expand_as(real)))
    return {"weights": float(torch.stack(weights).mean()), "identity": float(torch.stack(identity).mean())}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1)) / (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt()


def told(values: list[float]) -> str:
    """A mean with the standard deviation over seeds."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

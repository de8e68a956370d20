"""Two disagreements looked into, on a trained vision transformer.

1. Prediction against outcome: ½ Σ discarded σ² under the loss-aware statistic predicts the rise of the loss on the
model's own labels, KL(dense ‖ compressed). How far does
   that hold, site by site alone and all together?
2. Product against unilateral: unilateral puts the identity where the product has W_QᵀW_Q (or W_VᵀW_V). Which of the two
is nearer to the second moment that
   really occurs? Told as the cosine between the Gram matrices, mean over heads and layers.
"""

from __future__ import annotations

import torch
from common import SHARED, parser, table, write

from comcat import batches, calibrate, evaluate, find_sites, load_model, open_pictures, preprocess_of
from comcat.apply import apply_
from comcat.factors import Weights
from comcat.methods.allocate import allocate, spectra, tail_loss
from comcat.plan import Plan, SitePlan


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default=str(SHARED / "models" / "vit_cifar10"))
    p.add_argument("--train", default=str(SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--validation", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--pictures", type=int, default=1000)
    a = p.parse_args()
    model = load_model(a.model, device=a.device)
    dense = load_model(a.model, device=a.device)
    prepare = preprocess_of(model)
    judged = list(batches(open_pictures(a.validation).take(a.pictures, seed=0), prepare, batch_size=50))
    calibration = list(batches(open_pictures(a.train).take(512, seed=0), prepare, batch_size=64))
    sites = find_sites(model)
    loss = calibrate(model, calibration, statistic="loss", sites=sites)
    activation = calibrate(model, calibration, statistic="activation", sites=sites)
    found = spectra(model, sites, loss)

    def measured(plan: Plan) -> float:
        handle = apply_(model, plan, loss, sites=sites, factorizations=found)
        divergence = evaluate(model, judged, against=dense).divergence
        handle.revert()
        return float(divergence or 0.0)

    together = []
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        plan = allocate(model, loss, reduce=share, sites=sites, factorizations=found)
        together.append([share, float(plan.made_by["predicted_loss"]), measured(plan)])
    print("whole model, water-filled")
    table(["saved", "predicted", "measured KL"], [[f"{r[0]:.0%}", f"{r[1]:.4f}", f"{r[2]:.4f}"] for r in together])
    alone = []
    for layer in (0, 2, 5):
        for kind in ("attn:qk", "attn:vo", "mlp.fc1", "mlp.fc2"):
            name = f"blocks.{layer}.{kind}"
            site = sites[name]
            rank = max(1, site.full_rank // 16)
            plan = Plan(sites={name: SitePlan(keep=rank, full=site.full_rank)})
            alone.append([name, rank, float(tail_loss(found[name].singular_values)[rank]), measured(plan)])
    print("one site alone, at a sixteenth of its rank")
    table(["site", "rank", "predicted", "measured KL"], [[*r[:2], f"{r[2]:.4f}", f"{r[3]:.4f}"] for r in alone])
    nearer = {}
    for kind in ("qk", "vo"):
        weights, identity = [], []
        for site in sites.only(kind).values():
            real = activation.grams(model, site)[0]
            weights.append(cosine(real, Weights().grams(model, site)[0]))
            identity.append(cosine(real, torch.eye(site.full_rank, dtype=real.dtype).expand_as(real)))
        nearer[kind] = {"weights": float(torch.stack(weights).mean()), "identity": float(torch.stack(identity).mean())}
    print("cosine of the left Gram to the second moment that occurs:", nearer)
    if not a.no_write:
        rows = {"together": together, "alone": alone, "cosine_to_occurring_moment": nearer}
        write("prediction", {"model": "vit_cifar10", "pictures": a.pictures, **rows})


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((-2, -1)) / (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt()


if __name__ == "__main__":
    main()

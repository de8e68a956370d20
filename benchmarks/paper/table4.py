"""COMCAT, Table 4: DeiT-small without fine-tuning, FFN parameters −10 … −50 %: SVD, Tucker, tensor train, with
throughput.

    python benchmarks/paper/table4.py --data /imagenet/val --calibration /imagenet/train

The reshapes of the tensor forms are those of comcat.methods.baselines. Published rows are marked; their throughput is a
V100's.
"""

from __future__ import annotations

from tables import arguments, prepared

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.measure import benchmark
from comcat.methods.allocate import allocate
from comcat.methods.baselines import ffn_sites, tensor_train_plan, tucker_plan

PUBLISHED = {
    "SVD": [76.75, 73.68, 69.76, 54.63, 21.31], "SVD, images/s": [1017.06, 1066.81, 1129.56, 1191.65, 1245.19],
    "Tucker": [73.69, 70.53, 63.39, 42.37, 10.37], "Tucker, images/s": [1017.06, 1058.94, 1083.99, 1141.29, 1213.87],
    "tensor train": [0.81, 0.53, 0.35, 0.16, 0.14], "tensor train, images/s": [617.47, 639.70, 675.39, 714.79, 772.87],
}  # fmt: skip
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


def main(given: list[str] | None = None) -> dict:
    a = arguments(__doc__, "deit_small_patch16_224", given)
    run = prepared(a)
    ffn = ffn_sites(run.sites)
    total = sum(s.parameters() for s in ffn.values())
    weights = Weights()
    methods = {
        "SVD": (
            weights,
            lambda s: allocate(run.model, weights, reduce=s, rule="uniform", sites=ffn, total=total, multiple=1),
        ),
        "Tucker": (None, lambda s: tucker_plan(run.model, ffn, s, total)),
        "tensor train": (None, lambda s: tensor_train_plan(run.model, ffn, s, total)),
    }
    for label, statistic in run.data_statistics():
        methods[f"SVD, {label}"] = (
            statistic,
            lambda s, f=statistic: allocate(run.model, f, reduce=s, sites=ffn, total=total, multiple=1),
        )
    rows = {f"{k} (published)": v for k, v in PUBLISHED.items()} if run.published else {}
    for label, (statistic, plan_for) in methods.items():
        rows[label], rows[f"{label}, images/s"] = [], []
        for share in SHARES:
            plan = plan_for(share)
            rows[label].append(run.top1(plan, statistic))
            handle = apply_(run.model, plan, statistic, sites=run.sites)
            rows[f"{label}, images/s"].append(
                benchmark({"small": run.model}, run.example, repeats=a.repeats, min_seconds=0.2)["small"].throughput
            )
            handle.revert()
    return run.report("table4", [f"−{100 * s:g} %" for s in SHARES], rows)


if __name__ == "__main__":
    main()

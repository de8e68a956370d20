"""COMCAT, Table 1: DeiT-small distilled on ImageNet-1K without fine-tuning, attention parameters −20 … −80 %, head
level against matrix level.

    python benchmarks/paper/table1.py --data /imagenet/val --calibration /imagenet/train

Published rows are printed beside ours, marked as such. Ours adds the biases (exact), and the data-aware statistics.
"""

from __future__ import annotations

from tables import arguments, prepared

from comcat.factors import PaperCode, Weights
from comcat.methods.allocate import allocate
from comcat.methods.baselines import matrix_plan, mha_sites

PUBLISHED = {"head level": [79.81, 76.11, 63.56, 11.5], "matrix level": [73.01, 56.15, 22.95, 0.73]}
SHARES = (0.2, 0.4, 0.6, 0.8)


def main(given: list[str] | None = None) -> dict:
    a = arguments(__doc__, "deit_small_distilled_patch16_224", given)
    run = prepared(a)
    mha = mha_sites(run.sites)
    total = sum(s.parameters() for s in mha.values())
    rows = {f"{k} (published)": v for k, v in PUBLISHED.items()} if run.published else {}
    rows["matrix level"] = [run.top1(matrix_plan(run.model, mha, share, total), None) for share in SHARES]
    for label, statistic in (
        ("head level, biases zeroed", PaperCode()),
        ("head level, exact", Weights()),
        *run.data_statistics(),
    ):
        for rule in ("uniform", "waterfill"):
            rows[f"{label}, {rule}"] = [
                run.top1(
                    allocate(run.model, statistic, reduce=s, rule=rule, sites=mha, total=total, multiple=1), statistic
                )
                for s in SHARES
            ]
    return run.report("table1", [f"−{100 * s:g} %" for s in SHARES], rows)


if __name__ == "__main__":
    main()

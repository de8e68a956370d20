"""COMCAT, Table 3: parameters, MACs, accuracy and throughput of DeiT-small and DeiT-base before and after, on this
machine.

    python benchmarks/paper/table3.py --data /imagenet/val --calibration /imagenet/train

The paper's phone, Jetson, Eyeriss and FPGA columns are left out: none of that hardware is here. Its V100 column is
printed as published. Accuracy here is without fine-tuning; the paper's is after it, so those two are not to be
compared.
"""

from __future__ import annotations

import copy
from pathlib import Path

from tables import arguments, prepared

from comcat.apply import apply_
from comcat.measure import benchmark, count_macs, count_parameters, ratio
from comcat.methods.allocate import allocate

PUBLISHED = {
    "DeiT-small (published, V100)": [21.96, 4.24, 79.8, 974.46], "COMCAT small (published, V100, fine-tuned)": [10.98,
        2.07, 79.27, 1512.91],
    "DeiT-base (published, V100)": [86.38, 16.85, 81.8, 301.34], "COMCAT base (published, V100, fine-tuned)": [33.63,
        6.46, 82.26, 602.51],
}  # fmt: skip
MODELS = (("deit_small_patch16_224", 0.5), ("deit_base_patch16_224", 0.61))


def main(given: list[str] | None = None) -> dict:
    a = arguments(__doc__, "", given)
    rows: dict[str, list[float]] = {}
    run = None
    for name, share in [(a.model, 0.5)] if a.model else MODELS:
        run = prepared(a, name)
        if run.published and not rows:
            rows |= PUBLISHED
        dense, shown = copy.deepcopy(run.model), Path(name).name
        rows[shown] = [count_parameters(dense) / 1e6, count_macs(dense, run.example[:1]) / 1e9, run.dense_top1(), 0.0]
        label, statistic = run.data_statistics()[-1]
        plan = allocate(run.model, statistic, reduce=share, sites=run.sites, multiple=a.multiple)
        top1 = run.top1(plan, statistic)
        handle = apply_(run.model, plan, statistic, sites=run.sites)
        timings = benchmark({"dense": dense, "small": run.model}, run.example, repeats=a.repeats)
        small = f"{shown} −{100 * share:g} % ({label}, no fine-tuning)"
        rows[small] = [
            count_parameters(run.model) / 1e6,
            count_macs(run.model, run.example[:1]) / 1e9,
            top1,
            timings["small"].throughput,
        ]
        rows[shown][3] = timings["dense"].throughput
        print(f"{shown}: speed-up {ratio(timings, 'dense', 'small')[0]:.2f}×")
        handle.revert()
    assert run is not None
    return run.report("table3", ["parameters (M)", "MACs (G)", "top-1", "images/s"], rows)


if __name__ == "__main__":
    main()

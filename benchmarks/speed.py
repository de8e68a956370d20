"""Measured speed-up against the ratio of MACs: DeiT-small at −50 % parameters and DeiT-base at −61 %.

Dense and compressed models take turns in one interleaved run. Goals for the default plan (ranks of attention, hidden
units of feed-forwards): at least 0.98 of the MAC ratio at batch 16 and 0.92 at batch 1 in fp32, 0.87 at batch 16 in
bf16, and faster than ranks alone in the same run. COMCAT reports 1.55× (small) and 2.0× (base) on a V100. Weights are
random; that changes no shape but the default plan's ranks, which are chosen from the loss on random pictures.
"""

from __future__ import annotations

import torch
from common import parser, random_pictures, vit, write

from comcat.measure import benchmark, count_macs, count_parameters, ratio
from comcat.methods.compress import compress

DEFAULTS = {"ranks": "waterfill", "statistic": "loss"}


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--models", nargs="*", default=["deit_small_patch16_224:0.5", "deit_base_patch16_224:0.61"],
        help="NAME:SHARE of timm's, or torchvision:NAME:SHARE, or open_clip:NAME:SHARE",
    )  # fmt: skip
    p.add_argument("--batches", type=int, nargs="*", default=[16, 1])
    p.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    p.add_argument("--compile", action="store_true", help="also compiled")
    p.add_argument("--multiple", type=int, default=None, help="ranks in multiples of it; left out, what comcat chooses")
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--name", default="speed")
    a = p.parse_args()
    rows = []
    for entry in a.models:
        name, _, share = entry.rpartition(":")
        dense = vit(name, a.device)
        pictures = random_pictures(16, 8, device=a.device)
        plans = {
            "uniform": compress(dense, statistic="weights", ranks="uniform", reduce=float(share), multiple=a.multiple),
            "ranks alone": compress(
                dense, pictures, reduce=float(share), multiple=a.multiple, forms="ranks", **DEFAULTS
            ),
            "default": compress(dense, pictures, reduce=float(share), multiple=a.multiple, **DEFAULTS),
        }
        macs = {k: count_macs(m, pictures[0][:1]) for k, m in {"dense": dense, **plans}.items()}
        for dtype in a.dtypes:
            models = {k: m.to(getattr(torch, dtype)) for k, m in {"dense": dense, **plans}.items()}
            for batch in a.batches:
                x = torch.randn(batch, 3, 224, 224, device=a.device, dtype=getattr(torch, dtype))
                for compiled in (False, True) if a.compile else (False,):
                    timings = benchmark(models, x, repeats=a.repeats, compile=compiled)
                    for plan in plans:
                        speed = ratio(timings, "dense", plan)
                        mac_ratio = macs["dense"] / macs[plan]
                        row = {
                            "model": name, "reduce": float(share), "plan": plan, "dtype": dtype, "batch": batch,
                            "compiled": compiled, "mac_ratio": mac_ratio, "speed_up": speed[0],
                            "speed_up_quartiles": speed[1:], "of_mac_ratio": speed[0] / mac_ratio,
                            "parameters": count_parameters(plans[plan]) / count_parameters(dense),
                            "throughput": timings[plan].throughput, "dense_throughput": timings["dense"].throughput,
                        }  # fmt: skip
                        rows.append(row)
                        print(
                            f"{name} {plan} {dtype} batch {batch}{' compiled' if compiled else ''}: {speed[0]:.2f}× "
                            f"({speed[1]:.2f}–{speed[2]:.2f}), MACs {mac_ratio:.2f}×, {row['of_mac_ratio']:.2f} of it",
                            flush=True,
                        )
            for m in models.values():
                m.to(torch.float32)
    if not a.no_write:
        write(a.name, {"rows": rows, "multiple": a.multiple})


if __name__ == "__main__":
    main()

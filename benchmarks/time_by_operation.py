"""Where the time of a forward goes, dense and compressed: matrix products, attention, and what low rank does not
shrink.

By torch's profiler, in one process with freed memory kept, DeiT-small at −50 % in float32 by default. From the share of
the rest in the dense model follows the most that a plan's speed-up can be beside its ratio of MACs (Amdahl), were its
products and attention to shrink by just that ratio.

    python benchmarks/time_by_operation.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from common import parser, random_pictures, side_of, table, vit, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

from comcat.measure import count_macs
from comcat.measure.memory import memory_kept
from comcat.methods.compress import compress

KINDS = {"addmm": "products", "mm": "products", "bmm": "products", "scaled_dot_product": "attention"}
"""Beginnings of the names of operations; all else is the rest: biases, norms, GELU, sums, copies, the patch embedding.
"""


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::").removeprefix("_")
    return next((kind for begin, kind in KINDS.items() if name.startswith(begin)), "rest")


def milliseconds(model: nn.Module, x: torch.Tensor, repeats: int) -> Counter[str]:
    """Of one forward, by kind of operation."""
    found: Counter[str] = Counter()
    with torch.inference_mode():
        for _ in range(3):
            model(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(repeats):
                model(x)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / repeats
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__)
    p.set_defaults(device="cpu")  # elsewhere the profiler's own times of the CPU say nothing
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--reduce", type=float, default=0.5)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--repeats", type=int, default=8)
    a = p.parse_args(arguments)
    dense = vit(a.model)
    side = side_of(dense)
    models = {
        "dense": dense,
        "uniform": compress(dense, statistic="weights", ranks="uniform", reduce=a.reduce),
        "default": compress(dense, random_pictures(16, 8, side), reduce=a.reduce),
    }
    x = random_pictures(a.batch, a.batch, side)[0]
    macs = {name: count_macs(model, x[:1]) for name, model in models.items()}
    with memory_kept():
        milliseconds(dense, x, 1)  # until the process holds what it needs
        times = {name: milliseconds(model, x, a.repeats) for name, model in models.items()}
    rest = times["dense"]["rest"] / times["dense"].total()
    rows = {
        name: {
            **times[name], "share_of_rest": times[name]["rest"] / times[name].total(),
            "mac_ratio": (ratio := macs["dense"] / macs[name]),
            "most_of_mac_ratio": 1 / (rest * ratio + 1 - rest),
        }
        for name in models
    }  # fmt: skip
    table(
        ["ms by kind", "products", "attention", "rest", "share of rest", "MAC ratio", "most of it"],
        [[name, *(r[k] for k in ("products", "attention", "rest", "share_of_rest", "mac_ratio",
            "most_of_mac_ratio"))] for name, r in rows.items()],
    )  # fmt: skip
    if not a.no_write:
        write(f"time-by-operation-{a.model}", {"model": a.model, "reduce": a.reduce, "batch": a.batch, "rows": rows})


if __name__ == "__main__":
    main()

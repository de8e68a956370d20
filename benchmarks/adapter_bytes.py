"""What of an adapter's bytes lies where, on FLUX.2 klein's true shapes: nothing is computed, and no weight is made.

    python benchmarks/adapter_bytes.py

A factor of one head is as wide as the stream that it reads or writes, and each of the heads has its own. So rank 1 has
as many numbers as a LoRA whose rank is the number of heads, on one side of each projection. The goal: a choice of
1 to 2 MB in 16 bit. Whether the concept is learned as well by so few was not measured: that needs the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from card.flux2 import SHAPE, SOURCE
from common import parser, table, write
from torch import nn

import comcat.diffusion as diffusion

BYTES = 2
GOAL = (1e6, 2e6)
CHOICES: dict[str, tuple[str, ...]] = {
    "all": (),
    "values and outputs": ("vo",),
    "double blocks": ("transformer_blocks",),
    "double blocks, values and outputs": ("transformer_blocks:vo",),
    "three double blocks, values and outputs": tuple(f"transformer_blocks.{n}:vo" for n in range(3)),
    "one double block": ("transformer_blocks.2",),
    "three single blocks": tuple(f"single_transformer_blocks.{n}" for n in range(3)),
}


def transformer() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(**SHAPE)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--rank", type=int, default=1)
    a = p.parse_args(given)
    found = diffusion.find_adaptable(transformer())
    each = {kind: found.attention[f"transformer.{kind}.0.attn"] for kind in
            ("transformer_blocks", "single_transformer_blocks")}  # fmt: skip
    result = {
        "model": "flux2-klein", "shape": SOURCE, "rank": a.rank, "dtype": "16 bit", "modules": len(found.attention),
        "module": {kind: {"heads": one.heads, "factors": len(one.widths), "bytes": BYTES * one.parameters(a.rank)}
                   for kind, one in each.items()},
        "choices": {name: {"only": list(only), "bytes": BYTES * found.parameters(a.rank, "joint", only)}
                    for name, only in CHOICES.items()},
    }  # fmt: skip
    rows = [[name, one["bytes"] / 1e6, "yes" if GOAL[0] <= one["bytes"] <= GOAL[1] else ""]
            for name, one in result["choices"].items()]  # fmt: skip
    table([f"rank {a.rank}", "MB", "1 to 2"], rows)
    if not a.no_write:
        write("adapter-bytes", result)
    return result


if __name__ == "__main__":
    main()

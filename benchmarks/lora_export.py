"""How near a plain LoRA comes to an adapter, by rank: ``comcat export --as lora`` on the embedded demo's adapter.

    python benchmarks/lora_export.py                                         # teaches the demo's digit first
    python benchmarks/lora_export.py --pipeline FOLDER --adapter FILE        # any other

The goal: at rank 16 or below, the denoiser's output differs by at most 3 %, and the file has at most twice the bytes of
a LoRA of that rank on the layers that the adapter acts in. Differences are relative, over all steps of the sampler for
the adapter's own prompt, the empty one and ``--prompts``, in noise that the LoRA was not fitted to; ``of_change`` is
the same over what the adapter changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import parser, table, write
from embedded_digits import open_digits
from torch import nn

import comcat.diffusion as diffusion
from comcat.diffusion.digits.demo import SETTINGS, lessons, protected_prompts
from comcat.diffusion.digits.scans import IDENTIFIER
from comcat.diffusion.pipeline.components import denoiser_of

BOUND, LARGEST_RANK = 0.03, 16


def opened(a: Any) -> Any:
    """The pipeline with its adapter."""
    if a.pipeline is not None:
        pipe = diffusion.load_pipeline(a.pipeline, device=a.device)
        diffusion.load(pipe, a.adapter)
        return pipe
    few = {"steps": 2} if a.quick else {}
    pipe = open_digits(a)
    pictures, prompts = lessons(0)
    diffusion.customize(
        pipe, pictures, prompt=prompts, identifier=IDENTIFIER, protect=protected_prompts(), **SETTINGS | few,
        out=a.work / "digit.safetensors", progress=True,
    )  # fmt: skip
    return pipe


def plain_bytes(pipe: Any, rank: int, layers: Sequence[str]) -> int:
    """The size, in 16 bit, of PEFT's LoRA of a rank on the layers named."""
    model: nn.Module = denoiser_of(pipe).model
    shapes = [m for n, m in model.named_modules() if n in layers and isinstance(m, nn.Linear)]
    return sum(2 * rank * (m.in_features + m.out_features) for m in shapes)


def exported(pipe: Any, rank: int, a: Any) -> dict[str, Any]:
    """What one rank gives."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        report = diffusion.export_lora(
            pipe, path, rank=rank, prompts=a.prompts, force=True, steps=a.steps, seed=a.seed, size=a.size
        )
        with safe_open(path, "pt") as file:
            names = {k.partition(".")[2].rpartition(".lora_")[0] for k in file.keys()}
    plain = plain_bytes(pipe, rank, sorted(names))
    return {
        "rank": rank, "difference": report.difference, "of_change": report.of_change, "bytes": report.size_bytes,
        "plain_bytes": plain, "of_plain": report.size_bytes / plain, "errors": dict(report.errors),
        "left_out": dict(report.left_out),
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--pipeline", type=Path)
    p.add_argument("--adapter", type=Path)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-lora"), help="where the digits' pipeline is kept")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--prompts", nargs="*", default=[], help="prompts to be near on, beside the adapter's own")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--size", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a smoke test: two steps of training")
    a = p.parse_args(given)
    if (a.pipeline is None) != (a.adapter is None):
        p.error("--pipeline and --adapter go together")
    torch.set_grad_enabled(True)
    pipe = opened(a)
    pipe.set_progress_bar_config(disable=True)
    adapter = diffusion.adapters(pipe)["default"]
    rows = [exported(pipe, rank, a) for rank in a.ranks]
    table(
        ["rank", "difference", "of the change", "bytes", "of a plain LoRA's"],
        [[r["rank"], f"{r['difference']:.2%}", f"{r['of_change']:.1%}", r["bytes"], r["of_plain"]] for r in rows],
    )
    met = [r["rank"] for r in rows if r["rank"] <= LARGEST_RANK and r["difference"] <= BOUND and r["of_plain"] <= 2]
    result = {
        "adapter_bytes": adapter.bytes(torch.float16), "sites": len(rows[0]["errors"]), "rows": rows,
        "goal": {"difference": BOUND, "rank": LARGEST_RANK, "of_plain": 2}, "met_from_rank": min(met, default=None),
        "quick": a.quick, "steps": a.steps, "prompts": a.prompts,
    }  # fmt: skip
    print(f"the goal is met from rank {result['met_from_rank']}")
    if not a.no_write:
        write("lora-export", result)
    return result


if __name__ == "__main__":
    main()

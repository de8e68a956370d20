"""How many pictures a second tuning trains on, beside a bare loop of the same model, batch and precision.

The bare loop has its pictures ready in memory, and does forward, loss, backward and AdamW's step; with a teacher, that
one's forward too. Tuning reads, decodes and augments each picture, clips gradients, watches the loss and keeps its log.
They take turns, ``--repeats`` times; a ratio is of one turn.

    python benchmarks/tuning_throughput.py
    python benchmarks/tuning_throughput.py --model benchmarks/models/deit_tiny_cifar10 --batch-size 1024 --workers 14
    # on a GPU
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import nn

import comcat


def bare_loop(student: nn.Module, teacher: nn.Module | None, a: Any, side: int, steps: int) -> float:
    """Pictures a second."""
    model = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.005, fused=a.device.startswith("cuda"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(a.batch_size, 3, side, side, generator=generator).to(a.device)
    labels = torch.randint(0, 10, (a.batch_size,), generator=generator).to(a.device)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(a.precision)
    device = torch.device(a.device).type

    def step() -> None:
        with torch.autocast(device, kind or torch.bfloat16, enabled=kind is not None):
            logits = model(images)
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(images).float().log_softmax(-1)
        loss = F.cross_entropy(logits.float(), labels)
        if teacher is not None:
            loss = 0.5 * loss + 0.5 * F.kl_div(
                logits.float().log_softmax(-1), theirs, log_target=True, reduction="batchmean"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    common.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    common.synchronize()
    return steps * a.batch_size / (time.perf_counter() - started)


def tuning(student: nn.Module, teacher: nn.Module | None, a: Any, train: Any, steps: int) -> float:
    """Pictures a second, the first step's set-up included."""
    model = copy.deepcopy(student)
    comcat.tune(
        model, train, teacher=teacher, steps=steps, batch_size=a.batch_size, precision=a.precision, workers=a.workers,
        crop_scale=(0.6, 1.0),
    )  # fmt: skip
    return model.comcat_record.results.tuning["images_per_second"]  # type: ignore[union-attr]


def main(arguments: Sequence[str] | None = None) -> None:
    p = common.parser(__doc__)
    p.add_argument("--model", default=str(common.SHARED / "models" / "vit_cifar10"))
    p.add_argument("--data", default=str(common.SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--reduce", type=float, default=0.7)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    p.add_argument("--workers", type=int, default=0, help="processes that decode for tuning")
    p.add_argument("--steps", type=int, default=40, help="of a turn")
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args(arguments)
    dense = comcat.load_model(a.model, device=a.device)
    side = comcat.preprocess_of(dense).size[-1]
    small = comcat.compress(dense, statistic="weights", reduce=a.reduce)
    train = comcat.open_pictures(a.data)
    rows = []
    for name, teacher in (("alone", None), ("with a teacher", dense)):
        turns = [
            (bare_loop(small, teacher, a, side, a.steps), tuning(small, teacher, a, train, a.steps))
            for _ in range(a.repeats)
        ]
        bare, ours = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
        rows.append({"tuning": name, "bare": bare, "comcat": ours, "ratios": [t / b for b, t in turns]})
    common.table(
        ["", "bare loop, pictures/s", "comcat.tune", "ratio", "lowest", "highest"],
        [[r["tuning"], r["bare"], r["comcat"], statistics.median(r["ratios"]), min(r["ratios"]),
            max(r["ratios"])] for r in rows],
    )  # fmt: skip
    if not a.no_write:
        settings = {k: v for k, v in vars(a).items() if k not in ("model", "data", "no_write")}
        common.write("throughput-of-tuning", {"model": Path(a.model).name, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

"""Time of a DeiT dense, with ranks alone, with ranks and units, and on fewer tokens, in bfloat16; random weights.

Sizes are chosen from the loss on random pictures, in multiples of ``multiple``. What is timed has the structure of the
plan and new random weights. All models take turns in one run; a speed-up is the median of the rounds' ratios, with
quartiles. ``mode`` is ``eager``, ``compiled`` (``torch.compile`` without CUDA graphs), or ``graph``: the eager forward
replayed as one CUDA graph, which leaves out the time that Python and the driver take to launch it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import random_pictures, vit
from torch import Tensor, nn

from comcat import Plan, apply_, merge
from comcat.measure import benchmark, count_macs, count_parameters, ratio
from comcat.methods.compress import propose
from comcat.methods.prepare import prepare
from comcat.methods.settings import CompressSettings

PLANS = {"ranks": "ranks", "ranks + units": "ranks,units"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is timed: a timm model, how far it shrinks, and the share of the tokens its blocks run on."""

    model: str
    reduce: float
    keep: float = 1.0
    multiple: int = 16
    size: int = 224
    pictures: int = 64
    arguments: Mapping[str, Any]


def made_plans(subject: Subject, device: str) -> dict[str, Plan]:
    """A plan for each row of :data:`PLANS`; calibrated and decomposed once, on the device.

    Where a share of the tokens is kept, one more with tokens alone, and one with everything. There tokens fall in a
    straight line, since nothing is to be measured on random weights.
    """
    dense = vit(subject.model, device, **subject.arguments)
    batches = random_pictures(subject.pictures, 16, subject.size, device)
    settings = CompressSettings(reduce=subject.reduce, multiple=subject.multiple, pictures=subject.pictures)
    prepared = prepare(dense, batches, settings)
    plans = {name: propose(dense, prepared, replace(settings, forms=forms)) for name, forms in PLANS.items()}
    if subject.keep < 1:
        tokens = merge(dense, example=batches[0][:1], keep=subject.keep)
        both = Plan(sites={**plans["ranks + units"].sites, **tokens.sites})
        plans |= {"tokens": tokens, "ranks + units + tokens": both}
    return plans


def kept_plans(path: Path, subject: Subject) -> dict[str, Plan] | None:
    """The plans that an earlier part's result holds, or None where there is none of the same subject."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("subject") != asdict(subject):
        return None
    return {name: Plan.from_dict(plan) for name, plan in found["plans"].items()}


def structures(subject: Subject, plans: Mapping[str, Plan], device: str) -> dict[str, nn.Module]:
    """The dense model and one for each plan, with weights as they are before training, in bfloat16."""
    dense = vit(subject.model, device, **subject.arguments)
    models = {"dense": dense}
    for name, plan in plans.items():
        models[name] = copy.deepcopy(dense)
        apply_(models[name], plan, weights=False)
        refill(models[name])
    return {name: model.to(torch.bfloat16) for name, model in models.items()}


@torch.no_grad()
def refill(model: nn.Module) -> None:
    """Values of an untrained model for weights that were never set; what is computed must not depend on chance bits."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        elif name.endswith("bias"):
            p.zero_()


class Replayed(nn.Module):
    """A model's forward on one batch, captured as a CUDA graph. It ignores what it is called with."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(3):
                model(example)
        side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.output = model(example)

    def forward(self, images: Tensor) -> Tensor:
        self.graph.replay()
        return self.output


@dataclass(frozen=True, kw_only=True)
class Timer:
    """How models are timed. ``done`` is told every row as soon as it is there."""

    device: str
    repeats: int
    min_seconds: float
    done: Callable[[list[dict[str, Any]]], None]

    def rows(self, subject: Subject, plans: Mapping[str, Plan], cells: list[tuple[str, int]]) -> list[dict[str, Any]]:
        """One row for each plan in each cell, a mode and a batch size."""
        models = structures(subject, plans, self.device)
        one = random_pictures(1, 1, subject.size, self.device)[0].bfloat16()
        macs = {name: count_macs(model, one) for name, model in models.items()}
        rows: list[dict[str, Any]] = []
        for mode, batch in cells:
            start = time.perf_counter()
            x = one.expand(batch, -1, -1, -1).contiguous()
            timed = {n: Replayed(m.eval(), x) for n, m in models.items()} if mode == "graph" else models
            compiled = mode == "compiled"
            timings = benchmark(timed, x, repeats=self.repeats, min_seconds=self.min_seconds, compile=compiled)
            for plan in plans:
                speed = ratio(timings, "dense", plan)
                rows.append(
                    {
                        "model": subject.model, "plan": plan, "dtype": "bfloat16", "batch": batch, "mode": mode,
                        "mac_ratio": macs["dense"] / macs[plan], "speed_up": speed[0], "speed_up_quartiles": speed[1:],
                        "of_mac_ratio": speed[0] * macs[plan] / macs["dense"],
                        "of_ranks": ratio(timings, "ranks", plan),
                        "parameters": count_parameters(models[plan]) / count_parameters(models["dense"]),
                        "timing": timings[plan].to_dict(), "dense_timing": timings["dense"].to_dict(),
                        "cell_seconds": time.perf_counter() - start,
                    }
                )  # fmt: skip
                what, spread = f"{subject.model} {plan} batch {batch} {mode}", f"{speed[1]:.2f}–{speed[2]:.2f}"
                told = f"{what}: {speed[0]:.2f}× ({spread})"
                print(f"{told}, MACs {rows[-1]['mac_ratio']:.2f}×, {rows[-1]['of_mac_ratio']:.2f} of it", flush=True)
            self.done(rows)
        return rows

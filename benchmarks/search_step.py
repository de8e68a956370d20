"""What a step of rank search costs: beside a plain training step of the dense model, and beside evaluating every
candidate apart.

A search step on DeiT-small updates the probabilities of candidate ranks with one forward and backward pass (nested
candidates are a soft mask on one factorisation). The naive way, written down here as the baseline, holds every
candidate's factors and adds up all their outputs. Rounds of all four calls are interleaved in one run.

    python benchmarks/search_step.py
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from statistics import median

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.factors import Weights
from comcat.forms.relax import Relaxation, relax_
from comcat.hosts import find_sites
from comcat.measure.memory import LiveBytes
from comcat.methods.allocate import of_forms, shrinkable
from comcat.methods.search.candidates import candidates_of
from comcat.sites import LinearSite

WAYS = ("dense", "search ranks", "search weights", "naive")


class Apart(nn.Module):
    """A linear layer as the sum over candidates, each with factors of its own: Σ_a p_a (x U_a) S_a."""

    def __init__(self, dense: nn.Linear, ranks: tuple[int, ...]) -> None:
        super().__init__()
        i, o = dense.in_features, dense.out_features
        self.alpha = nn.Parameter(torch.zeros(len(ranks)))
        self.down = nn.ModuleList(nn.Linear(i, r, bias=False) for r in ranks)
        self.up = nn.ModuleList(nn.Linear(r, o) for r in ranks)

    def forward(self, x: Tensor) -> Tensor:
        p = self.alpha.softmax(-1)
        return torch.stack([w * up(down(x)) for w, down, up in zip(p, self.down, self.up, strict=True)]).sum(0)


class ApartAttention(nn.Module):
    """Attention as the sum over candidates: logits Σ_a p_a q_a k_aᵀ, output Σ_a p_a softmax(logits) v_a S_a."""

    def __init__(self, width: int, heads: int, qk: tuple[int, ...], vo: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.alpha_qk, self.alpha_vo = nn.Parameter(torch.zeros(len(qk))), nn.Parameter(torch.zeros(len(vo)))
        self.q = nn.ModuleList(nn.Linear(width, heads * r) for r in qk)
        self.k = nn.ModuleList(nn.Linear(width, heads * r, bias=False) for r in qk)
        self.v = nn.ModuleList(nn.Linear(width, heads * r) for r in vo)
        self.o = nn.ModuleList(nn.Linear(heads * r, width) for r in vo)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, tokens, rank)

        p, logits = self.alpha_qk.softmax(-1), None
        for w, q, k in zip(p, self.q, self.k, strict=True):
            term = w * self.scale * heads(q(x)) @ heads(k(x)).mT
            logits = term if logits is None else logits + term
        assert logits is not None
        attention = logits.softmax(-1)
        p, total = self.alpha_vo.softmax(-1), torch.zeros_like(x)
        for w, v, o in zip(p, self.v, self.o, strict=True):
            total = total + w * o((attention @ heads(v(x))).transpose(1, 2).flatten(2))
        return total


def steps_of(name: str, batch: int, way: str, grid: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """One training step of a way, ready to be called."""
    model = common.vit(name, device)
    generator = torch.Generator().manual_seed(0)
    side = common.side_of(model)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    labels = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    alphas: list[nn.Parameter] = []
    before: Callable[[], Tensor] | None = None
    relaxation: Relaxation | None = None
    if way != "dense":
        sites = of_forms(shrinkable(find_sites(model)), ("ranks",))
        found = candidates_of(sites, lambda s, r: float(s.parameters(r)), grid="even", size=grid - 1)
        if way == "naive":
            _naive(model, sites, found)
            alphas = [p for n, p in model.named_parameters() if "alpha" in n]
            model.to(device)
        else:
            relaxation = relax_(model, sites, {n: c.ranks for n, c in found.items()}, Weights())
            if way == "search weights":  # the candidates that save half of the parameters
                relaxation.decide({n: c.ranks[(len(c.ranks) - 1) // 2] for n, c in found.items()})
            else:
                alphas = [p for _, p in relaxation.logits()]

                def before() -> Tensor:
                    relaxation.sample(1.0, generator)
                    return torch.stack(
                        [s.probabilities() @ torch.tensor(found[n].costs, device=device) for n,
                            s in relaxation.soft.items()]
                    ).sum()  # fmt: skip

    if alphas:
        chosen = {id(p) for p in alphas}
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
    learned = alphas or [p for _, p in (model.named_parameters() if relaxation is None else relaxation.weights())]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)

    def step() -> None:
        cost = before() if before is not None else None
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        if cost is not None:
            loss = loss * (cost / 1e7) ** 1.5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _naive(model: nn.Module, sites, found) -> None:
    for path in {s.path for s in sites.values() if s.kind in ("qk", "vo")}:
        a = sites[f"{path}:qk"].attention
        module = ApartAttention(a.in_features, a.heads, found[f"{path}:qk"].ranks, found[f"{path}:vo"].ranks, a.scale)
        owner, _, child = path.rpartition(".")
        setattr(model.get_submodule(owner), child, module)
    for name, site in sites.items():
        if isinstance(site, LinearSite):
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, Apart(model.get_submodule(name), found[name].ranks))


def peak_memory(arguments: argparse.Namespace, way: str) -> int:
    """Most bytes of a step's own tensors alive at once, the optimizer's included; on a CPU scratch space inside a
    kernel is not seen.
    """
    device, others = arguments.device, _tensors()
    step = steps_of(arguments.model, arguments.batch, way, arguments.grid, device, getattr(torch, arguments.dtype))
    step()  # makes the optimizer's moments
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    known = {id(t) for t in others}
    with LiveBytes([t for t in _tensors() if id(t) not in known]) as mode:
        step()
    return mode.peak


def _tensors() -> list[Tensor]:
    """Every tensor that the process holds: what a step keeps lies in closures too, so no module lists it."""
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor)]


def main(given: list[str] | None = None) -> dict[str, float]:
    p = common.parser(__doc__)
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--grid", type=int, default=8, help="candidates a site")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = p.parse_args(given)
    memory = {}
    for way in WAYS:
        memory[way] = peak_memory(arguments, way)
        gc.collect()
    calls = {
        way: steps_of(
            arguments.model, arguments.batch, way, arguments.grid, arguments.device, getattr(torch, arguments.dtype)
        )
        for way in WAYS
    }
    for call in calls.values():
        call()
    seconds = common.interleaved(calls, arguments.repeats)
    medians = {way: median(s) for way, s in seconds.items()}
    rows = [
        [w, medians[w], min(seconds[w]), max(seconds[w]), medians[w] / medians["dense"], medians["naive"] / medians[w],
            memory[w] / 2**20, memory[w] / memory["dense"]]
        for w in WAYS
    ]  # fmt: skip
    common.table(["step", "seconds", "lowest", "highest", "× dense", "naive ÷ this", "peak MiB", "× dense"], rows)
    if not arguments.no_write:
        common.write(
            f"search-step-{arguments.model}-{arguments.dtype}-b{arguments.batch}-{arguments.grid}",
            {"model": arguments.model, "batch": arguments.batch, "candidates": arguments.grid, "dtype": arguments.dtype,
                "seconds": seconds, "median": medians,
             "over_dense": {w: medians[w] / medians["dense"] for w in WAYS},
             "naive_over": {w: medians["naive"] / medians[w] for w in WAYS},
             "peak_bytes": memory, "memory_over_dense": {w: memory[w] / memory["dense"] for w in WAYS}},
        )  # fmt: skip
    return medians


if __name__ == "__main__":
    main()

"""What merging tokens costs beside the forward that it serves: finding them, their means, and handing updates back.

    python benchmarks/token_overhead.py            # DeiT-small, batch 16, float32, 70 % of the tokens
    python benchmarks/token_overhead.py --tiny     # tiny shapes, to try the script

Round after round in one run: the forward of the model with merged tokens, and of that very forward what its blocks
spend beside running, by the clock around each of them. Run apart from its forward, merging would find its tokens in
main memory, not where the block before has just left them. The goals: look-alikes at most 5 % of the forward, windows
of the grid at most 1 %. The dense forward stands beside, and how long each part of finding look-alikes takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

import torch
from common import interleaved, parser, random_pictures, synchronize, table, vit, write
from torch import Tensor, nn

import comcat
from comcat.hosts.blocks import reduced_blocks
from comcat.measure.memory import memory_kept
from comcat.modules.merging import COMPARED
from comcat.tokens import Groups, bipartite

GOALS = {"similar": 0.05, "grid": 0.01}
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--keep", type=float, default=0.7)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--rounds", type=int, default=21)
    p.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    a = p.parse_args(given)
    dense = vit(a.model, a.device, **(TINY if a.tiny else {}))
    x = random_pictures(a.batch, a.batch, TINY["img_size"] if a.tiny else 224, a.device)[0]
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense(x)}
    merging: dict[str, list[float]] = {}
    for how in GOALS:
        merged = copy.deepcopy(dense)
        comcat.apply_(merged, comcat.merge(merged, example=x[:1], keep=a.keep, how=how))
        calls[f"{how}: forward"], merging[how] = timed(merged, x)
    with torch.inference_mode():
        calls |= parts(dense, x, a.keep)
        with memory_kept():
            interleaved(calls, 3)  # until the process holds what it needs
            seconds = interleaved(calls, a.rounds)
    seconds |= {f"{how}: merging": spent[-a.rounds :] for how, spent in merging.items()}
    result = {**summary(seconds, a.keep), "model": a.model, "batch": a.batch, "keep": a.keep, "tiny": a.tiny}
    table(
        ["", "ms", "share of its forward", "quartiles", "goal"],
        [[name, r["ms"], f"{100 * r['share']:.2f} %", f"{100 * r['low']:.2f}–{100 * r['high']:.2f} %",
            f"{100 * r['goal']:g} %"]
            for name, r in result["rows"].items()],
    )  # fmt: skip
    print({name: f"{ms:.2f} ms" for name, ms in result["ms"].items()})
    if not a.no_write:
        write("token-overhead", result)
    return result


def timed(model: nn.Module, x: Tensor) -> tuple[Callable[[], None], list[float]]:
    """A forward of a model, and a list to which each forward adds the seconds that its blocks spend beside running."""
    spent: list[float] = []

    def now() -> float:
        synchronize()
        return time.perf_counter()

    def beside(reduction: Any) -> None:
        whole = reduction.forward

        def forward(block: nn.Module, run: Callable[..., Any], *given: Any) -> Any:
            def inside(*args: Any, **kwargs: Any) -> Any:
                began = now()
                result = run(*args, **kwargs)
                spent[-1] -= now() - began
                return result

            began = now()
            result = whole(block, inside, *given)
            spent[-1] += now() - began
            return result

        reduction.forward = forward

    for reduction in reduced_blocks(model).values():
        beside(reduction)

    def call() -> None:
        spent.append(0.0)
        model(x)

    return call, spent


def parts(model: nn.Module, x: Tensor, keep: float) -> dict[str, Callable[[], Any]]:
    """Finding look-alikes, their means and handing back, once each, on tokens of the first block's shape."""
    seen: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))  # type: ignore[index, union-attr]
    model(x)
    hook.remove()
    tokens = seen[0][:, 1:].contiguous()
    merges = min(tokens.shape[1] // 2, round((1 - keep) * tokens.shape[1]))
    groups: Groups = bipartite(tokens[..., :COMPARED], merges)
    few = groups.mean(tokens)
    return {
        "find": lambda: bipartite(tokens[..., :COMPARED], merges),
        "mean": lambda: groups.mean(tokens),
        "hand back": lambda: groups.added(tokens, few),
        "block": lambda: model.blocks[0](few),  # type: ignore[index, operator]
    }


def summary(seconds: dict[str, list[float]], keep: float) -> dict[str, Any]:
    """Shares of the forward, round by round, with quartiles; all medians in milliseconds."""
    rows = {}
    for how, goal in GOALS.items():
        shares = [m / f for m, f in zip(seconds[f"{how}: merging"], seconds[f"{how}: forward"], strict=True)]
        low, middle, high = quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
        rows[how] = {
            "ms": 1e3 * _median(seconds[f"{how}: merging"]), "share": middle, "low": low, "high": high, "goal": goal,
            "reached": middle <= goal,
        }  # fmt: skip
    return {"rows": rows, "ms": {name: 1e3 * _median(values) for name, values in seconds.items()}}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()

"""Measuring the parts of a model here, each in one interleaved run, or reading what was measured before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...sites import HiddenSite, LinearSite, Site, Sites, TokenSite, part
from ..running import evaluating
from ..timing import benchmark
from .cost import Curve, Latency, curves_of
from .parts import Bound, inputs_of, jobs_of
from .store import Store, circumstances, place_of

SHARES = (1.0, 0.75, 0.5, 0.35)
"""Shares of the tokens at which parts are timed, where tokens may become fewer."""
LEAST_MS = 2.0
"""A sample takes at least so long; short parts run several times in it."""


def measure_latency(
    model: nn.Module,
    sites: Sites,
    example: Tensor,
    *,
    tokens: Sequence[TokenSite] = (),
    batch: int = 1,
    compile: bool = False,
    quick: bool = False,
    cache: Path | None = None,
    progress: bool = False,
) -> Latency:
    """Measure the parts of a model where it is, in the type of its weights.

    Args:
        sites: those that may shrink. example: one picture (1, channels, height, width). tokens: blocks that may run on
            fewer tokens. batch: pictures at a time. compile: under ``torch.compile``. quick: a coarse table.
        cache: folder of earlier tables; by default the user's cache folder.
    """
    from tqdm import tqdm

    p = next(model.parameters())
    images = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(p)
    with evaluating(model):
        seen = inputs_of(model, images, {s.path: part(model, s.path) for s in (*sites.values(), *tokens)})
        store = Store(place_of(cache), circumstances(p, batch, compile, quick))
        jobs, parts, halves = jobs_of(model, sites, tokens, seen, SHARES if tokens else (1.0,), quick)
        asked = {f"{key}@{share:g}#{width}": build for key, share, width, build in jobs}
        missing = [name for name in asked if store.get(name) is None]
        with tqdm(total=len(missing), desc="timing parts", unit="part", disable=not progress, leave=False) as bar:
            for group in _groups(missing):
                store.put(_timed({name: asked[name] for name in group}, images, compile=compile, quick=quick))
                bar.update(len(group))
        whole = benchmark({"whole": model}, images, repeats=3 if quick else 7, min_seconds=0.3, compile=compile)[
            "whole"
        ]
    store.save()
    curves = curves_of({name: store.get(name) for name in asked})
    _add_rests(curves, tokens, sites, parts)
    spread = float(np.median([c.spread / max(c.dense, 1e-9) for c in curves.values()])) if curves else 0.0
    facts = {
        "batch": batch, "dtype": str(p.dtype).removeprefix("torch."), "device": store.about["device"],
        "compile": compile, "threads": torch.get_num_threads(), "parts": len(asked), "measured_now": len(missing),
        "spread": spread,
        "whole_ms": 1e3 * whole.median_s,
    }  # fmt: skip
    return Latency(curves, parts, 1e3 * whole.median_s, halves, facts=facts)


def _groups(names: Sequence[str]) -> Iterator[list[str]]:
    """What is compared with each other is timed in one run: all widths and numbers of tokens of a part."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("@")[0], []).append(name)
    yield from groups.values()


def _timed(
    builds: Mapping[str, Callable[[], Bound]], images: Tensor, *, compile: bool, quick: bool
) -> dict[str, dict[str, float]]:
    """Milliseconds of some parts, in one interleaved run."""
    parts = {name: build() for name, build in builds.items()}
    try:
        once = benchmark(parts, images, repeats=1, warmup=1, min_seconds=0.0)
        for name, bound in parts.items():
            bound.inner *= max(1, math.ceil(LEAST_MS / max(1e3 * once[name].median_s, 1e-3)))
        found = benchmark(parts, images, repeats=3 if quick else 7, warmup=1, min_seconds=0.02, compile=compile)
    except RuntimeError as error:
        raise ModelError(f"a part of the model cannot be timed alone: {str(error).splitlines()[0]}") from error
    return {
        name: {
            "ms": 1e3 * t.median_s / parts[name].inner,
            "spread": 1e3 * (t.high_s - t.low_s) / 2 / parts[name].inner,
        }
        for name, t in found.items()
    }


def _add_rests(
    curves: dict[tuple[str, float], Curve], tokens: Iterable[TokenSite], sites: Sites, parts: Mapping[str, str]
) -> None:
    """What a block costs beside its sites, at every number of tokens: norms, sums, and what cannot shrink."""
    for site in tokens:
        key = parts.get(site.name)
        if key is None or (f"{key} rest", 1.0) in curves:
            continue
        inside = {parts[s.name] for s in _covering(sites, site.path) if s.name in parts}
        for (name, share), curve in list(curves.items()):
            if name == f"{key} block":
                held = sum(curves[k, share].dense for k in inside if (k, share) in curves)
                curves[f"{key} rest", share] = Curve((), (), max(0.0, curve.dense - held))


def _covering(sites: Sites, block: str) -> Iterator[Site]:
    """The sites of a block, of a feed-forward its hidden units alone."""
    inside = [s for s in sites.values() if s.path.startswith(f"{block}.")]
    layers = {path for s in inside if isinstance(s, HiddenSite) for path in s.modules}
    yield from (s for s in inside if not (isinstance(s, LinearSite) and s.path in layers))

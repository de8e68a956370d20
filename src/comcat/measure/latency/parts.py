"""The parts of a model to be timed: each at some widths and on some numbers of tokens, with what it is called with."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...apply import apply_
from ...forms.tokens import token_entry
from ...hosts.symmetry import structure
from ...plan import Plan, SitePlan
from ...sites import HiddenSite, ProductSite, Site, Sites, TokenSite, part
from ..running import call

LARGER_THAN_A_CACHE = 48 * 2**20
"""Bytes."""

Seen = Mapping[str, tuple[tuple, dict[str, Any]]]


def inputs_of(model: nn.Module, images: Tensor, modules: Mapping[str, nn.Module]) -> Seen:
    """What each module is called with."""
    seen: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.setdefault(path, (args, kwargs))

        return hook

    handles = [m.register_forward_pre_hook(keep(path), with_kwargs=True) for path, m in modules.items()]
    try:
        with torch.no_grad():
            call(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


Job = tuple[str, float, int | str, Callable[[], "Bound"]]


def jobs_of(
    model: nn.Module, sites: Sites, tokens: Sequence[TokenSite], seen: Seen, shares: Sequence[float], quick: bool
) -> tuple[list[Job], dict[str, str], frozenset[str]]:
    """What to time: (key of the shape, share of the tokens, width or "dense", how to build it); and each site's key."""
    parts: dict[str, str] = {}
    jobs: list[Job] = []
    done: set[str] = set()
    by_path: dict[tuple[str, str], list[Site]] = {}
    for site in sites.values():
        by_path.setdefault((site.path, "attention" if isinstance(site, ProductSite) else site.name), []).append(site)
    few = {site.path: site for site in tokens}
    keys = {place: _key(model, place[0], group, seen) for place, group in by_path.items() if place[0] in seen}
    times = Counter(keys.values())
    for place, group in by_path.items():
        if place not in keys:
            continue
        path, key = place[0], keys[place]
        parts |= {s.name: key for s in group}
        if key in done:
            continue
        done.add(key)
        block = next((s for p, s in few.items() if path.startswith(f"{p}.")), None)
        for share in shares if block is not None else (1.0,):
            inputs = _fewer(seen[path], block, share)
            if inputs is None:
                continue
            for width in ("dense", *_widths(group[0], quick)):
                jobs.append((key, share, width, _Build(model, sites, group, width, path, inputs, times[key])))
    for site in tokens:
        if site.path not in seen:
            continue
        key = f"block {_shape(part(model, site.path), seen[site.path])}"
        parts[site.name] = key
        if key in done:
            continue
        done.add(key)
        for share in shares:
            inputs = _fewer(seen[site.path], site, share)
            if inputs is not None:
                jobs.append(
                    (f"{key} block", share, "dense", _Build(model, sites, [], "dense", site.path, inputs, len(tokens)))
                )
            if share < 1:
                merged = _Merged(model, site, share, seen[site.path], len(tokens))
                jobs.append((f"{key} block", share, "merged", merged))
    halves = frozenset(
        s.name for group in by_path.values() for s in group if len(group) == 2 and isinstance(s, ProductSite)
    )
    return jobs, parts, halves


def _key(model: nn.Module, path: str, group: Sequence[Site], seen: Seen) -> str:
    """What parts of one shape have in common."""
    kind = "attention" if isinstance(group[0], ProductSite) else group[0].kind
    return f"{kind} {'+'.join(s.kind for s in group)} {_shape(part(model, path), seen[path])}"


def _widths(site: Site, quick: bool) -> Iterator[int]:
    """Widths to time: of ranks of a head every multiple of 8, of units and layers about ten."""
    if isinstance(site, ProductSite):
        step = 16 if quick else 8
        yield from (w for w in range(step, site.full + 1, step))
        return
    most = site.full if isinstance(site, HiddenSite) else site.break_even
    count = 4 if quick else 8
    step = max(16, math.ceil(most / count / 16) * 16)
    yield from (w for w in range(step, most + 1, step))


def _shape(module: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> str:
    """A short hash that parts of one structure on inputs of one shape have in common."""
    shapes = tree_map_only(Tensor, lambda t: tuple(t.shape), inputs)
    return hashlib.sha256(repr((structure(module), shapes)).encode()).hexdigest()[:12]


def _fewer(inputs: tuple[tuple, dict[str, Any]], block: TokenSite | None, share: float) -> tuple[tuple, dict] | None:
    """Inputs with a share of the tokens; None where they do not have the block's tokens."""
    if share == 1.0 or block is None:
        return inputs
    rows = block.prefix + block.full
    count = max(1, round(rows * share))
    leaves = [t for t in _tensors(inputs) if t.ndim == 3 and t.shape[1] == rows]
    if not leaves:
        return None
    return tree_map_only(
        Tensor, lambda t: t[:, :count].contiguous() if t.ndim == 3 and t.shape[1] == rows else t, inputs
    )


def _tensors(inputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, inputs)
    return found


class Bound(nn.Module):
    """A part with what it is called with, ``inner`` times in a row.

    In a model a part's weights have left the cache when its turn comes. So copies of it take turns, as many as the
    model has parts of its kind, or as fill any cache.
    """

    def __init__(self, module: nn.Module, inputs: tuple[tuple, dict[str, Any]], times: int = 1) -> None:
        super().__init__()
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        copies = max(1, min(times, math.ceil(LARGER_THAN_A_CACHE / max(size, 1))))
        self.turns = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(copies - 1))])
        self.inputs, self.inner = inputs, copies

    def forward(self, images: Tensor) -> Any:
        said = None
        for i in range(self.inner):
            said = self.turns[i % len(self.turns)](*self.inputs[0], **self.inputs[1])
        return said


@dataclass(frozen=True)
class _Build:
    """A part at a width, with inputs."""

    model: nn.Module
    sites: Sites
    group: Sequence[Site]
    width: int | str
    path: str
    inputs: tuple[tuple, dict[str, Any]]
    times: int = 1

    def __call__(self) -> Bound:
        if self.width == "dense":
            return Bound(part(self.model, self.path), self.inputs, self.times)
        form = "units" if isinstance(self.group[0], HiddenSite) else "product"
        entries = {s.name: SitePlan(form=form, keep=int(self.width), full=s.full) for s in self.group}
        handle = apply_(self.model, Plan(sites=entries), sites=self.sites, weights=False)
        try:
            narrow = copy.deepcopy(part(self.model, self.path))
        finally:
            handle.revert()
        with torch.no_grad():
            for p in narrow.parameters():  # what was never filled may hold numbers that are slow to reckon with
                p.normal_(std=0.02)
        return Bound(narrow, self.inputs, self.times)


@dataclass(frozen=True)
class _Merged:
    """A block that merges tokens as it would in the model, its mask included."""

    model: nn.Module
    site: TokenSite
    share: float
    inputs: tuple[tuple, dict[str, Any]]
    times: int

    def __call__(self) -> Bound:
        site, rows = self.site, self.site.prefix + self.site.full
        keep = max(1, round(rows * self.share) - site.prefix)
        plan = Plan(sites={site.name: token_entry(site, "similar", keep)})
        handle = apply_(self.model, plan, sites=Sites({}))
        try:
            merged = copy.deepcopy(part(self.model, site.path))
        finally:
            handle.revert()
        return Bound(merged, self.inputs, self.times)

"""Token merging as it was published (Bolya et al. 2023), to compare with: the merged stream flows on.

After every block as many tokens go, found by the keys of that block's attention (mean over heads). Means are weighted
by size, and attention gets the logarithm of the sizes. After the last block every token is given back the value of its
group. Blocks are called as they are, by hooks.

Two things differ from the paper. It merges between a block's attention and its feed-forward, which no hook can reach
without copying the forward; here it is after the block, whose feed-forward so runs on the tokens before. And the tokens
in front take no part, so that sources are patch tokens 0, 2, 4, … instead of 1, 3, 5, …

Ours (:func:`comcat.merge`) differs in more. No state passes from block to block: each block reduces the full stream
anew, by the output of its own first norm, and hands each token the update of its group, so that what a merge takes away
is lost to one block alone and readers between blocks see every token. How many tokens go is measured, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from comcat import find_sites
from comcat.errors import ModelError, SettingsError
from comcat.sites import ProductSite, TokenSite
from comcat.statistics.trunk import find_trunk
from comcat.tokens import Groups, bipartite


@dataclass
class _Journey:
    """What became of the tokens on the way through the trunk, of one batch."""

    groups: Groups | None = None
    metric: Tensor | None = None


@dataclass
class _Keys:
    """Remembers the keys of a block's attention, mean over heads."""

    journey: _Journey
    start: int
    stop: int
    heads: int

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        keys = output.detach()[..., self.start : self.stop]
        self.journey.metric = keys.unflatten(-1, (self.heads, -1)).mean(-2)  # (batch, tokens, width)


@dataclass
class _Before:
    """Begins the journey at the first block; later ones weigh groups by the logarithm of their sizes."""

    journey: _Journey
    site: TokenSite
    first: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = args[0] if args else kwargs[self.site.stream]
        if self.first:
            self.journey.groups = None
        groups = self.journey.groups
        if groups is None or self.site.mask is None:
            return args, kwargs
        bias = nn.functional.pad(groups.sizes().log(), (self.site.prefix, 0))[:, None, None].to(x.dtype)
        return (x,), {**{k: v for k, v in kwargs.items() if k != self.site.stream}, self.site.mask: bias}


@dataclass
class _After:
    """Merges tokens after a block; after the last one gives every token its value."""

    journey: _Journey
    site: TokenSite
    merges: int
    last: bool

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        p, seen = self.site.prefix, self.journey.groups
        rows = x[:, p:]
        if self.last:
            rows = rows if seen is None else seen.spread(rows)
        elif merges := min(self.merges, rows.shape[1] // 2):
            assert self.journey.metric is not None
            step = bipartite(self.journey.metric[:, p:], merges)
            rows = step.mean(rows, None if seen is None else seen.sizes())
            self.journey.groups = step if seen is None else seen.then(step)
        x = torch.cat((x[:, :p], rows), 1)
        return (x, *output[1:]) if isinstance(output, tuple) else x


@dataclass
class PublishedMerging:
    """Hooks on a model's blocks; :meth:`revert` takes them away."""

    hooks: list[Any] = field(default_factory=list)

    def revert(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


def apply_published_(model: nn.Module, example: Any, keep: float) -> PublishedMerging:
    """Merge as many tokens after every block, so that ``keep`` is the mean share of tokens that blocks run on.

    Args:
        example: one picture (1, channels, height, width).

    Raises:
        ModelError: where a block cannot run on fewer tokens, or its keys cannot be read. SettingsError: for a share
        that as many merges after every block cannot reach.
    """
    trunk = find_trunk(model, example)
    if trunk.refused or not trunk.sites:
        raise ModelError("; ".join(map(str, trunk.refused)) or "the model has no blocks that run on fewer tokens")
    sites, full = trunk.sites, trunk.sites[0].full
    merges = merges_after_each(full, len(sites), keep)
    products = [s for s in find_sites(model).values() if isinstance(s, ProductSite) and s.kind == "qk"]
    journey, made = _Journey(), PublishedMerging()
    for number, site in enumerate(sites):
        a = next((s.attention for s in products if s.path.startswith(f"{site.path}.")), None)
        if a is None:
            made.revert()
            raise ModelError(f"{site.path}: its keys cannot be read")
        block, keys = model.get_submodule(site.path), model.get_submodule(a.k.path)
        made.hooks += [
            keys.register_forward_hook(_Keys(journey, a.k.start, a.k.stop, a.heads)),
            block.register_forward_pre_hook(_Before(journey, site, number == 0), with_kwargs=True),
            block.register_forward_hook(_After(journey, site, merges, number == len(sites) - 1)),
        ]
    return made


def merges_after_each(full: int, blocks: int, keep: float) -> int:
    """How many tokens go after each block but the last, for the share of tokens that is next to ``keep``."""
    shares: Mapping[int, float] = {}
    for merges in range(full // 2 + 1):
        tokens, total = full, 0
        for _ in range(blocks):
            total += tokens
            tokens -= min(merges, tokens // 2)
        shares = {**shares, merges: total / full / blocks}
    best = min(shares, key=lambda merges: abs(shares[merges] - keep))
    if abs(shares[best] - keep) > 0.05:
        raise SettingsError(f"got keep={keep:g}, expected {min(shares.values()):.2f} to 1 for {blocks} blocks")
    return best

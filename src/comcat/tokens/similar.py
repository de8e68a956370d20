"""Merging tokens that look alike: bipartite soft matching (Bolya et al. 2023, "Token Merging"), with its exact inverse.

Every second token is a source, the others are destinations. Each source finds the destination that it is most like (by
the cosine of a metric); the sources that are most alike are joined to theirs. One step merges at most half the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .exporting import exporting


@dataclass(frozen=True)
class Groups:
    """Which token goes into which group.

    Attributes:
        index: the group of each token, (batch, tokens), numbers from 0 to count − 1. count: groups of a picture.
    """

    index: Tensor
    count: int
    _rows: Tensor = field(init=False, repr=False, compare=False)
    """Each token's group as a row of all pictures' groups, (batch · tokens)."""
    _sizes: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        start = torch.arange(0, self.index.shape[0] * self.count, self.count, device=self.index.device)
        object.__setattr__(self, "_rows", (self.index + start[:, None]).flatten())
        object.__setattr__(self, "_sizes", self._summed(torch.ones_like(self.index, dtype=torch.float32)[..., None]))

    def sizes(self, weights: Tensor | None = None) -> Tensor:
        """Tokens in each group, (batch, count); with weights (batch, tokens) the sum of those."""
        return (self._sizes if weights is None else self._summed(weights[..., None]))[..., 0]

    def mean(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of each group's tokens, (batch, count, channels); weights are (batch, tokens)."""
        if weights is None:
            return self._summed(x).div_(self._sizes.to(x.dtype))
        return self._summed(x * weights[..., None].to(x.dtype)).div_(self.sizes(weights)[..., None].to(x.dtype))

    def _summed(self, x: Tensor) -> Tensor:
        """The sum of each group's rows: (batch, tokens, channels) → (batch, count, channels)."""
        if exporting():
            return self._one_hot(x.dtype).mT @ x
        start = x.new_zeros(x.shape[0] * self.count, x.shape[2])
        # whole rows at once: several times as fast as scatter and gather
        return start.index_add_(0, self._rows, x.flatten(0, 1)).unflatten(0, (x.shape[0], self.count))

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets its group's value: (batch, count, channels) → (batch, tokens, channels)."""
        if exporting():
            return self._one_hot(y.dtype) @ y
        return y.flatten(0, 1).index_select(0, self._rows).unflatten(0, self.index.shape)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + spread(y)``, of tokens x (batch, tokens, channels)."""
        return self.spread(y).add_(x)  # what was spread is new, and no one else's

    def behind(self, prefix: int) -> Groups:
        """The same groups where so many tokens come first, each of them a group of its own."""
        if not prefix:
            return self
        return Groups(torch.cat((_count(self.index, 0, prefix), self.index + prefix), 1), self.count + prefix)

    def then(self, after: Groups) -> Groups:
        """The groups of groups, as groups of the tokens."""
        return Groups(after.index.gather(1, self.index), after.count)

    def _one_hot(self, dtype: torch.dtype) -> Tensor:
        """(batch, tokens, count): runtimes that lack gather and scatter multiply by it instead."""
        return F.one_hot(self.index, self.count).to(dtype)


def bipartite(metric: Tensor, merges: int, prefix: int = 0) -> Groups:
    """One step of bipartite soft matching.

    Args:
        metric: what tokens are compared by, (batch, tokens, channels). merges: tokens that go, at most ⌊tokens / 2⌋.
        prefix: so many more tokens come first, which are not compared, each a group of its own.

    Returns:
        The groups: first the sources that stay alone, in their order, then the destinations in theirs. Without merges
        every token is a group.
    """
    tokens = metric.shape[1]
    if not 0 <= merges <= tokens // 2:
        raise ValueError(f"got {merges} merges of {tokens} tokens, expected 0 to {tokens // 2}")
    if merges == 0:
        return Groups(_count(metric, 0, prefix + tokens), prefix + tokens)
    with torch.no_grad():
        lengths = torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
        sources, destinations = metric[:, ::2], metric[:, 1::2] / lengths[:, 1::2]
        many = sources.shape[1]
        alone = prefix + many - merges  # groups in front of the destinations
        # each source is divided by its length last, as that does not change which destination is the nearest
        likeness, nearest = torch.bmm(sources, destinations.mT).max(-1)
        stays = _stays(likeness / lengths[:, ::2, 0], merges)
        # sources that stay are counted in their own order
        source_index = torch.where(stays == 1, stays.cumsum(1) + (prefix - 1), nearest + alone)
        others = _count(metric, alone, prefix + tokens - merges)
        if 2 * many > tokens:
            others = F.pad(others, (0, 1))
        index = torch.stack((source_index, others), dim=-1).flatten(1)[:, :tokens]
        if prefix:
            index = torch.cat((_count(metric, 0, prefix), index), 1)
    return Groups(index, prefix + tokens - merges)


def _count(like: Tensor, start: int, stop: int) -> Tensor:
    """Numbers from start, before stop, for every picture: (batch, stop − start)."""
    return torch.arange(start, stop, device=like.device).expand(like.shape[0], -1)


def _stays(likeness: Tensor, merges: int) -> Tensor:
    """0 for the highest of each row (batch, sources), of equal ones the first, else 1."""
    if exporting():  # ONNX has no stable sort, but its TopK takes the first of equals
        return 1 - F.one_hot(likeness.topk(merges, dim=-1).indices, likeness.shape[-1]).sum(1)
    first = likeness.argsort(dim=-1, descending=True, stable=True)[:, :merges]
    return torch.ones_like(likeness, dtype=torch.long).scatter_(1, first, 0)


def look_alikes(metric: Tensor, count: int, prefix: int = 0) -> Groups:
    """Groups of tokens that look alike, ``count`` of them: as many bipartite steps as that takes.

    After each step a group is compared by the mean of its tokens' metric.

    Args:
        metric: (batch, tokens, channels). count: groups, 1 to tokens. prefix: so many more tokens come first, each of
            them one more group.
    """
    tokens = metric.shape[1]
    if not 1 <= count <= tokens:
        raise ValueError(f"got {count} groups of {tokens} tokens, expected 1 to {tokens}")
    if tokens - count <= tokens // 2:
        return bipartite(metric, tokens - count, prefix)
    groups = bipartite(metric, tokens // 2)
    while groups.count > count:
        means = groups.mean(metric.detach())
        groups = groups.then(bipartite(means, min(groups.count - count, groups.count // 2)))
    return groups.behind(prefix)

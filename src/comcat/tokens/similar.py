"""Merging tokens that look alike: bipartite soft matching (Bolya et al. 2023, "Token Merging"), with its exact inverse.

Every second token is a source, the others are destinations. Each source finds the destination that it is most like (by
the cosine of a metric); the sources that are most alike are joined to theirs. One step merges at most half the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def sizes(self, weights: Tensor | None = None) -> Tensor:
        """Tokens in each group, (batch, count); with weights (batch, tokens) the sum of those."""
        weights = torch.ones_like(self.index, dtype=torch.float32) if weights is None else weights
        if exporting():
            return (self._one_hot(weights.dtype) * weights[..., None]).sum(1)
        start = weights.new_zeros(self.index.shape[0] * self.count)
        return start.index_add(0, self._rows(), weights.flatten()).unflatten(0, (self.index.shape[0], self.count))

    def mean(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of each group's tokens, (batch, count, channels); weights are (batch, tokens)."""
        sizes = self.sizes(weights)
        x = x if weights is None else x * weights[..., None].to(x.dtype)
        if exporting():
            summed = self._one_hot(x.dtype).mT @ x
        else:  # whole rows at once: several times as fast as scatter and gather
            start = x.new_zeros(x.shape[0] * self.count, x.shape[-1])
            summed = start.index_add_(0, self._rows(), x.flatten(0, 1)).unflatten(0, (x.shape[0], self.count))
        return summed / sizes[..., None].to(x.dtype)

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets its group's value: (batch, count, channels) → (batch, tokens, channels)."""
        if exporting():
            return self._one_hot(y.dtype) @ y
        return y.flatten(0, 1).index_select(0, self._rows()).unflatten(0, self.index.shape)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + spread(y)``, of tokens x (batch, tokens, channels)."""
        return self.spread(y).add_(x)  # what was spread is new, and no one else's

    def behind(self, prefix: int) -> Groups:
        """The same groups where so many tokens come first, each of them a group of its own."""
        if not prefix:
            return self
        first = torch.arange(prefix, device=self.index.device).expand(self.index.shape[0], -1)
        return Groups(torch.cat((first, self.index + prefix), 1), self.count + prefix)

    def _rows(self) -> Tensor:
        """Each token's group as a row of all pictures' groups, (batch · tokens)."""
        start = torch.arange(self.index.shape[0], device=self.index.device) * self.count
        return (self.index + start[:, None]).flatten()

    def then(self, after: Groups) -> Groups:
        """The groups of groups, as groups of the tokens."""
        return Groups(after.index.gather(1, self.index), after.count)

    def _one_hot(self, dtype: torch.dtype) -> Tensor:
        """(batch, tokens, count): runtimes that lack gather and scatter multiply by it instead."""
        return F.one_hot(self.index, self.count).to(dtype)


def bipartite(metric: Tensor, merges: int) -> Groups:
    """One step of bipartite soft matching.

    Args:
        metric: what tokens are compared by, (batch, tokens, channels). merges: tokens that go, at most ⌊tokens / 2⌋.

    Returns:
        The groups: first the sources that stay alone, in their order, then the destinations in theirs. Without merges
        every token is a group.
    """
    tokens = metric.shape[1]
    if not 0 <= merges <= tokens // 2:
        raise ValueError(f"got {merges} merges of {tokens} tokens, expected 0 to {tokens // 2}")
    if merges == 0:
        return Groups(torch.arange(tokens, device=metric.device).expand(metric.shape[0], -1), tokens)
    with torch.no_grad():
        metric = F.normalize(metric.detach(), dim=-1)
        sources, destinations = metric[:, ::2], metric[:, 1::2]
        batch, many = sources.shape[:2]
        alone = many - merges
        likeness, nearest = (sources @ destinations.mT).max(-1)
        goes = _highest(likeness, merges)
        # sources that stay are counted in their own order
        place = (~goes).long().cumsum(-1) - 1
        source_index = torch.where(goes, alone + nearest, place)
        others = torch.arange(tokens - many, device=metric.device) + alone
        index = torch.stack((_padded(source_index, tokens), _padded(others.expand(batch, -1), tokens)), dim=-1).flatten(
            1
        )[:, :tokens]
    return Groups(index, tokens - merges)


def _highest(likeness: Tensor, count: int) -> Tensor:
    """Which are the highest of each row (batch, sources), of equal ones the first: booleans of the same shape."""
    if exporting():  # ONNX has no stable sort, but its TopK takes the first of equals
        return F.one_hot(likeness.topk(count, dim=-1).indices, likeness.shape[-1]).sum(1) > 0
    first = likeness.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(likeness).scatter_(1, first, 1.0) > 0  # torch.jit.trace has no scatter of booleans


def _padded(index: Tensor, tokens: int) -> Tensor:
    """As many columns as there are sources: with an odd number of tokens one destination less."""
    return F.pad(index, (0, (tokens + 1) // 2 - index.shape[1]))


def look_alikes(metric: Tensor, count: int) -> Groups:
    """Groups of tokens that look alike, ``count`` of them: as many bipartite steps as that takes.

    After each step a group is compared by the mean of its tokens' metric.

    Args:
        metric: (batch, tokens, channels). count: groups, 1 to tokens.
    """
    tokens = metric.shape[1]
    if not 1 <= count <= tokens:
        raise ValueError(f"got {count} groups of {tokens} tokens, expected 1 to {tokens}")
    groups = bipartite(metric, min(tokens - count, tokens // 2))
    while groups.count > count:
        means = groups.mean(metric.detach())
        groups = groups.then(bipartite(means, min(groups.count - count, groups.count // 2)))
    return groups

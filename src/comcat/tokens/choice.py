"""Running some tokens only: those of the highest scores. The others rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .exporting import exporting


@dataclass(frozen=True)
class Chosen:
    """Which tokens are run.

    Attributes:
        index: their numbers, (batch, count), rising. tokens: how many there are.
    """

    index: Tensor
    tokens: int

    @property
    def count(self) -> int:
        return self.index.shape[1]

    def mean(self, x: Tensor) -> Tensor:
        """The chosen tokens: (batch, tokens, channels) → (batch, count, channels)."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def spread(self, y: Tensor) -> Tensor:
        """The chosen tokens get their values, the others zero: (batch, count, channels) → (batch, tokens, channels)."""
        if exporting():
            return F.one_hot(self.index, self.tokens).to(y.dtype).mT @ y
        where = self.index[..., None].expand_as(y)
        return y.new_zeros(y.shape[0], self.tokens, y.shape[-1]).scatter(1, where, y)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + spread(y)``, of tokens x (batch, tokens, channels)."""
        return x + self.spread(y)


def highest(scores: Tensor, count: int) -> Chosen:
    """The tokens of the highest scores (batch, tokens), in their own order."""
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"got {count} of {scores.shape[1]} tokens, expected 1 to {scores.shape[1]}")
    with torch.no_grad():
        index = scores.topk(count, dim=1).indices.sort(1).values
    return Chosen(index, scores.shape[1])

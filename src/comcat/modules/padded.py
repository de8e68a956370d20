"""A layer of one or several projections, thin ones among them, with heads padded to what the host's forward expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .answers import StandsForLinear


class PaddedRows(StandsForLinear):
    """Projections side by side in one layer, each with heads of ``rank`` channels padded with zeros to ``width``.

    Args:
        in_features: width of the input.
        sections: (heads, rank, width) of each projection, in the order of their rows. Rows that pass as they are have
            rank and width alike.
        interleaved: whether each head has its rows of all sections together, before the next head's.
        bias: whether there is one.
    """

    def __init__(
        self,
        in_features: int,
        sections: Sequence[tuple[int, int, int]],
        *,
        interleaved: bool = False,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.sections: list[tuple[int, int, int, int]] = []  # the first row, heads, rank, width
        at = 0
        for heads, rank, width in sections:
            self.sections.append((at, heads, rank, width))
            at += heads * rank
        self.linear = nn.Linear(in_features, at, bias=bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = sum(heads * width for heads, _, width in sections)

    def forward(self, x: Tensor) -> Tensor:
        return self._padded(self.linear(x))

    def product(self) -> Tensor:
        return self._padded(self.linear.weight.mT).mT

    @property
    def bias(self) -> Tensor | None:
        bias = self.linear.bias
        return None if bias is None else self._padded(bias)

    def _padded(self, rows: Tensor) -> Tensor:
        """(..., Σ heads · rank) → (..., Σ heads · width)"""
        wide: list[Tensor] = []
        for at, heads, rank, width in self.sections:
            part = rows[..., at : at + heads * rank].unflatten(-1, (heads, rank))
            wide.append(F.pad(part, (0, width - rank)))  # (..., heads, width)
        if self.interleaved:
            return torch.cat(wide, dim=-1).flatten(-2)
        flat = [part.flatten(-2) for part in wide]
        return torch.cat(flat, dim=-1) if len(flat) > 1 else flat[0]

    def extra_repr(self) -> str:
        return f"{self.in_features} → {[section[1:] for section in self.sections]}"

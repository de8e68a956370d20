"""Merging neighbours on the picture's grid: the asymmetric merging of CAIT, in our reconstruction from its abstract.

Windows of 1×2 tokens are run as one, or 2×1, or any other size; a row or column that is left over makes a smaller
window. The layout of the picture stays, and there is nothing to gather or to scatter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of ``window`` tokens (rows, columns) on a grid (rows, columns)."""

    grid: tuple[int, int]
    window: tuple[int, int]

    @property
    def over(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return math.ceil(self.grid[0] / self.window[0]), math.ceil(self.grid[1] / self.window[1])

    @property
    def count(self) -> int:
        """Windows on the grid."""
        return math.prod(self.over)

    @property
    def _whole(self) -> bool:
        """Whether no row or column is left over."""
        return self.grid == (self.over[0] * self.window[0], self.over[1] * self.window[1])

    def mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The mean of each window: (batch, tokens, channels) → (batch, count, channels); ``out``: written into it."""
        (rows, columns), (high, wide) = self.over, self.window
        if not self._whole:
            picture = x.unflatten(1, self.grid).permute(0, 3, 1, 2)
            pooled = F.avg_pool2d(picture, self.window, ceil_mode=True, count_include_pad=False).flatten(2).mT
            return pooled if out is None else out.copy_(pooled)
        windows = x.unflatten(1, (rows, high, columns, wide))
        into = None if out is None else out.unflatten(1, self.over)
        if high * wide == 2:  # a mean over two axes takes about twice as long
            means = torch.lerp(windows[:, :, 0, :, 0], windows[:, :, -1, :, -1], 0.5, out=into)
        else:
            means = torch.mean(windows, (2, 4), out=into)
        return means.flatten(1, 2) if out is None else out

    def spread(self, y: Tensor) -> Tensor:
        """Each token gets its window's value: (batch, count, channels) → (batch, tokens, channels)."""
        (rows, columns), (high, wide) = self.over, self.window
        y = y.unflatten(1, (rows, columns))[:, :, None, :, None].expand(-1, -1, high, -1, wide, -1)
        y = y.flatten(1, 2).flatten(2, 3)  # (batch, rows · high, columns · wide, channels)
        return y[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def added(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """``x + spread(y)``, of tokens x (batch, tokens, channels), written into ``out`` if given."""
        if not self._whole:
            return torch.add(x, self.spread(y), out=out)
        (rows, columns), (high, wide) = self.over, self.window
        windows = y.unflatten(1, (rows, columns))[:, :, None, :, None]  # added as they are, never written out
        shape = (rows, high, columns, wide)
        into = None if out is None else out.unflatten(1, shape)
        total = torch.add(x.unflatten(1, shape), windows, out=into)
        return total.flatten(1, 4) if out is None else out

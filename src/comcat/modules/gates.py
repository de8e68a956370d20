"""A gate on every channel of a site: open it changes nothing, closed the channel is as good as gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gate:
    """``y = g ⊙ x + (1 − g) ⊙ c``: at g = 1 a channel is as it was, at g = 0 it rests at c.

    A gate stands beside a model and not in it: the model's state dict is that of the model without gates.

    Attributes:
        opening: g (heads, channels), 1 at the start. Hidden units are channels of one head.
        rest: c (heads · channels,), or None for zero.
        watched: while pictures are watched, g once for every picture (pictures, heads · channels), so that its gradient
            tells the pictures apart; else None.
    """

    def __init__(self, heads: int, channels: int, *, rest: Tensor | None = None, device=None, dtype=None) -> None:
        self.opening = nn.Parameter(torch.ones(heads, channels, device=device, dtype=dtype))
        self.rest = rest
        self.watched: Tensor | None = None

    def watch(self, pictures: int) -> None:
        """Let the next forward tell so many pictures apart."""
        flat = self.opening.detach().flatten()
        self.watched = flat.expand(pictures, -1).clone().requires_grad_(True)

    def unwatch(self) -> None:
        """Go back to one g for all pictures."""
        self.watched = None

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, …, heads · channels), where the rows of a picture stand together."""
        g = self.opening.flatten() if self.watched is None else self._spread(x)
        g = g.to(x.dtype)
        if self.rest is None:
            return x * g
        return torch.addcmul(self.rest.to(x.dtype) * (1 - g), x, g)

    def _spread(self, x: Tensor) -> Tensor:
        """g of the picture that each row belongs to, (rows, 1, …, heads · channels): windows are rows of their own."""
        assert self.watched is not None
        each = self.watched.repeat_interleave(len(x) // len(self.watched), dim=0)
        return each.view(len(x), *[1] * (x.ndim - 2), x.shape[-1])

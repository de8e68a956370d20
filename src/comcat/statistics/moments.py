"""Streaming second moments of rows: what a calibration keeps, whatever number of pictures it sees."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import match_trace, shrinkage_weight

WIDE = 1024
"""Above so many channels moments are kept in float32, and a picture's own moment is never formed."""


class Moments:
    """Streaming second moments of rows with ``heads`` groups of ``width`` channels.

    Batches are reduced in their own precision around a running shift, so that a large mean does not eat the digits of a
    small variance, and accumulated in float64; wide ones (hidden units) in float32, which halves what a calibration
    holds. Also kept:
    ``Σ_i ‖S_i‖²`` over the pictures' own moments, for the shrinkage.
    """

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu", groups: int = 1) -> None:
        self.heads, self.width, self.groups = heads, width, groups
        self.pictures, self.rows = 0, 0.0
        self.shift: Tensor | None = None
        self.sum = torch.zeros(heads, width, dtype=torch.float64, device=device)
        kept = torch.float32 if width > WIDE else torch.float64
        self.outer = torch.zeros(heads, width, width, dtype=kept, device=device)
        self.square = torch.zeros(heads, dtype=torch.float64, device=device)
        self.group_square = torch.zeros(groups, dtype=torch.float64, device=device)

    def add(
        self,
        x: Tensor,
        pictures: int,
        *,
        centred: Literal["no", "all", "set"] = "no",
        per: Literal["row", "picture"] = "row",
    ) -> None:
        """Add a batch.

        Args:
            x: (..., rows of a softmax set, heads · width); leading dimensions are picture-major.
            pictures: how many pictures the batch holds.
            centred: ``"set"`` subtracts each set's own mean (keys); ``"all"`` keeps the mean so that it can be
                subtracted at the end.
            per: whether a picture's moment is its mean over rows or its sum.
        """
        x = x.detach().float()
        if centred == "set":
            x = x - x.mean(-2, keepdim=True)
        x = x.reshape(pictures, -1, self.heads, self.width)
        rows = x.shape[1]
        if centred == "all":
            if self.shift is None:
                self.shift = x.mean((0, 1), keepdim=True)
            x = x - self.shift
            self.sum += x.sum((0, 1)).double()
        x = x.permute(0, 2, 1, 3)  # (pictures, heads, rows, width)
        share = 1 / rows if per == "row" else 1.0
        self.pictures += pictures
        self.rows += rows * pictures
        if self.width > WIDE and self.groups == 1:
            self._add_wide(x, share)
            return
        own = x.mT @ x  # (pictures, heads, width, width)
        own.mul_(share)
        self.outer += own.sum(0).double()
        square = own.square_().sum(0).double()
        self.square += square.sum((-2, -1))
        if self.groups > 1:
            self.group_square += (
                square[0].unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1)).sum((1, 3)).diagonal()
            )

    def _add_wide(self, x: Tensor, share: float) -> None:
        """One product for the whole batch; ``‖X_iᵀX_i‖ = ‖X_iX_iᵀ‖``, which is small where pictures have few rows."""
        flat = x.transpose(0, 1).flatten(1, 2)  # (heads, pictures · rows, width)
        self.outer.baddbmm_(flat.mT, flat, alpha=share)
        small = x @ x.mT if x.shape[-2] < self.width else x.mT @ x
        self.square += small.square_().sum((0, -2, -1)).double() * share**2

    @property
    def mean(self) -> Tensor:
        """Mean over rows, (heads · width)."""
        mean = self.sum / max(self.rows, 1)
        return (mean if self.shift is None else mean + self.shift[0, 0].double()).flatten()

    @property
    def moment(self) -> Tensor:
        """Mean of the pictures' moments, less the mean's part where it was kept: (heads, width, width), float64."""
        moment = self.outer.double() / max(self.pictures, 1)
        if self.shift is None:
            return moment
        mean = self.sum / max(self.rows, 1)
        return moment.sub_(mean[:, :, None] * mean[:, None, :])

    def shrunk(self, target: Tensor) -> Tensor:
        """The moment pulled to a target of the same trace; see :func:`comcat.linalg.shrinkage_weight`.

        Both are (heads, width, width).
        """
        moment = self.moment
        target = match_trace(target, moment)
        weight = shrinkage_weight(moment, target, self.square / max(self.pictures, 1), self.pictures)[..., None, None]
        return (1 - weight) * moment + weight * target

    def shrunk_to_diagonal(self) -> Tensor:
        """The moment pulled to its own diagonal: channels that are not known to move together do not; (heads, width,
        width).
        """
        moment = self.moment
        diagonal = moment.diagonal(dim1=-2, dim2=-1).clone()
        away = moment.square().sum((-2, -1)) - diagonal.square().sum(-1)  # ‖S − T‖²
        spread = (self.square / max(self.pictures, 1) - moment.square().sum((-2, -1))).clamp_min(0)
        weight = (
            spread / (self.pictures - 1) / away.clamp_min(1e-300) if self.pictures > 1 else torch.full_like(away, 0.5)
        )
        weight = torch.where(away > 0, weight.clamp(max=1.0), torch.zeros_like(away))
        moment.mul_(1 - weight[:, None, None])
        moment.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        return moment

    def by_group(self) -> Moments:
        """The diagonal blocks alone: the moments of each of ``groups`` heads, out of the joint ones."""
        parts = Moments(self.groups, self.width // self.groups, self.sum.device)
        parts.pictures, parts.rows = self.pictures, self.rows
        parts.sum = self.sum.view(self.groups, -1)
        parts.shift = None if self.shift is None else self.shift.view(1, 1, self.groups, -1)
        blocks = (
            self.outer[0].unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1))
        )  # (group, row, group, column)
        parts.outer = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        parts.square = self.group_square
        return parts

    def finite(self) -> bool:
        """Whether nothing that came in was NaN or infinite: it would have stayed in the sums."""
        return bool(torch.isfinite(self.square).all() and torch.isfinite(self.sum).all())

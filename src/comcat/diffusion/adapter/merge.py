"""Merging an adapter into weights of the same shape, which can only be an approximation.

W_Q W_Kᵀ + U_Q S_Kᵀ has rank k + r; heads of width k hold at most the best rank-k approximation of it, and likewise of
W_V W_O + U_V S_O. What is cut off is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import NumericsError, SettingsError, UnsupportedSite, listed
from ...grad_mode import outside_inference_mode
from ...linalg import product_singular_values
from ..pipeline.components import components_of
from .attach import unknown, unload
from .fuse import not_plain, plain_linear
from .places import Place
from .records import adapters, check_unfused, located


@dataclass(frozen=True)
class MergeError:
    """How far a merged product is from the sum that it should be, over all heads of one attention.

    Attributes:
        relative: ‖what was cut off‖ / ‖the sum‖. of_term: ‖what was cut off‖ / ‖what the adapter adds‖: 0 is exact,
            from 1 on it would have been better not to merge.
    """

    relative: float
    of_term: float


@dataclass(frozen=True)
class MergeReport:
    """What merging an adapter cost, by ``<path>:qk`` and ``<path>:vo``."""

    name: str
    errors: Mapping[str, MergeError]

    @property
    def worst(self) -> str:
        """Where most of the adapter was lost."""
        return max(self.errors, key=lambda site: self.errors[site].of_term)

    def __str__(self) -> str:
        mean = sum(e.of_term for e in self.errors.values()) / len(self.errors)
        most = self.errors[self.worst].of_term
        return f"merged {self.name!r}: lost {mean:.1%} of its terms on average, at most {most:.1%} ({self.worst})"


@outside_inference_mode
def merge(target: Any, name: str) -> MergeReport:
    """Write an adapter at its scale into the model's own weights, whose shapes stay. This is approximate and cannot be
    taken back.

    The adapter is gone from the pipeline afterwards; others stay as they are. Exact is :func:`comcat.diffusion.fuse`.

    Raises:
        SettingsError: if there is no such adapter, or adapters are fused. UnsupportedSite: if a LoRA that is not merged
            sits on a projection, or something between q and k leaves no product to merge into. NumericsError: if
            weights hold NaN. Then nothing has changed.
    """
    held = adapters(target)
    if name not in held:
        raise SettingsError(unknown(name, held))
    check_unfused(target)
    adapter = held[name]
    places = list(located(components_of(target), adapter.record))
    if reasons := [f"{place.path} ({reason})" for place in places if (reason := _why_not(place))]:
        raise UnsupportedSite(f"cannot merge {name!r} at {len(reasons)} of {len(places)} attentions: {listed(reasons)}")
    errors: dict[str, MergeError] = {}
    merged: list[tuple[Tensor, Tensor]] = []
    for place in places:
        found, new = _merged(place, adapter.terms[place.path])
        errors |= {f"{place.path}:{product}": error for product, error in found.items()}
        merged += new
    with torch.no_grad():
        for parameter, value in merged:
            parameter.copy_(value)
    unload(target, name)
    return MergeReport(name, errors)


def _why_not(place: Place) -> str | None:
    if (between := place.host.between(place.attention)) is not None:
        return f"{between} between W_Q and W_K, which have no product"
    return not_plain(place)


@torch.no_grad()
def _merged(place: Place, terms: Any) -> tuple[dict[str, MergeError], list[tuple[Tensor, Tensor]]]:
    """The errors by product, and what each weight and bias becomes."""
    own = place.projections()
    linears: dict[str, Any] = {f: plain_linear(own[p]) for f, p in place.host.projections(place.attention).items()}
    errors: dict[str, MergeError] = {}
    new: list[tuple[Tensor, Tensor]] = []
    for product, (left, right) in {"qk": ("q_up", "k_down"), "vo": ("v_down", "out_up")}.items():
        if product not in terms.products:
            continue
        a = _Side(linears, terms, left)
        b = _Side(linears, terms, right)
        errors[product], (rows_a, rows_b) = _truncation(a, b)
        new += a.become(rows_a) + b.become(rows_b)
    return errors, new


class _Side:
    """One side of a product: of both streams, biases as further rows of the weight. Everything is (heads, rows,
    channels).
    """

    def __init__(self, linears: Mapping[str, Any], terms: Any, factor: str) -> None:
        self.out, self.heads = factor == "out_up", terms.heads
        self.linears = [linears[p + factor] for p in ("", "add_") if p + factor in linears]
        strength = terms.strength if factor in ("q_up", "v_down") else 1.0
        own: list[Tensor] = []
        extra: list[Tensor] = []
        for prefix, linear in zip(("", "add_"), self.linears, strict=False):
            weight = self._by_head(linear.weight)
            low_rank = getattr(terms, prefix + factor, None)
            rows = (
                weight.new_zeros(self.heads, weight.shape[1], terms.rank)
                if low_rank is None
                else self._by_head(low_rank) * strength
            )
            if linear.bias is not None and not self.out:  # the output's bias is no part of the product
                weight = torch.cat([weight, linear.bias.double().view(self.heads, 1, -1)], dim=1)
                rows = torch.cat([rows, rows.new_zeros(self.heads, 1, terms.rank)], dim=1)
            own.append(weight)
            extra.append(rows)
        self.own, self.extra = torch.cat(own, dim=1), torch.cat(extra, dim=1)
        self.sum = torch.cat([self.own, self.extra], dim=2)

    def become(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What weights and biases are when this side is (heads, rows, head_dim)."""
        new: list[tuple[Tensor, Tensor]] = []
        for linear in self.linears:
            count = linear.out_features if self.out else linear.in_features
            weight, rows = rows[:, :count], rows[:, count:]
            new.append((linear.weight, weight.permute(1, 0, 2).flatten(1) if self.out else weight.mT.flatten(0, 1)))
            if linear.bias is not None and not self.out:
                bias, rows = rows[:, 0], rows[:, 1:]
                new.append((linear.bias, bias.flatten()))
        return new

    def _by_head(self, weight: Tensor) -> Tensor:
        """A weight (heads · channels, in), or (out, heads · channels) of the output, as (heads, in or out,
        channels).
        """
        if self.out:
            return weight.double().unflatten(1, (self.heads, -1)).transpose(0, 1)
        return weight.double().unflatten(0, (self.heads, -1)).mT


def _truncation(a: _Side, b: _Side) -> tuple[MergeError, tuple[Tensor, Tensor]]:
    """The best approximation of ``A Bᵀ`` with as many channels as A had on its own: its error, and its two sides
    (heads, rows, head_dim).

    Two thin QRs and a small SVD.
    """
    if not (a.sum.isfinite().all() and b.sum.isfinite().all()):
        raise NumericsError("the weights of an attention hold NaN or infinity, so nothing can be merged into them")
    basis_a, r_a = torch.linalg.qr(a.sum)
    basis_b, r_b = torch.linalg.qr(b.sum)
    p, sigma, qt = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    width = a.own.shape[2]
    half = sigma[..., None, :width].sqrt()
    sides = basis_a @ p[..., :width] * half, basis_b @ qt.mT[..., :width] * half
    cut, whole = sigma[..., width:].norm(), sigma.norm()
    added = product_singular_values(a.extra, b.extra).norm()
    error = MergeError(float(cut / whole) if whole > 0 else 0.0, float(cut / added) if added > 0 else 0.0)
    return error, (_filled(sides[0], width), _filled(sides[1], width))


def _filled(side: Tensor, width: int) -> Tensor:
    """Channels of zeros where a product has less rank than heads are wide."""
    return F.pad(side, (0, width - side.shape[-1]))

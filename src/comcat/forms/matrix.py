"""Each matrix of an attention at low rank, apart: what factorising products is compared with (Xiao et al. 2023, Table
1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..hosts import host_of
from ..linalg import factorize
from ..modules.lowrank import ConcatLinear, LowRankLinear
from ..modules.tensor import matrix_factors
from ..plan import SitePlan
from ..sites import LinearSite, ProductSite, Replacement, Undo, part
from .product import Product, layout
from .protocol import Flow, Material, Planned, fill, in_place_of


@runtime_checkable
class LayerStatistic(Protocol):
    """A statistic by which each matrix of an attention is decomposed apart, not by the weights alone."""

    def layer(self, path: str, start: int) -> tuple[Tensor, Tensor | None]:
        """Of a layer's rows from ``start`` on, one matrix (out, in): the metric of its narrower side, and the input's
        mean (in,) where a bias makes up for what is lost of it.
        """
        ...


class Matrix:
    """See :class:`comcat.forms.protocol.Form`. Of a linear layer it is the same as its product.

    Biases stay where they are.
    """

    name = "matrix"
    kinds = frozenset({"qk", "vo", "linear"})

    def check(self, planned: Planned) -> None:
        """Raises PlanError where the matrices are not in layers of their own, or interleaved in one."""
        site = planned.site
        if isinstance(site, ProductSite):
            a = site.attention
            if a.mount == "crossed" or any(p.heads > 1 or p.seen is not None for p in (a.q, a.k, a.v)):
                raise PlanError(f"{site.name}: form 'matrix' expects matrices in blocks of a layer, got packed ones")
            if a.normed:
                raise PlanError(f"{site.name}: form 'matrix' expects plain layers, got one with a batch norm behind it")

    def parameters(self, site: ProductSite | LinearSite, entry: SitePlan) -> float:
        return entry.keep * self._per_rank(site) + site.biases

    def macs(self, site: ProductSite | LinearSite, entry: SitePlan, flow: Flow) -> float:
        compared = 0 if isinstance(site, LinearSite) else site.heads * site.full_rank * flow.pairs
        return entry.keep * self._per_rank(site) * flow.rows + compared

    def _per_rank(self, site: ProductSite | LinearSite) -> int:
        inner = 0 if isinstance(site, LinearSite) else 2 * site.heads * site.full_rank
        return site.in_features + site.out_features + inner

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        site = planned[0].site
        if isinstance(site, LinearSite):
            return Product().apply(model, planned, material)
        a, ranks = site.attention, {side: p.entry.keep for p in planned for side in p.site.kind}  # of q, k, v, o
        parts: dict[str, nn.Module] = {}
        seen = material.statistic if isinstance(material.statistic, LayerStatistic) and material.fill else None
        for path in dict.fromkeys(p.path for p in (a.q, a.k, a.v)):
            sides = {side: p for side, p in zip("qkv", (a.q, a.k, a.v), strict=True) if p.path == path}
            if not ranks.keys() & sides.keys():
                continue
            made: list[nn.Module] = []
            for side, rows in layout(sides, part(model, path).weight.shape[0]):
                bias = None if rows.bias is not None else rows.bias_or_none(model)
                by = seen.layer(path, rows.start) if seen and side in ranks else None
                made.append(_matrix(rows.weight(model), bias, ranks.get(side), material.fill, by))
            parts[path] = in_place_of(part(model, path), made[0] if len(made) == 1 else ConcatLinear(made))
        if "o" in ranks:
            out = part(model, a.out)
            by = seen.layer(a.out, 0) if seen else None
            narrow = _matrix(out.get_parameter("weight").flatten(1), out.bias, ranks["o"], material.fill, by)
            parts[a.out] = in_place_of(out, narrow)
        return host_of(a).mount(model, a, Replacement(parts=parts))


def _matrix(
    weight: Tensor, bias: Tensor | None, rank: int | None, filled: bool, by: tuple[Tensor, Tensor | None] | None
) -> nn.Module:
    factory = {"device": weight.device, "dtype": weight.dtype}
    if rank is None:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **factory)
        fill(dense.weight, weight.detach())
        fill(dense.bias, None if bias is None else bias.detach())
        return dense
    module = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias=bias is not None, **factory)
    if filled:
        weight, metric, mean = weight.detach(), *(by or (None, None))
        first, last = matrix_factors(weight, rank) if metric is None else nearest_factors(weight, metric, rank)
        if bias is not None and mean is not None:
            bias = bias.detach().double() + weight.double() @ mean - last @ (first @ mean)
        fill(module.first.weight, first)
        fill(module.last.weight, last)
        fill(module.last.bias, None if bias is None else bias.detach())
    return module


def nearest_factors(weight: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r factors of a matrix (out, in) nearest in a metric: first (rank, in) and last (out, rank), float64.

    The metric is one of the input, C (in, in), where that is the narrower side: ``‖(W − W') C^½‖`` is least. Where the
    output is, it is ``W C Wᵀ`` (out, out).
    """
    weight, metric = weight.double(), metric.double()
    if weight.shape[1] <= weight.shape[0]:
        left, right = factorize(metric, weight.mT @ weight).truncate(rank)
        return left.mT, weight @ right
    eye = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    left, right = factorize(metric, eye).truncate(rank)
    return left.mT @ weight, right

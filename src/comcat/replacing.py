"""Builds the modules that a plan puts in place, and fills in their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .factors import Linears, Products, Statistic, Values, factorize_site, truncate_site
from .hosts.anatomy import norm_and_gate
from .linalg import Factorization
from .modules.lowrank import ConcatLinear, LowRankAttention, LowRankLinear, NarrowHeads, PaddedHeads
from .modules.tensor import TENSOR_FORMS, matrix_factors
from .sites import Attention, Replacement, Site, part

if TYPE_CHECKING:
    from .plan import SitePlan

Planned = tuple[Site, "SitePlan"]


class Builder:
    """Builds the modules of a plan and fills in their weights."""

    def __init__(
        self,
        model: nn.Module,
        statistic: Statistic,
        factorizations: Mapping[str, Factorization],
        joint_refit: bool,
        weights: bool,
    ) -> None:
        self.model, self.statistic, self.known = model, statistic, factorizations
        self.joint_refit, self.weights = joint_refit, weights

    def truncated(self, site: Site, plan: SitePlan) -> Any:
        """The thin weights of a site."""
        factorization = self.known.get(site.name) or factorize_site(self.model, site, self.statistic)
        return truncate_site(
            self.model, site, factorization, plan.rank, self.statistic, plan.head_ranks, self.joint_refit
        )

    def products(self, a: Attention, qk: Planned | None) -> Products:
        """Queries and keys of an attention: thin, or as they are where no plan names them, so that nothing is rounded."""
        return _identity_products(self.model, a) if qk is None else self.truncated(*qk)

    def values(self, a: Attention, vo: Planned | None) -> Values:
        """Values and output projection likewise."""
        return _identity_values(self.model, a) if vo is None else self.truncated(*vo)

    def linear(self, site: Site, plan: SitePlan) -> nn.Module:
        dense = part(self.model, site.path)
        assert isinstance(dense, nn.Linear)
        if plan.form in TENSOR_FORMS:
            return TENSOR_FORMS[plan.form](dense, plan.shape, self.weights)
        module = LowRankLinear(site.in_features, site.out_features, plan.rank, **_factory(dense))
        if self.weights:
            thin: Linears = self.truncated(site, plan)
            _fill(module.first.weight, thin.first)
            _fill(module.last.weight, thin.last)
            _fill(module.last.bias, thin.bias)
        return module

    def attention(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        forms = {p[1].form for p in (qk, vo) if p is not None}
        if "matrix" in forms:
            return self._matrices(a, qk, vo)
        if a.mount == "values":
            assert vo is not None
            return self._values_alone(a, *vo)
        return self._parts(a, qk, vo) if a.mount == "parts" else self._whole(a, qk, vo)

    def _whole(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        host = part(self.model, a.path)
        norm, gate = norm_and_gate(host)
        out = part(self.model, a.out)
        rank_qk, rank_vo = (a.width if p is None else p[1].rank for p in (qk, vo))
        dense_vo = vo is None  # then its biases stay as they are, and what it costs stays what it cost
        biased = any(p.bias_or_none(self.model) is not None for p in (a.q, a.v))
        module = LowRankAttention(
            a.in_features, a.out_features, a.heads, rank_qk, rank_vo, scale=a.scale,
            qkv_bias=biased, out_bias=out.bias is not None or not dense_vo,
            attention_dropout=getattr(getattr(host, "attn_drop", None), "p", 0.0), projection_dropout=getattr(getattr(host, "proj_drop", None), "p", 0.0),
            norm=norm, gate=gate, **_factory(out),
        )  # fmt: skip
        module.qkv.to(**_factory(part(self.model, a.q.path)))
        if self.weights:
            products, values = self.products(a, qk), self.values(a, vo)
            _fill(module.qkv.weight, torch.cat([t.flatten(0, 1) for t in (products.q, products.k, values.v)]))
            if biased:
                q, _, v = module.qkv.bias.detach().zero_().split(module.widths)
                _fill(q, products.q_bias)
                _fill(v, values.v_bias)
            _fill(module.proj.weight, values.out)
            _fill(module.proj.bias, values.out_bias)
        return Replacement(whole=module, without_value_bias=True)

    def _parts(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        rank_qk, rank_vo = (a.width if p is None else p[1].rank for p in (qk, vo))
        width = max(rank_qk, rank_vo)
        out = part(self.model, a.out)
        factory = _factory(out)
        query_bias = a.q.bias_or_none(self.model) is not None
        dense_vo = vo is None
        value_bias = a.v.bias_or_none(self.model) is not None and (dense_vo or not a.folds_value_bias)
        out_bias = out.bias is not None or not dense_vo
        q, k, v = (
            _heads_linear(a, rank, width, bias, _factory(part(self.model, p.path)))
            for p, rank, bias in ((a.q, rank_qk, query_bias), (a.k, rank_qk, False), (a.v, rank_vo, value_bias))
        )
        o = (
            nn.Linear(a.heads * width, a.out_features, bias=out_bias, **factory)
            if rank_vo == width
            else NarrowHeads(a.heads, rank_vo, width, a.out_features, bias=out_bias, **factory)
        )
        if self.weights:
            products, values = self.products(a, qk), self.values(a, vo)
            for module, weight, bias in (
                (q, products.q, products.q_bias),
                (k, products.k, None),
                (v, values.v, values.v_bias),
            ):
                _fill(_inner(module).weight, weight.flatten(0, 1))
                _fill(_inner(module).bias, bias)
            _fill(_inner(o).weight, values.out)
            _fill(_inner(o).bias, values.out_bias)
        return Replacement(
            parts={a.q.path: q, a.k.path: k, a.v.path: v, a.out: o}, width=width, without_value_bias=True
        )

    def _values_alone(self, a: Attention, site: Site, plan: SitePlan) -> Replacement:
        factory = _factory(part(self.model, a.out))
        fused = a.q.path == a.v.path
        host = part(self.model, a.v.path)
        keep = a.v.start if fused else 0
        kept_bias = host.bias[:keep] if fused and host.bias is not None else None
        value_bias = a.v.bias_or_none(self.model) is not None and not a.folds_value_bias
        apart = a.v.bias is not None
        projection = PaddedHeads(
            a.in_features,
            a.heads,
            plan.rank,
            a.width,
            keep=keep,
            bias=kept_bias is not None or (value_bias and not apart),
            **_factory(host),
        )
        out = NarrowHeads(a.heads, plan.rank, a.width, a.out_features, **factory)
        if self.weights:
            values: Values = self.truncated(site, plan)
            weight, bias = values.v.flatten(0, 1), values.v_bias
            if keep:
                weight = torch.cat([host.weight[:keep].double(), weight])
            if projection.linear.bias is not None:
                thin = weight.new_zeros(len(weight) - keep) if bias is None else bias.flatten()
                _fill(projection.linear.bias, thin if kept_bias is None else torch.cat([kept_bias.double(), thin]))
            _fill(projection.linear.weight, weight)
            _fill(out.linear.weight, values.out)
            _fill(out.linear.bias, values.out_bias)
        return Replacement(parts={a.v.path: projection, a.out: out}, without_value_bias=a.folds_value_bias)

    def _matrices(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        """Each matrix of a pair at low rank, apart: what factorising products is compared with. Biases stay where they are."""
        ranks = {side: None if p is None else p[1].rank for p, sides in ((qk, "qk"), (vo, "vo")) for side in sides}
        layers: dict[str, list[nn.Module]] = {}
        for side, projection in (("q", a.q), ("k", a.k), ("v", a.v)):
            bias = None if projection.bias is not None else projection.bias_or_none(self.model)
            layers.setdefault(projection.path, []).append(
                self._matrix(projection.weight(self.model), bias, ranks[side])
            )
        parts = {path: found[0] if len(found) == 1 else ConcatLinear(found) for path, found in layers.items()}
        out = part(self.model, a.out)
        parts[a.out] = self._matrix(out.get_parameter("weight"), out.bias, ranks["o"])
        return Replacement(parts=parts)

    def _matrix(self, weight: Tensor, bias: Tensor | None, rank: int | None) -> nn.Module:
        factory = {"device": weight.device, "dtype": weight.dtype}
        if rank is None:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **factory)
            _fill(dense.weight, weight.detach())
            _fill(dense.bias, None if bias is None else bias.detach())
            return dense
        module = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias=bias is not None, **factory)
        if self.weights:
            first, last = matrix_factors(weight.detach(), rank)
            _fill(module.first.weight, first)
            _fill(module.last.weight, last)
            _fill(module.last.bias, None if bias is None else bias.detach())
        return module


def _heads_linear(a: Attention, rank: int, width: int, bias: bool, factory: dict) -> nn.Module:
    if rank == width:
        return nn.Linear(a.in_features, a.heads * rank, bias=bias, **factory)
    return PaddedHeads(a.in_features, a.heads, rank, width, bias=bias, **factory)


def _inner(module: nn.Module) -> nn.Linear:
    inner = module if isinstance(module, nn.Linear) else module.linear
    assert isinstance(inner, nn.Linear)
    return inner


def _identity_products(model: nn.Module, a: Attention) -> Products:
    """Queries and keys as they are."""
    bias = a.q.bias_or_none(model)
    q, k = (p.weight(model).detach().view(a.heads, a.width, -1) for p in (a.q, a.k))
    return Products(q, None if bias is None else bias.detach().view(a.heads, a.width), k)


def _identity_values(model: nn.Module, a: Attention) -> Values:
    """The values and output projection as they are, biases where they stand."""
    out = part(model, a.out)
    weight = out.weight.detach()
    out_bias = weight.new_zeros(a.out_features) if out.bias is None else out.bias.detach()
    bias = a.v.bias_or_none(model)
    v = a.v.weight(model).detach().view(a.heads, a.width, -1)
    return Values(v, None if bias is None else bias.detach().view(a.heads, a.width), weight, out_bias)


def _factory(module: nn.Module) -> dict:
    weight = module.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def _fill(target: Tensor | None, value: Tensor | None) -> None:
    if target is None or value is None:
        return
    with torch.no_grad():
        target.copy_(value.reshape(target.shape))

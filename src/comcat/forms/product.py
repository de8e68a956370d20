"""Thin factors: the QK and VO products of an attention, and linear layers, at low rank (COMCAT, Xiao et al. 2023, Eq.
4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import PlanError
from ..factors import Linears, Products, Values, truncate_site
from ..hosts import host_of
from ..hosts.mounting import exchange
from ..hosts.symmetry import norm_and_gate
from ..modules.lowrank import LowRankAttention, LowRankLinear, NarrowHeads, PaddedHeads
from ..plan import SitePlan
from ..sites import Attention, LinearSite, ProductSite, Replacement, Undo, part
from .protocol import Flow, Material, Planned, factory_of, fill

Factored = ProductSite | LinearSite


class Product:
    """See :class:`comcat.forms.protocol.Form`."""

    name = "product"
    kinds = frozenset({"qk", "vo", "linear"})

    def check(self, planned: Planned) -> None:
        site, entry = planned.site, planned.entry
        heads = entry.head_ranks
        if heads is not None and (len(heads) != site.heads or not all(1 <= r <= entry.keep for r in heads)):
            raise PlanError(f"{site.name}: got head ranks {heads}, expected {site.heads} of 1 to {entry.keep}")

    def parameters(self, site: Factored, entry: SitePlan) -> float:
        return site.parameters(entry.keep)

    def macs(self, site: Factored, entry: SitePlan, flow: Flow) -> float:
        return site.macs(entry.keep, flow.rows, flow.pairs)

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        build = _Builder(model, material)
        first = planned[0].site
        if isinstance(first, LinearSite):
            return exchange(model, first.path, build.linear(planned[0]))
        by_kind = {p.site.kind: p for p in planned}
        replacement = build.attention(first.attention, by_kind.get("qk"), by_kind.get("vo"))
        return host_of(first.attention).mount(model, first.attention, replacement)


@dataclass(frozen=True)
class _Builder:
    """Builds the modules of an attention or a linear layer and fills in their weights."""

    model: nn.Module
    material: Material

    def truncated(self, planned: Planned) -> object:
        """The thin weights of a site."""
        site, entry, material = planned.site, planned.entry, self.material
        found = material.spectrum(self.model, site)
        return truncate_site(
            self.model, site, found, entry.keep, material.statistic, entry.head_ranks, material.joint_refit
        )

    def products(self, a: Attention, qk: Planned | None) -> Products:
        """Queries and keys of an attention: thin, or untouched where no plan names them, so that nothing is rounded."""
        thin = _identity_products(self.model, a) if qk is None else self.truncated(qk)
        assert isinstance(thin, Products)
        return thin

    def values(self, a: Attention, vo: Planned | None) -> Values:
        """Values and output projection likewise."""
        thin = _identity_values(self.model, a) if vo is None else self.truncated(vo)
        assert isinstance(thin, Values)
        return thin

    def linear(self, planned: Planned) -> nn.Module:
        site = planned.site
        dense = part(self.model, site.path)
        module = LowRankLinear(site.in_features, site.out_features, planned.entry.keep, **factory_of(dense))
        if self.material.fill:
            thin = self.truncated(planned)
            assert isinstance(thin, Linears)
            fill(module.first.weight, thin.first)
            fill(module.last.weight, thin.last)
            fill(module.last.bias, thin.bias)
        return module

    def attention(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        if a.mount == "values":
            assert vo is not None
            return self._values_alone(a, vo)
        return self._parts(a, qk, vo) if a.mount == "parts" else self._whole(a, qk, vo)

    def _whole(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        host = part(self.model, a.path)
        norm, gate = norm_and_gate(host)
        out = part(self.model, a.out)
        rank_qk, rank_vo = (a.width if p is None else p.entry.keep for p in (qk, vo))
        dense_vo = vo is None  # then its biases stay as they are, and what it costs stays what it cost
        biased = any(p.bias_or_none(self.model) is not None for p in (a.q, a.v))
        module = LowRankAttention(
            a.in_features,
            a.out_features,
            a.heads,
            rank_qk,
            rank_vo,
            scale=a.scale,
            qkv_bias=biased,
            out_bias=out.bias is not None or not dense_vo,
            attention_dropout=getattr(getattr(host, "attn_drop", None), "p", 0.0),
            projection_dropout=getattr(getattr(host, "proj_drop", None), "p", 0.0),
            norm=norm,
            gate=gate,
            **factory_of(out),
        )
        module.qkv.to(**factory_of(part(self.model, a.q.path)))
        if self.material.fill:
            products, values = self.products(a, qk), self.values(a, vo)
            fill(module.qkv.weight, torch.cat([t.flatten(0, 1) for t in (products.q, products.k, values.v)]))
            if biased:
                q, _, v = module.qkv.bias.detach().zero_().split(module.widths)
                fill(q, products.q_bias)
                fill(v, values.v_bias)
            fill(module.proj.weight, values.out)
            fill(module.proj.bias, values.out_bias)
        return Replacement(whole=module, without_value_bias=True)

    def _parts(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        rank_qk, rank_vo = (a.width if p is None else p.entry.keep for p in (qk, vo))
        width = max(rank_qk, rank_vo)
        out = part(self.model, a.out)
        factory = factory_of(out)
        query_bias = a.q.bias_or_none(self.model) is not None
        dense_vo = vo is None
        value_bias = a.v.bias_or_none(self.model) is not None and (dense_vo or not a.folds_value_bias)
        out_bias = out.bias is not None or not dense_vo
        q, k, v = (
            _heads_linear(a, rank, width, bias, factory_of(part(self.model, p.path)))
            for p, rank, bias in ((a.q, rank_qk, query_bias), (a.k, rank_qk, False), (a.v, rank_vo, value_bias))
        )
        o = (
            nn.Linear(a.heads * width, a.out_features, bias=out_bias, **factory)
            if rank_vo == width
            else NarrowHeads(a.heads, rank_vo, width, a.out_features, bias=out_bias, **factory)
        )
        if self.material.fill:
            products, values = self.products(a, qk), self.values(a, vo)
            for module, weight, bias in (
                (q, products.q, products.q_bias),
                (k, products.k, None),
                (v, values.v, values.v_bias),
            ):
                fill(_inner(module).weight, weight.flatten(0, 1))
                fill(_inner(module).bias, bias)
            fill(_inner(o).weight, values.out)
            fill(_inner(o).bias, values.out_bias)
        return Replacement(
            parts={a.q.path: q, a.k.path: k, a.v.path: v, a.out: o}, width=width, without_value_bias=True
        )

    def _values_alone(self, a: Attention, vo: Planned) -> Replacement:
        factory = factory_of(part(self.model, a.out))
        fused = a.q.path == a.v.path
        host = part(self.model, a.v.path)
        keep = a.v.start if fused else 0
        kept_bias = host.bias[:keep] if fused and host.bias is not None else None
        value_bias = a.v.bias_or_none(self.model) is not None and not a.folds_value_bias
        apart = a.v.bias is not None
        projection = PaddedHeads(
            a.in_features,
            a.heads,
            vo.entry.keep,
            a.width,
            keep=keep,
            bias=kept_bias is not None or (value_bias and not apart),
            **factory_of(host),
        )
        out = NarrowHeads(a.heads, vo.entry.keep, a.width, a.out_features, **factory)
        if self.material.fill:
            values = self.values(a, vo)
            weight, bias = values.v.flatten(0, 1), values.v_bias
            if keep:
                weight = torch.cat([host.weight[:keep].double(), weight])
            if projection.linear.bias is not None:
                thin = weight.new_zeros(len(weight) - keep) if bias is None else bias.flatten()
                fill(projection.linear.bias, thin if kept_bias is None else torch.cat([kept_bias.double(), thin]))
            fill(projection.linear.weight, weight)
            fill(out.linear.weight, values.out)
            fill(out.linear.bias, values.out_bias)
        return Replacement(parts={a.v.path: projection, a.out: out}, without_value_bias=a.folds_value_bias)


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

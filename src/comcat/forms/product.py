"""Thin factors: the QK and VO products of an attention, and linear layers, at low rank (COMCAT, Xiao et al. 2023, Eq.
4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..factors import Linears, Products, Values, extra_value, kept_keys, truncate_site
from ..hosts import host_of
from ..hosts.mounting import exchange
from ..hosts.symmetry import norm_and_gate
from ..modules.crossed import LowRankCrossAttention
from ..modules.lowrank import LowRankAttention, LowRankLinear, NarrowHeads
from ..modules.padded import PaddedRows
from ..plan import SitePlan
from ..sites import Attention, LinearSite, ProductSite, Projection, Replacement, Undo, dense_in, part
from .protocol import Flow, Material, Planned, factory_of, fill, in_place_of

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
        return in_place_of(dense, module)

    def attention(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        build = {"whole": self._whole, "crossed": self._crossed, "parts": self._parts, "padded": self._padded}
        return build[a.mount](a, qk, vo)

    def _whole(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        host = part(self.model, a.path)
        norm, gate = norm_and_gate(host)
        out = part(self.model, a.out)
        rank_qk, rank_vo = _ranks(a, qk, vo)
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

    def _crossed(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        host = part(self.model, a.path)
        out = part(self.model, a.out)
        rank_qk, rank_vo = _ranks(a, qk, vo)
        given = [p.bias_or_none(self.model) is not None for p in (a.q, a.k, a.v)]
        keeps = (a.keeps_key_bias, vo is None or not a.folds_value_bias)
        biases = (given[0], given[1] and keeps[0], given[2] and keeps[1], out.bias is not None or vo is not None)
        module = LowRankCrossAttention(
            [p.weight(self.model).shape[1] for p in (a.q, a.k, a.v)],
            a.out_features,
            a.heads,
            rank_qk,
            rank_vo,
            scale=a.scale,
            biases=biases,
            extra=host.bias_k is not None,
            zero=host.add_zero_attn,
            attention_dropout=host.dropout,
            **factory_of(out),
        )
        if self.material.fill:
            products, values = self.products(a, qk), self.values(a, vo)
            for layer, weight, bias in (
                (module.q, products.q, products.q_bias),
                (module.k, products.k, products.k_bias),
                (module.v, values.v, values.v_bias),
                (module.proj, values.out, values.out_bias),
            ):
                fill(layer.weight, weight)
                fill(layer.bias, bias)
            fill(module.extra_k, products.extra)
            fill(module.extra_v, values.extra)
        return Replacement(whole=module, without_value_bias=True)

    def _parts(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        rank_qk, rank_vo = _ranks(a, qk, vo)
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

    def _padded(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        thin: dict[str, tuple[int, Tensor | None, Tensor | None]] = {}  # rank, weight and bias of q, k, v
        products = self.products(a, qk) if self.material.fill and qk is not None else None
        values = self.values(a, vo) if self.material.fill and vo is not None else None
        if qk is not None:
            thin["q"] = (qk.entry.keep, products and products.q, products and products.q_bias)
            thin["k"] = (qk.entry.keep, products and products.k, None)
        if vo is not None:
            thin["v"] = (vo.entry.keep, values and values.v, values and values.v_bias)
        parts: dict[str, nn.Module] = {}
        for path in dict.fromkeys(p.path for p in (a.q, a.k, a.v)):
            sides = {side: p for side, p in zip("qkv", (a.q, a.k, a.v), strict=True) if p.path == path}
            if thin.keys() & sides.keys():
                parts[path] = self._rows(a, path, sides, thin)
        if vo is not None:
            out = part(self.model, a.out)
            narrow = NarrowHeads(a.heads, vo.entry.keep, a.value_width, a.out_features, **factory_of(out))
            parts[a.out] = in_place_of(out, narrow)
            if values is not None:
                fill(narrow.linear.weight, values.out)
                fill(narrow.linear.bias, values.out_bias)
        return Replacement(parts=parts, without_value_bias=vo is not None and a.folds_value_bias)

    def _rows(
        self,
        a: Attention,
        path: str,
        sides: Mapping[str, Projection],
        thin: Mapping[str, tuple[int, Tensor | None, Tensor | None]],
    ) -> nn.Module:
        """A layer that holds the projections of some ``sides``: those that are ``thin`` padded, others as they are."""
        host = dense_in(part(self.model, path))
        biased = any(p.bias_or_none(self.model) is not None for p in sides.values() if p.bias is None)
        pieces = layout(sides, host.weight.shape[0])
        sections = [
            (a.heads, thin[side][0], p.count // a.heads)
            if side in thin
            else (p.heads, p.stop - p.start, p.stop - p.start)
            for side, p in pieces
        ]
        folds = a.folds_value_bias or a.v.bias is not None
        alone = len(sides) == 1 and ("k" in sides or ("v" in sides and folds)) and len(pieces) == 1
        module = PaddedRows(
            host.weight.shape[1],
            sections,
            interleaved=any(p.heads > 1 for p in sides.values()),
            bias=(biased or host.bias is not None) and not alone,
            **factory_of(host),
        )
        if self.material.fill:
            weights, biases = [], []
            for side, p in pieces:
                _, weight, bias = thin.get(side, (0, p.weight(self.model).double(), p.bias_or_none(self.model)))
                assert weight is not None
                weights.append(weight.flatten(0, -2).double())
                biases.append(weights[-1].new_zeros(len(weights[-1])) if bias is None else bias.flatten().double())
            fill(module.linear.weight, torch.cat(weights))
            fill(module.linear.bias, torch.cat(biases))
        return in_place_of(host, module)


def layout(sides: Mapping[str, Projection], rows: int) -> list[tuple[str, Projection]]:
    """The projections in one layer of so many rows, in their order, with the rows between them (called ``""``)."""
    ordered = sorted(sides.items(), key=lambda item: item[1].start)
    path, found, at = ordered[0][1].path, [], 0
    for side, p in ordered:
        if found and p == found[-1][1]:  # queries that are given from elsewhere have no rows of their own
            continue
        if p.heads == 1 and p.start > at:
            found.append(("", Projection(path, at, p.start)))
        found.append((side, p))
        at = p.stop
    if ordered[-1][1].heads == 1 and at < rows:
        found.append(("", Projection(path, at, rows)))
    return found


def _ranks(a: Attention, qk: Planned | None, vo: Planned | None) -> tuple[int, int]:
    """Channels of a head's queries and of its values: those of the plan, or as they stand."""
    return a.width if qk is None else qk.entry.keep, a.value_width if vo is None else vo.entry.keep


def _heads_linear(a: Attention, rank: int, width: int, bias: bool, factory: dict) -> nn.Module:
    if rank == width:
        return nn.Linear(a.in_features, a.heads * rank, bias=bias, **factory)
    return PaddedRows(a.in_features, [(a.heads, rank, width)], bias=bias, **factory)


def _inner(module: nn.Module) -> nn.Linear:
    inner = module if isinstance(module, nn.Linear) else module.linear
    assert isinstance(inner, nn.Linear)
    return inner


def _identity_products(model: nn.Module, a: Attention) -> Products:
    """Queries and keys as they are."""
    bias = a.q.bias_or_none(model)
    q, k = (p.weight(model).detach().view(a.heads, a.width, -1) for p in (a.q, a.k))
    return Products(q, None if bias is None else bias.detach().view(a.heads, a.width), k, *kept_keys(model, a))


def _identity_values(model: nn.Module, a: Attention) -> Values:
    """The values and output projection as they are, biases where they stand."""
    out = part(model, a.out)
    weight = out.weight.detach().flatten(1)
    out_bias = weight.new_zeros(a.out_features) if out.bias is None else out.bias.detach()
    bias = a.v.bias_or_none(model)
    v = a.v.weight(model).detach().view(a.heads, a.value_width, -1)
    bias = None if bias is None else bias.detach().view(a.heads, -1)
    return Values(v, bias, weight, out_bias, extra_value(model, a))

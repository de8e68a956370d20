"""Attention written in other ways: each is found by its layers, proven by a trial, and shrinks exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.forms.gates import fold_, gate_
from comcat.forms.relax import relax_
from comcat.hosts import find_sites
from comcat.methods.baselines.layerwise import layerwise
from comcat.methods.gating.takeover import reader_of, stand_ins
from comcat.plan import Plan, SitePlan
from comcat.sites import ProductSite
from comcat.statistics import calibrate

from . import zoo
from .exactness import changes_nothing_at_full_rank, costs_what_it_says
from .test_apply import full_plan
from .zoo import HandModel, relative_error

DIM, HEADS, WIDTH = 16, 2, 8


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (batch, tokens, heads · width), heads one after another."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """One layer, and another one behind; a test chooses what they are called."""

    def __init__(self, qkv: str, out: str, heads: str) -> None:
        super().__init__()
        self.names = (qkv, out)
        setattr(self, qkv, nn.Linear(DIM, 3 * DIM))
        setattr(self, out, nn.Linear(DIM, DIM))
        setattr(self, heads, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = (getattr(self, n) for n in self.names)
        return out(attended(*qkv(x).chunk(3, -1)))


class Interleaved(nn.Module):
    """Each head has its queries, keys and values together."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3 * WIDTH)).chunk(3, -1)
        return self.proj(attended(q.flatten(-2), k.flatten(-2), v.flatten(-2)))


class AfterOthers(nn.Module):
    """The rows of a feed-forward come first in the same layer, and it adds the input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.in_proj = nn.Linear(DIM, 24 + 3 * DIM)
        self.attn_out_proj, self.mlp_out_proj = nn.Linear(DIM, DIM), nn.Linear(24, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden, q, k, v = self.in_proj(x).split([24, DIM, DIM, DIM], -1)
        return x + self.attn_out_proj(attended(q, k, v)) + self.mlp_out_proj(hidden.relu())


class Reduced(nn.Module):
    """Keys and values of a coarser grid, whose size is handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.kv, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.sr, self.norm = nn.Conv2d(DIM, DIM, 2, 2), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        coarse = self.sr(x.mT.unflatten(-1, (height, width))).flatten(2).mT
        k, v = self.kv(self.norm(coarse)).chunk(2, -1)
        return self.proj(attended(self.q(x), k, v))


class OnAGrid(nn.Module):
    """Gives :class:`Reduced` the size of its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reduced()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 4, 4)


class Crossed(nn.Module):
    """Queries of one input, keys and values of another one of other width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = nn.Linear(DIM, DIM), nn.Linear(6, DIM), nn.Linear(6, DIM)
        self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.0))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        k, v = self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
        return self.to_out(attended(self.to_q(hidden_states), k, v))


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Crossed()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x[:, ::2, :6])


class OfConvolutions(nn.Module):
    """Projections are 1×1 convolutions, heads interleaved or one after another."""

    def __init__(self, interleaved: bool = True) -> None:
        super().__init__()
        self.num_heads, self.interleaved = HEADS, interleaved
        self.qkv, self.proj = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(2)
        if self.interleaved:
            q, k, v = qkv.unflatten(1, (HEADS, 3 * WIDTH)).mT.chunk(3, -1)
        else:
            q, k, v = qkv.unflatten(1, (3, HEADS, WIDTH)).mT.unbind(1)
        o = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return self.proj(o.unflatten(-1, x.shape[-2:]))


class OnMaps(nn.Module):
    def __init__(self, interleaved: bool = True) -> None:
        super().__init__()
        self.inner = OfConvolutions(interleaved)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT.unflatten(-1, (4, 4))).flatten(2).mT


class OfQueriesAndKeys(nn.Module):
    """One layer makes queries and keys, and positions have a share in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qk, self.v, self.proj = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        v = self.v(x)
        near = torch.eye(x.shape[1], dtype=x.dtype) @ v
        return self.proj(0.7 * attended(q, k, v) + 0.3 * near)


class OfWidths(nn.Module):
    """The width of a head and of all heads are attributes, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, WIDTH, DIM
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        o = F.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5).transpose(1, 2)
        return (self.dense(o.reshape(*o.shape[:2], self.all_head_size)),)


def fused(*names: str) -> Callable[[], nn.Module]:
    return lambda: Fused(*names)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "qkv, projection": (fused("qkv", "projection", "num_heads"), "padded"),
    "to_qkv, to_out": (fused("to_qkv", "to_out", "heads"), "padded"),
    "c_attn, c_proj": (fused("c_attn", "c_proj", "n_head"), "padded"),
    "heads not said": (fused("query_key_value", "dense", "something"), "padded"),
    "interleaved": (Interleaved, "padded"),
    "after others": (AfterOthers, "padded"),
    "reduced": (OnAGrid, "padded"),
    "crossed": (WithContext, "padded"),
    "of widths": (OfWidths, "parts"),
    "of convolutions": (OnMaps, "padded"),
    "convolutions apart": (lambda: OnMaps(interleaved=False), "padded"),
    "qk, v": (OfQueriesAndKeys, "padded"),
}


def model_of(name: str) -> nn.Module:
    return zoo.Case(name=name, build=lambda: HandModel(STRUCTURES[name][0](), STRUCTURES[name][0]())).model()


@pytest.mark.parametrize("name", STRUCTURES)
def test_both_products_shrink_and_change_nothing_at_full_rank(name: str) -> None:
    model, images = model_of(name), torch.randn(2, 3, 32, 32)
    sites = find_sites(model).only("qk", "vo")
    assert [s.kind for s in sites.values()] == ["qk", "vo"] * 2
    assert {s.attention.mount for s in sites.values()} == {STRUCTURES[name][1]}
    assert {s.heads for s in sites.values()} == {HEADS}
    changes_nothing_at_full_rank(model, images, sites, (("qk", "vo"), ("qk",), ("vo",)))


@pytest.mark.parametrize("name", STRUCTURES)
def test_costs_are_those_of_what_is_built(name: str) -> None:
    costs_what_it_says(model_of(name))


@pytest.mark.parametrize("name", STRUCTURES)
def test_calibration_reaches_all_of_it(name: str) -> None:
    model, images = model_of(name), torch.randn(4, 3, 32, 32)
    sites = find_sites(model).only("qk", "vo")
    for statistic in ("activation", "loss"):
        found = calibrate(model, [images], statistic=statistic, sites=sites)  # type: ignore[arg-type]
        assert not found.unreached
        assert all(torch.isfinite(g).all() for s in sites.values() for g in found.grams(model, s))


def test_a_search_masks_rows_wherever_they_lie() -> None:
    for name in ("interleaved", "after others", "of convolutions"):
        model, images = model_of(name), torch.randn(2, 3, 32, 32)
        sites = find_sites(model).only("qk", "vo", "linear")
        with torch.no_grad():
            before = model(images)
            relaxation = relax_(model, sites, {n: (1, s.full) for n, s in sites.items()}, Weights())
            relaxation.decide({n: s.full for n, s in sites.items()})
            assert relative_error(model(images), before) < 1e-5
            relaxation.decide(dict.fromkeys(sites, 1))
            assert relative_error(model(images), before) > 1e-2
            assert relative_error(relaxation.fold()(images), before) < 1e-5


ROWS_ANYWHERE = ("after others", "reduced", "convolutions apart")


@pytest.mark.parametrize("name", ROWS_ANYWHERE)
@pytest.mark.parametrize("kind", ["fwsvd", "svd-llm", "feature-pca"])
def test_matrices_apart_leave_the_other_rows_of_a_layer_as_they_are(name: str, kind: Any) -> None:
    model, images = model_of(name), torch.randn(4, 3, 32, 32)
    sites = find_sites(model).only("qk", "vo", "linear")
    with torch.no_grad():
        before = model(images)
    seen = layerwise(kind, model, sites, [images])
    entries = {
        n: SitePlan(keep=min(DIM, s.in_features), full=s.full, form="matrix")
        if isinstance(s, ProductSite)
        else SitePlan(keep=s.full, full=s.full)
        for n, s in sites.items()
    }
    with torch.no_grad():
        apply_(model, Plan(sites=entries), seen, sites=sites)
        assert relative_error(model(images), before) < 1e-4


@pytest.mark.parametrize("name", [*ROWS_ANYWHERE, "of convolutions", "interleaved"])
def test_gates_fold_into_any_layer_and_its_reader_makes_up_for_them(name: str) -> None:
    model, images = model_of(name).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    sites = find_sites(model).only("qk", "vo")
    gated, rests = copy.deepcopy(model), {n: torch.ones(s.heads * s.full).double() for n, s in sites.items()}
    gates = gate_(gated, sites, rests)  # type: ignore[arg-type]
    with torch.no_grad():
        for gate in gates.values():
            gate.opening[:, ::2] = 0.3
        shut = gated(images)
        fold_(model, sites, gates)
        assert relative_error(model(images), shut) < 1e-9
    marked = {n: gate.opening == 0.3 for n, gate in gates.items()}
    found = stand_ins(gated, sites.only("vo"), gates, marked, [images])
    assert set(found) == set(sites.only("vo"))
    for site_name, stand_in in found.items():
        reader = reader_of(gated, sites[site_name])
        assert reader is not None
        opening = gates[site_name].opening.detach().flatten()
        stand_in.take_over_(reader, opening, torch.where(opening == 0.3, 0.0, opening), None)
        assert reader.weight.isfinite().all() and stand_in.weights.isfinite().all()


def test_convolutions_over_single_points_are_linear_layers() -> None:
    layers = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 5, 1, 2)
    model, images = nn.Sequential(*layers), torch.randn(2, 6, 8, 8)
    sites = find_sites(model)
    assert list(sites) == ["0"] and sites["0"].full == 6
    with torch.no_grad():
        before = model(images)
        handle = apply_(model, full_plan(sites))
        assert relative_error(model(images), before) < 1e-5 and model[0].weight.shape == (8, 6, 1, 1)
        handle.revert()
        statistic = calibrate(model, [images], statistic="activation", sites=sites)
        apply_(model, Plan(sites={"0": SitePlan(keep=2, full=6)}), statistic, sites=sites)
        assert 0.01 < relative_error(model(images), before) < 1


class Sealed(Fused):
    def forward(self, x: Tensor, tables: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x) * tables.scale


class SealedAround(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Sealed("qkv", "proj", "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.finfo(torch.float32)) if x.numel() < 0 else x


def test_what_cannot_be_called_is_said_without_an_exceptions_text_and_its_layers_can_shrink() -> None:
    sites = find_sites(HandModel(SealedAround()))
    reason = next(r.reason for r in sites.refused if r.name == "blocks.0.attend.inner")
    assert reason == "attention of no known shape: comcat does not know how to call Sealed(x, tables)"
    assert {"blocks.0.attend.inner.qkv", "blocks.0.attend.inner.proj"} <= set(sites)


class LinearSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(x.softmax(1) * x).softmax(-1))


class ConvAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.projection = nn.Conv1d(DIM, DIM, 3, padding=1, groups=2), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.near(x.mT).mT.relu())


def test_what_calls_itself_attention_is_listed_where_it_is_not_understood() -> None:
    sites = find_sites(HandModel(LinearSelfAttention()))
    reasons = {r.name: r.reason for r in sites.refused}
    assert reasons["blocks.0.attend"] == "attention of no known shape: LinearSelfAttention"
    assert "blocks.0.attend.mix" in sites


def test_what_calls_itself_attention_and_makes_no_queries_has_no_product() -> None:
    reasons = {r.name: r.reason for r in find_sites(HandModel(ConvAttention())).refused}
    wanted = "it calls itself attention and has no layers for queries, keys and values, so there is no product"
    assert reasons["blocks.0.attend"] == wanted

"""Modules that look like attention or a layer that can shrink, and are not: refused, never computed wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.errors import ModelError, UnknownSite
from comcat.hosts import find_sites

from ..models import ranked
from . import zoo
from .test_apply import full_plan, low_plan
from .zoo import HandAttention, HandModel, relative_error


class Fused(nn.Module):
    """The attention that the tests below spoil, each in one place."""

    def __init__(self, dim: int = 16, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class ReturnsMaps(Fused):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return self.attend(x), None


class OppositeMask(Fused):
    """``attn_mask`` is true where a key is hidden, as torch.nn.MultiheadAttention has it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.attend(x, None if attn_mask is None else ~attn_mask if attn_mask.dtype == torch.bool else attn_mask)


class WeightDropout(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.drop_weights = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.drop_weights((q @ k.mT * self.head_dim**-0.5).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class OwnBias(Fused):
    """A position bias inside a forward of ``x`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return self.attend(x, self.bias[:, :n, :n])


class ResidualInside(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)


@pytest.mark.parametrize("attention", [ReturnsMaps, OppositeMask, WeightDropout, OwnBias, ResidualInside])
def test_a_forward_that_cannot_be_replaced_stays_around_padded_projections(
    attention: Callable[[], nn.Module],
) -> None:
    model = zoo.Case(name="spoilt", build=lambda: HandModel(attention())).model()
    sites = ranked(find_sites(model))
    assert {"blocks.0.attend:qk", "blocks.0.attend:vo"} <= set(sites)
    assert sites["blocks.0.attend:qk"].attention.mount == "padded"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        handle = apply_(model, full_plan(sites))
        assert relative_error(model(images), before) < 1e-5
        handle.revert()
        assert model(images).equal(before)


class PlainMask(Fused):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.attend(x, attn_mask)


class WindowMask(Fused):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, None if mask is None else mask[:, None])


@pytest.mark.parametrize("attention", [Fused, PlainMask, WindowMask])
def test_what_means_the_same_is_replaced_whole(attention: Callable[[], nn.Module]) -> None:
    model = zoo.Case(name="plain", build=lambda: HandModel(attention())).model()
    sites = ranked(find_sites(model))
    assert sites["blocks.0.attend:qk"].attention.mount == "whole"
    x, original = torch.randn(2, 5, 16), model.blocks[0].attend
    apply_(model, full_plan(sites))
    stand_in = model.blocks[0].attend
    assert stand_in is not original
    keywords = {PlainMask: {"attn_mask": torch.randn(5, 5)}, WindowMask: {"mask": torch.randn(2, 5, 5)}}.get(
        attention, {}
    )
    for settings in ({}, keywords):
        assert relative_error(stand_in(x, **settings), original(x, **settings)) < 1e-5


class Separate(nn.Module):
    """Projections apart, an output of transformers' kind; a test chooses ``head_dim`` and the scale."""

    def __init__(self, read_width: bool = True, fixed_scale: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaling = 2, 8, 8**-0.5
        self.read_width, self.fixed_scale = read_width, fixed_scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim if self.read_width else 8)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scaling if self.fixed_scale else None)
        return self.o_proj(o.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(("read_width", "fixed_scale"), [(True, True), (False, True), (True, False)])
def test_heads_become_narrow_where_a_forward_reads_their_width_and_are_padded_elsewhere(
    read_width: bool, fixed_scale: bool
) -> None:
    model = zoo.Case(name="separate", build=lambda: HandModel(Separate(read_width, fixed_scale))).model()
    sites = ranked(find_sites(model))
    assert sites["blocks.0.attend:qk"].attention.mount == ("parts" if read_width and fixed_scale else "padded")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        handle = apply_(model, full_plan(sites))
        assert relative_error(model(images), before) < 1e-5
        handle.revert()
        apply_(model, low_plan(sites))
        assert model(images).isfinite().all() and not model(images).equal(before)


def test_grouped_queries_are_refused() -> None:
    from timm.layers.attention import AttentionRope

    model = nn.Sequential(AttentionRope(16, num_heads=4, num_kv_heads=2, qkv_fused=False), nn.Linear(16, 16))
    sites = ranked(find_sites(model))
    assert not sites.only("qk", "vo") and "grouped" in sites.refused[0].reason


def test_a_value_bias_apart_is_not_folded_under_attention_dropout() -> None:
    case = zoo.Case(name="eva", build=zoo.timm_model("eva02_tiny_patch14_224", **zoo.VIT, attn_drop_rate=0.1))
    sites = ranked(find_sites(case.model()))
    assert set(sites.by_name) == {s.name for s in sites.only("linear").values()}
    assert any("attention dropout" in r.reason for r in sites.refused)


def test_an_eva_with_attention_dropout_and_fused_biases_keeps_them() -> None:
    case = zoo.Case(
        name="dropout", build=zoo.timm_model("vit_tiny_patch16_224", **zoo.VIT, qk_norm=True, attn_drop_rate=0.5)
    )
    model, images = case.model(), case.images()
    sites = ranked(find_sites(model))
    outputs = []
    for compress in (False, True):
        if compress:
            apply_(model, full_plan(sites.only("vo")))
        torch.manual_seed(2)
        outputs.append(model.train()(images))
    assert relative_error(outputs[1], outputs[0]) < 1e-4


@pytest.mark.parametrize("module", [nn.Linear(4, 4), Fused()])
def test_a_bare_layer_has_no_place_for_a_replacement(module: nn.Module) -> None:
    with pytest.raises(ModelError, match=f"got a bare {type(module).__name__}"):
        find_sites(module)


def test_a_model_of_convolutions_has_no_sites() -> None:
    with pytest.raises(ModelError, match="no attention and no linear layer"):
        find_sites(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def test_shared_modules_and_tied_weights_are_refused() -> None:
    attention = HandAttention(16, 2, 6)
    model = HandModel(attention, attention)
    model.blocks[1].mlp[0].weight = model.blocks[0].mlp[0].weight
    sites = ranked(find_sites(model))
    assert set(sites) == {"blocks.0.mlp.2", "blocks.1.mlp.2", "head"}
    assert {r.name for r in sites.refused} == {
        "blocks.0.attend", "blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.0.mlp:units", "blocks.1.mlp:units"
    }  # fmt: skip
    assert all("shared" in r.reason for r in sites.refused)


def test_layers_too_small_to_gain_are_refused() -> None:
    sites = ranked(find_sites(nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8))))
    assert list(sites) == ["1"] and sites.refused[0].name == "0" and "always cost more" in sites.refused[0].reason


def test_an_unknown_name_suggests_the_nearest() -> None:
    sites = ranked(find_sites(HandModel(HandAttention(16, 2, 6))))
    with pytest.raises(UnknownSite, match=r"did you mean 'blocks\.0\.attend:qk'"):
        sites["block.0.attend:qk"]


def test_twins_are_told_apart_by_what_they_compute() -> None:
    """Blocks of one class and shape are probed once, but not where one of them has a forward of its own."""
    first, second = Fused(), Fused()
    second.forward = ResidualInside.forward.__get__(second)  # type: ignore[method-assign]
    sites = ranked(find_sites(HandModel(first, second)))
    assert "blocks.0.attend:qk" in sites and "blocks.1.attend:qk" in sites
    assert [sites[f"blocks.{i}.attend:qk"].attention.mount for i in range(2)] == ["whole", "padded"]


def test_a_forward_bound_to_other_weights_is_refused() -> None:
    """A copy of such a module computes with the original's weights, so a trial on the copy proves nothing."""
    first, second = Fused(), Fused()
    second.forward = lambda x: second.attend(x)  # type: ignore[method-assign]
    sites = ranked(find_sites(HandModel(first, second).double()))
    assert "blocks.0.attend:vo" in sites and "blocks.1.attend:vo" not in sites
    assert "own weights" in next(r.reason for r in sites.refused if r.name == "blocks.1.attend")

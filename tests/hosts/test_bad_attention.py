"""Attention that cannot shrink, or not as a whole: refused with the true reason, or exact all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.sites import Sites
from comcat.statistics import calibrate

from . import zoo
from .test_apply import full_plan
from .test_structures import DIM, HEADS, WIDTH, Fused, attended
from .zoo import HandModel, relative_error


class Grouped(nn.Module):
    """Several heads share their keys and values."""

    def __init__(self, shared: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.shared, self.fused = 4, shared, fused
        if fused:
            self.qkv = nn.Linear(DIM, DIM + 2 * shared * 4)
        else:
            self.q_proj = nn.Linear(DIM, DIM)
            self.k_proj, self.v_proj = nn.Linear(DIM, shared * 4), nn.Linear(DIM, shared * 4)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        rows = [DIM, self.shared * 4, self.shared * 4]
        parts = self.qkv(x).split(rows, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in parts)
        k, v = (t.repeat_interleave(4 // self.shared, 1) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UnequalHeads(Fused):
    """The first head has twelve channels, the second four."""

    def __init__(self) -> None:
        super().__init__("qkv", "proj", "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.split([12, 4], -1) for t in self.qkv(x).chunk(3, -1))
        heads = [F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v, strict=True)]
        return self.proj(torch.cat(heads, -1))


class FewerKeys(nn.Module):
    """Heads share keys, and have values of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, WIDTH), nn.Linear(DIM, DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attended(self.q(x), self.k(x).repeat(1, 1, HEADS), self.v(x)))


class AcrossChannels(Fused):
    """The softmax runs over channels, as in DaViT."""

    def __init__(self) -> None:
        super().__init__("qkv", "proj", "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        o = (q.mT @ k).softmax(-1) @ v.mT
        return self.proj(o.mT.transpose(1, 2).flatten(2))


class Checked(Fused):
    """A forward that wants layers of one class."""

    def __init__(self) -> None:
        super().__init__("to_qkv", "to_out", "heads")

    def forward(self, x: Tensor) -> Tensor:
        if type(self.to_out) is not nn.Linear:
            raise TypeError("expected a Linear")
        return super().forward(x)


class Twice(nn.Module):
    """One attention that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Fused("qkv", "projection", "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.inner(x))


def model_of(build: Callable[[], nn.Module]) -> nn.Module:
    return zoo.Case(name="bad", build=lambda: HandModel(build(), build())).model()


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped": (lambda: Grouped(2, False), "attention of no known shape: queries, keys and values differ in width "
        "(grouped or multi-query attention)"),
    "multi-query": (lambda: Grouped(1, False), "attention of no known shape: queries, keys and values differ in width "
        "(grouped or multi-query attention)"),
    "grouped in one layer": (lambda: Grouped(2, True), "attention of no known shape: queries, keys and values differ "
        "in width (grouped or multi-query attention)"),
    "heads of other widths": (UnequalHeads, "attention of no known shape: its output depends on more of W_Q and W_K "
        "than their product; its output depends on more of W_V and W_O than their product"),
    "fewer keys": (FewerKeys, "attention of no known shape: queries, keys and values differ in width: 16, 8 and "
        "16 channels"),
    "across channels": (AcrossChannels, "attention of no known shape: it is no softmax over keys (attention across "
        "channels, linear attention, or queries added); its output depends on more of W_V and W_O than their product"),
    "checks classes": (Checked, "its forward checks the classes of its layers, so none can be exchanged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_product_is_refused_with_the_true_reason_and_the_rest_shrinks(name: str) -> None:
    build, reason = REASONS[name]
    model, images = model_of(build), torch.randn(2, 3, 32, 32)
    sites = find_sites(model)
    assert {r.name: r.reason for r in sites.refused}["blocks.0.attend"] == reason
    assert not sites.only("qk", "vo") and len(sites.only("units")) == 2
    assert any(".attend." in path for path in sites) == (name != "checks classes")
    with torch.no_grad():
        before = model(images)
        apply_(model, full_plan(sites.only("linear")))
        assert relative_error(model(images), before) < 1e-5


def is_exact(model: nn.Module, sites: Sites) -> bool:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        handle = apply_(model, full_plan(sites))
        same = relative_error(model(images), before) < 1e-5
        handle.revert()
        return same and model(images).equal(before)


def test_attention_that_is_called_twice_counts_all_that_flows_through_it() -> None:
    model, images = model_of(Twice), torch.randn(2, 3, 32, 32)
    sites = find_sites(model).only("qk", "vo")
    assert len(sites) == 4 and is_exact(model, sites)
    once = find_sites(once_model := model_of(lambda: Fused("qkv", "projection", "num_heads"))).only("qk", "vo")
    for statistic in ("activation", "loss"):
        twice_seen = calibrate(model, [images], statistic=statistic, sites=sites)  # type: ignore[arg-type]
        once_seen = calibrate(once_model, [images], statistic=statistic, sites=once)  # type: ignore[arg-type]
        for name in once:
            other = name.replace("attend", "attend.inner")
            assert twice_seen.rows[other] == 2 * once_seen.rows[name]
            assert twice_seen.pairs[other] == 2 * once_seen.pairs[name]


def test_attention_below_a_compiled_module_shrinks_and_is_compiled_anew() -> None:
    model = model_of(lambda: Fused("qkv", "proj", "num_heads"))
    model.blocks[0] = torch.compile(model.blocks[0], backend="aot_eager")
    sites = find_sites(model)
    assert is_exact(model, sites.only("qk", "vo"))

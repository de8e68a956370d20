"""What stands between the factors of a product is found by trials; what is read in part shrinks as far as it can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.hosts.symmetry import random_copy
from comcat.sites import Sites

from .test_apply import full_plan
from .test_structures import DIM, attended
from .zoo import HandModel, relative_error


class InPart(nn.Module):
    """Attention of one head over half of the channels; the output layer reads the others too (as SHViT's)."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM // 2, 4 + 4 + DIM // 2), nn.Sequential(*between, nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        q, k, v = self.qkv(x1).split([4, 4, DIM // 2], -1)
        return self.proj(torch.cat([F.scaled_dot_product_attention(q, k, v), x2], -1))


class Gated(nn.Module):
    """Gates lie behind the values in one layer (as iFormer's)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v_gate = nn.Linear(DIM, 8), nn.Linear(DIM, 8), nn.Linear(DIM, 2 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        v, gate = self.v_gate(x).sigmoid().chunk(2, -1)
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), v) * gate)


class HeadByHead(nn.Module):
    """A layer for each head, and a convolution of the queries where ``near`` (as CascadedGroupAttention's)."""

    def __init__(self, near: bool) -> None:
        super().__init__()
        self.qkvs = nn.ModuleList([nn.Linear(DIM // 2, 4 + 4 + DIM // 2) for _ in range(2)])
        self.dws = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1, groups=4) if near else nn.Identity() for _ in range(2)])
        self.proj = nn.Sequential(nn.ReLU(), nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        heads, y = [], torch.zeros(())
        for part, qkv, near in zip(x.chunk(2, -1), self.qkvs, self.dws, strict=True):
            q, k, v = qkv(part + y).split([4, 4, DIM // 2], -1)
            y = F.scaled_dot_product_attention(near(q.mT).mT, k, v)
            heads.append(y)
        return self.proj(torch.cat(heads, -1))


class FromQueries(nn.Module):
    """Relative positions meet the queries in a table; no layer of its own reads the values (as BottleneckAttn)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Conv2d(64, 3 * 64, 1)
        self.table = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (2, 32)).mT for t in self.qkv(x).chunk(3, 1))
        logits = (q @ k.mT * 32**-0.5 + q @ self.table.mT).softmax(-1)
        return (logits @ v).mT.flatten(1, 2).view_as(x)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1_1x1, self.self_attn = nn.Conv2d(DIM, 64, 1), FromQueries()
        self.post_attn, self.conv3_1x1 = nn.ReLU(), nn.Conv2d(64, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.self_attn(self.conv1_1x1(x.mT.unflatten(-1, (4, 4))))
        return self.conv3_1x1(self.post_attn(y)).flatten(2).mT


class BottleneckOfMaps(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv3_1x1(self.post_attn(self.self_attn(self.conv1_1x1(x))))


class OfMaps(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT.unflatten(-1, (4, 4))).flatten(2).mT


class Coarser(nn.Module):
    """Queries at every second position of a map alone, and keys everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.kv, self.proj = nn.Conv2d(DIM, DIM, 1, 2), nn.Conv2d(DIM, 2 * DIM, 1), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.q(x), self.kv(x).flatten(2).mT
        y = attended(q.flatten(2).mT, *kv.chunk(2, -1)).mT.unflatten(-1, q.shape[2:])
        return F.interpolate(self.proj(y), x.shape[2:])


class Additive(nn.Module):
    """Queries weigh themselves, and multiply the keys (as EfficientAdditiveAttention)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_query, self.to_key, self.proj = (nn.Linear(DIM, DIM) for _ in range(3))
        self.w_g = nn.Parameter(torch.randn(DIM, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.normalize(self.to_query(x), dim=-1), F.normalize(self.to_key(x), dim=-1)
        return self.proj((F.normalize(q @ self.w_g, dim=1) * q).sum(1, keepdim=True) * k) + q


class Summed(nn.Module):
    """Content and positions have projections of their own (as in Conditional DETR's decoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_content_proj, self.q_pos_proj, self.k_content_proj, self.k_pos_proj = (
            nn.Linear(DIM, DIM) for _ in range(4)
        )
        self.v_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        at = x.flip(1) if places is None else places
        q = self.q_content_proj(x) + self.q_pos_proj(at)
        return self.o_proj(attended(q, self.k_content_proj(x) + self.k_pos_proj(at), self.v_proj(x)))


REST = "; its vo and linear sites can still shrink"
EACH = "every head has a layer of its own, which comcat does not stand in for"
COARSE = "a projection passes over positions, which comcat does not stand in for"
SUMMED = "queries and keys are sums of what several layers make, which comcat does not stand in for"
CURVED = "something that is not linear (an activation, a norm, a softmax) sits between W_V and W_O"
RELU = "an activation (ReLU) sits between W_V and W_O"
NONE = "attention of no known shape: "
CASES: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "in part": (lambda: InPart(nn.ReLU()), {"qk"}, {RELU}),
    "in part, and a product": (InPart, {"qk"}, {
        "W_O reads other channels beside those of the values, which comcat does not stand in for"}),
    "gated": (Gated, {"qk"}, {CURVED}),
    "head by head": (lambda: HeadByHead(False), set(), {f"{NONE}{EACH}; {RELU}"}),
    "convolved": (lambda: HeadByHead(True), set(), {f"{NONE}dws.0 (Conv1d) sits between W_Q and W_K; {RELU}"}),
    "from queries": (lambda: OfMaps(BottleneckOfMaps()), set(), {
        f"{NONE}relative positions are computed from q; post_attn (ReLU) sits between W_V and W_O"}),
    "coarser": (lambda: OfMaps(Coarser()), {"vo"}, {f"{COARSE}{REST}"}),
    "additive": (Additive, set(), {
        f"{NONE}it is no softmax over keys (attention across channels, linear attention, or queries added); {CURVED}"}),
    "summed": (Summed, {"vo"}, {f"{SUMMED}{REST}"}),
}  # fmt: skip


def found(build: Callable[[], nn.Module]) -> tuple[HandModel, Sites]:
    model = HandModel(build(), build())
    model.eval()
    return model, find_sites(model)


@pytest.mark.parametrize("name", CASES)
def test_products_that_exist_shrink_exactly_and_what_stands_between_the_others_is_said(name: str) -> None:
    build, kinds, reasons = CASES[name]
    model, sites = found(build)
    assert {s.kind for s in sites.only("qk", "vo").values()} == kinds
    assert {r.reason for r in sites.refused} == reasons
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        handle = apply_(model, full_plan(sites.only("qk", "vo", "linear")))
        assert relative_error(model(images), before) < 1e-5
        handle.revert()
        assert model(images).equal(before)


def test_layers_of_a_refused_vo_product_still_shrink_as_linear_layers() -> None:
    _, sites = found(lambda: InPart(nn.ReLU()))
    assert "blocks.0.attend.proj.1" in sites and "blocks.0.attend.qkv" not in sites
    _, sites = found(Gated)
    assert {"blocks.0.attend.v_gate", "blocks.0.attend.proj"} <= set(sites)


def test_a_random_copy_of_convolutions_keeps_the_scale_of_what_flows() -> None:
    """Else a softmax gives all to one key, and what is added to its logits goes unseen."""
    net = nn.Sequential(*[nn.Conv2d(256, 256, 1, bias=False) for _ in range(3)])
    x = torch.randn(2, 256, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert 0.5 < random_copy(net, torch.Generator().manual_seed(0))(x).std() < 2

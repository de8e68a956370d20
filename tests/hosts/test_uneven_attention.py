"""Attention with values of another width, with batch norms behind its layers, and with one product alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.errors import PlanError
from comcat.factors import Weights
from comcat.forms.gates import fold_, gate_
from comcat.forms.relax import relax_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan
from comcat.statistics import calibrate

from . import zoo
from .exactness import changes_nothing_at_full_rank, costs_what_it_says
from .test_structures import DIM, HEADS, attended
from .zoo import HandModel, relative_error


class WiderValues(nn.Module):
    """Values are twice as wide as queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.proj = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attended(self.q(x), self.k(x), self.v(x)))


class NarrowQueries(nn.Module):
    """Queries and keys are narrower than values in one layer, side by side or head by head (EfficientFormer)."""

    def __init__(self, by_head: bool) -> None:
        super().__init__()
        self.num_heads, self.by_head = HEADS, by_head
        self.qkv, self.proj = nn.Linear(DIM, 2 * 8 + DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(x)
        if self.by_head:
            q, k, v = (t.flatten(-2) for t in rows.unflatten(-1, (HEADS, -1)).split([4, 4, 8], -1))
        else:
            q, k, v = rows.split([8, 8, DIM], -1)
        return self.proj(attended(q, k, v))


class LinearNorm(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(channels, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x).flatten(0, 1)).view(*x.shape[:-1], -1)


class Normed(nn.Module):
    """A batch norm behind each layer, and an activation before the output (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = LinearNorm(DIM, 3 * DIM), nn.Sequential(nn.Hardswish(), LinearNorm(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(-2) for t in self.qkv(x).unflatten(-1, (HEADS, -1)).chunk(3, -1))
        return self.proj(attended(q, k, v))


def conv_norm(channels: int, out: int, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=bias), nn.BatchNorm2d(out))


class NormedMaps(nn.Module):
    """1×1 convolutions, each before its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = (conv_norm(DIM, DIM, bias=bias) for bias in (True, False, True))
        self.proj = conv_norm(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).mT for layer in (self.q, self.k, self.v))
        return self.proj(attended(q, k, v).mT.unflatten(-1, x.shape[-2:]))


class OnAMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = NormedMaps()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT.unflatten(-1, (4, 4))).flatten(2).mT


class GivenQueries(nn.Module):
    """Queries are handed over; one layer makes keys and values (GC-ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        k, v = self.qkv(x).chunk(2, -1)
        return self.proj(attended(q_global, k, v))


class GivesQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = GivenQueries()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(-1))


class Pooling(nn.Module):
    """Queries are parameters of its own (AIMv2's head)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.queries = HEADS, nn.Parameter(torch.randn(16, DIM))
        self.k_proj, self.v_proj, self.output_proj = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.output_proj(attended(self.queries.expand(len(x), -1, -1), self.k_proj(x), self.v_proj(x)))


class MadeWeights(nn.Module):
    """One layer makes the weights of 16 keys for every query (VOLO's outlook)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.attn, self.v, self.proj = nn.Linear(DIM, 16 * HEADS), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attn(x).unflatten(-1, (HEADS, 16)).transpose(1, 2).softmax(-1)
        v = F.pad(self.v(x), (0, 0, 0, 16))[:, :16].unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Deformable(nn.Module):
    """Queries look at few points of two maps (Deformable DETR, RT-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import RTDetrConfig
        from transformers.models.rt_detr.modeling_rt_detr import RTDetrMultiscaleDeformableAttention as Attention

        self.inner = Attention(RTDetrConfig(d_model=DIM, num_feature_levels=2), num_heads=HEADS, n_points=2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [(2, 2), (3, 4)]
        where = {"spatial_shapes": torch.tensor(maps), "spatial_shapes_list": maps}
        at = torch.linspace(0.1, 0.9, 64, dtype=x.dtype).view(1, 16, 2, 2).expand(len(x), -1, -1, -1)
        start = torch.tensor([0, 4])
        return self.inner(x, encoder_hidden_states=x, reference_points=at, level_start_index=start, **where)[0]


class Upsampled(nn.Module):
    """A transposed convolution reads what the heads put out (LowFormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.pwise, self.upsampling = nn.Conv2d(DIM, 3 * 8, 1), nn.ConvTranspose2d(8, DIM, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.pwise(x.mT.unflatten(-1, (4, 4))).flatten(2).mT.chunk(3, -1)
        return self.upsampling(attended(q, k, v).mT.unflatten(-1, (4, 4))).flatten(2).mT


class InTurn(nn.Module):
    """The output reads the first channel of every head, then the second of every head (NesT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        o = attended(*self.qkv(x).chunk(3, -1)).unflatten(-1, (HEADS, -1))
        return self.proj(o.mT.flatten(-2))


BOTH = ("qk", "vo")
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str | None]] = {
    "wider values": (WiderValues, BOTH, None),
    "narrow queries": (lambda: NarrowQueries(False), BOTH, None),
    "narrow queries head by head": (lambda: NarrowQueries(True), BOTH, None),
    "normed": (Normed, ("qk",), "an activation (Hardswish) sits between W_V and W_O"),
    "normed maps": (OnAMap, BOTH, None),
    "given queries": (GivesQueries, ("vo",), "its queries are given to it, so no W_Q is its own; its vo and linear "
        "sites can still shrink"),
    "queries of its own": (Pooling, ("vo",), "its queries are given to it, so no W_Q is its own; its vo and linear "
        "sites can still shrink"),
    "made weights": (MadeWeights, ("vo",), "one layer makes its attention weights, so there are no queries and keys; "
        "its vo and linear sites can still shrink"),
    "deformable": (Deformable, ("vo",), "one layer makes its attention weights, so there are no queries and keys; "
        "its vo and linear sites can still shrink"),
    "upsampled": (Upsampled, ("qk",), "W_O is a transposed convolution"),
    "in turn": (InTurn, ("qk",), "W_O reads the channels of all heads in turn, which comcat does not stand in for"),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    model = zoo.Case(name=name, build=lambda: HandModel(CASES[name][0](), CASES[name][0]())).model()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_products_that_exist_shrink_and_the_others_are_refused_with_the_reason(name: str) -> None:
    model, images = model_of(name), torch.randn(2, 3, 32, 32)
    _, kinds, reason = CASES[name]
    found = find_sites(model)
    sites = found.only("qk", "vo")
    assert [s.kind for s in sites.values()] == [*kinds] * 2
    assert {r.reason for r in found.refused if r.name.endswith((":qk", ":vo"))} == ({reason} if reason else set())
    changes_nothing_at_full_rank(model, images, sites, (kinds, *((kind,) for kind in kinds)))


@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_what_is_built(name: str) -> None:
    costs_what_it_says(model_of(name))


@pytest.mark.parametrize("name", CASES)
def test_calibration_searches_and_gates_reach_them(name: str) -> None:
    model, images = model_of(name).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    sites = find_sites(model).only("qk", "vo")
    for statistic in ("activation", "loss"):
        found = calibrate(model, [images], statistic=statistic, sites=sites)  # type: ignore[arg-type]
        assert not found.unreached
        assert all(torch.isfinite(g).all() for s in sites.values() for g in found.grams(model, s))
    with torch.no_grad():
        before = model(images)
        relaxation = relax_(model, sites, {n: (1, s.full) for n, s in sites.items()}, Weights())
        relaxation.decide({n: s.full for n, s in sites.items()})
        assert relative_error(model(images), before) < 1e-8
        assert relative_error(relaxation.fold()(images), before) < 1e-8
    model = model_of(name).double()
    gated = copy.deepcopy(model)
    gates = gate_(gated, sites, {})
    with torch.no_grad():
        for gate in gates.values():
            gate.opening[:, ::2] = 0.3
        shut = gated(images)
        fold_(model, sites, gates)
        assert relative_error(model(images), shut) < 1e-8


class NormAndMore(LinearNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SaysMore(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = NormAndMore(DIM, 3 * DIM)


def test_a_layer_that_does_more_than_its_batch_norm_is_not_folded() -> None:
    sites = find_sites(HandModel(SaysMore(), SaysMore()))
    reason = next(r.reason for r in sites.refused if r.name == "blocks.0.attend")
    assert reason == "attention of no known shape: what stands behind its projections is more than a batch norm"
    assert not sites.only("qk", "vo")


def test_a_low_rank_model_is_copied_and_its_matrices_apart_are_refused() -> None:
    model, images = model_of("normed maps"), torch.randn(2, 3, 32, 32)
    sites = find_sites(model).only("qk", "vo")
    apart = {n: SitePlan(keep=2, full=s.full, form="matrix") for n, s in sites.items()}
    with pytest.raises(PlanError, match="expects plain layers, got one with a batch norm behind it"):
        apply_(model, Plan(sites=apart))
    apply_(model, Plan(sites={n: SitePlan(keep=2, full=s.full) for n, s in sites.items()}))
    with torch.no_grad():
        assert copy.deepcopy(model)(images).equal(model(images))

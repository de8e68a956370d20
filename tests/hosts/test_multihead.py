"""``torch.nn.MultiheadAttention`` in all its settings, and torch's encoders around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.forms.relax import relax_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan
from comcat.statistics import calibrate

from .zoo import relative_error

SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "unbiased": {"bias": False},
    "separate": {"kdim": 10, "vdim": 6},
    "extra key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "extra and zero": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 6},
    "tokens first": {"batch_first": False},
    "dropout": {"dropout": 0.5},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"need_weights": False},
    "weights": {},
    "weights of heads": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True, False, True, False]] * 2)},
    "padding alone": {"key_padding_mask": torch.tensor([[False] * 5 + [True]] * 2), "need_weights": False},
    "hidden": {"attn_mask": torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.7},
    "added to heads": {"attn_mask": torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))},
}  # fmt: skip


class Crossed(nn.Module):
    """A model that hands an attention different queries, keys and values."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"batch_first": True, **settings}
        self.inner = nn.MultiheadAttention(16, 4, **settings)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
        self.eval()

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = ((2, 5, 16), (2, 6, self.inner.kdim), (2, 6, self.inner.vdim))
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def forward(self, query: Tensor, **call: Any) -> tuple[Tensor, Tensor | None]:
        given = [query, *self.inputs()[1:]]
        if not self.inner.batch_first:
            given = [t.transpose(0, 1) for t in given]
        y, weights = self.inner(*given, **call)
        return self.head(y if self.inner.batch_first else y.transpose(0, 1)), weights


def outputs(model: Crossed, call: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in model(model.inputs()[0], **call) if t is not None]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_full_rank_is_the_same(settings: str, call: str) -> None:
    model = Crossed(**SETTINGS[settings])
    before = outputs(model, CALLS[call])
    sites = find_sites(model)
    handle = apply_(model, Plan(sites={n: SitePlan(keep=4, full=4) for n in ("inner:qk", "inner:vo")}))
    after = outputs(model, CALLS[call])
    assert {"inner:qk", "inner:vo"} <= set(sites) and len(before) == len(after)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(after, before, strict=True))
    handle.revert()
    assert all(a.equal(b) for a, b in zip(outputs(model, CALLS[call]), before, strict=True))


@pytest.mark.parametrize("settings", SETTINGS)
def test_costs_are_those_of_what_is_built(settings: str) -> None:
    model = Crossed(**SETTINGS[settings])
    sites = find_sites(model).only("qk", "vo")
    assert sum(site.parameters() for site in sites.values()) == sum(p.numel() for p in model.inner.parameters())
    apply_(model, Plan(sites={n: SitePlan(keep=k, full=4) for n, k in (("inner:qk", 3), ("inner:vo", 2))}))
    built = sum(p.numel() for p in model.inner.parameters())
    assert built == sites["inner:qk"].parameters(3) + sites["inner:vo"].parameters(2)


@pytest.mark.parametrize("settings", SETTINGS)
def test_watching_changes_nothing_and_sees_everything(settings: str) -> None:
    model = Crossed(**SETTINGS[settings])
    before = outputs(model, {})
    sites = find_sites(model).only("qk", "vo")
    statistics = calibrate(model, [model.inputs()[0]], statistic="activation", sites=sites)
    assert not statistics.unreached and all(
        torch.isfinite(g).all() for s in sites.values() for g in statistics.grams(model, s)
    )
    assert [n for n, _ in model.named_modules()] == ["", "inner", "inner.out_proj", "head"]
    assert all(a.equal(b) for a, b in zip(outputs(model, {}), before, strict=True))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_search_computes_the_same_at_full_rank_and_folds_back(settings: str) -> None:
    model = Crossed(**SETTINGS[settings])
    before = outputs(model, {})
    sites = find_sites(model).only("qk", "vo")
    relaxation = relax_(model, sites, dict.fromkeys(sites, (2, 4)), Weights())
    relaxation.decide(dict.fromkeys(sites, 4))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(outputs(model, {}), before, strict=True))
    relaxation.decide(dict.fromkeys(sites, 2))
    assert relative_error(outputs(model, {})[0], before[0]) > 1e-3
    relaxation.fold()
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(outputs(model, {}), before, strict=True))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
        self.eval()

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


@pytest.mark.parametrize("only", ["self_attn", "linear1", "layers.1", "units", "all"])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_torchs_encoder_computes_with_what_was_put_in(only: str, padding: Tensor | None) -> None:
    """Its fused call in evaluation would read weights past the modules, and its first layer decides for all of them."""
    model = Encoder()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    known = slice(None) if padding is None else ~padding
    sites = find_sites(model)
    assert len(sites.only("qk")) == 2 and len(sites.only("linear")) == 4 and len(sites.only("units")) == 2
    kinds = ("units",) if only == "units" else ("qk", "vo", "linear")
    chosen = [n for n, s in sites.only(*kinds).items() if only in n or only in ("units", "all")]
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x, padding)[known]
        entries = {
            n: SitePlan(keep=sites[n].full, full=sites[n].full, form="units" if only == "units" else "product")
            for n in chosen
        }
        handle = apply_(model, Plan(sites=entries))
        assert relative_error(model(x, padding)[known], before) < 1e-5
        handle.revert()
        assert model(x, padding)[known].equal(before)
        entries = {n: SitePlan(keep=1, full=sites[n].full, form=e.form) for n, e in entries.items()}
        apply_(model, Plan(sites=entries))
        fused = model(x, padding)[known]
        model.requires_grad_(True)
    with torch.enable_grad():  # where gradients are wanted nothing is fused
        stepwise = model(x, padding)[known]
    assert relative_error(fused, stepwise) < 1e-5
    assert relative_error(fused, untouched(x, padding)[known]) > 1e-2


def test_a_low_rank_model_is_copied_and_read_back() -> None:
    model = Crossed(add_bias_kv=True)
    sites = find_sites(model)
    empty = Crossed(add_bias_kv=True)
    plan = Plan(sites={n: SitePlan(keep=2, full=4) for n in ("inner:qk", "inner:vo")})
    assert plan.sites.keys() <= sites.keys()
    apply_(model, plan)
    apply_(empty, plan, weights=False)
    empty.load_state_dict(model.state_dict())
    for other in (empty, copy.deepcopy(model)):
        assert all(a.equal(b) for a, b in zip(outputs(other, {}), outputs(model, {}), strict=True))


def test_an_attention_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, weights = super().forward(*args, **kwargs)
            return 2 * y, weights

    model = Crossed()
    model.inner = Doubled(16, 4)
    refused = {r.name: r.reason for r in find_sites(model).refused}
    assert refused["inner"] == "Doubled gives torch.nn.MultiheadAttention a forward of its own"

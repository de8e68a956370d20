"""Ranks: budgets are met within a step, water-filling is optimal on small cases, bad budgets say what is possible."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.apply import apply_
from comcat.errors import BudgetError, SettingsError
from comcat.factors import Weights
from comcat.hosts import find_sites
from comcat.linalg import Factorization
from comcat.measure import count_parameters
from comcat.methods.allocate import allocate, roundest, shrinkable, spectra, tail_loss
from comcat.methods.compress import compress
from comcat.plan import MadeFor, Plan
from comcat.sites import HiddenSite, LinearSite, Site, Sites
from comcat.statistics import calibrate

from .models import pictures, tiny_vit


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.mark.parametrize("rule", ["uniform", "energy", "waterfill"])
@pytest.mark.parametrize("reduce", [0.1, 0.5, 0.65])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("forms", ["ranks", "ranks,units"])
def test_budget_is_met_within_one_step(model, rule, reduce, multiple, forms):
    sites = shrinkable(find_sites(model))
    plan = allocate(model, reduce=reduce, rule=rule, multiple=multiple, forms=forms)
    before = count_parameters(model)
    handle = apply_(model, plan)
    saved = 1 - count_parameters(model) / before
    handle.revert()
    assert saved == pytest.approx(plan.made_by["saved"], abs=1e-12)
    assert saved >= reduce - 1e-9
    largest_step = max(_step(s, multiple) for s in sites.values()) / before
    assert saved - reduce < largest_step
    assert all(p.keep % multiple == 0 or p.keep == p.full for p in plan.sites.values())


def _step(site: Site, multiple: int) -> int:
    """The costliest step of a site: one of ranks or units, or the jump from factors to the dense layer."""
    if isinstance(site, HiddenSite):
        return multiple * site.parameters_per_unit + site.out_features
    top = max(
        (r for r in range(multiple, site.full_rank + 1, multiple) if site.parameters(r) < site.parameters()),
        default=multiple,
    )
    return max(multiple * site.parameters_per_rank, site.parameters() - site.parameters(top))


def test_linear_layers_stay_dense_where_factors_would_cost_more(model):
    plan = allocate(model, reduce=0.05)
    sites = find_sites(model)
    for name, entry in plan.sites.items():
        assert sites[name].parameters(entry.keep) < sites[name].parameters() or sites[name].kind != "linear"


def _synthetic(spectra_: list[list[float]], costs: list[tuple[int, int]]) -> tuple[Sites, dict[str, Factorization]]:
    sites, found = {}, {}
    for i, (values, (m, n)) in enumerate(zip(spectra_, costs, strict=True)):
        k = len(values)
        eye = torch.eye(k, dtype=torch.float64)
        sites[f"l{i}"] = LinearSite(f"l{i}", "linear", f"l{i}", k, m, n)
        found[f"l{i}"] = Factorization(eye, eye, torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
    return Sites(sites), found


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.floats(0.01, 10), min_size=4, max_size=4), min_size=2, max_size=3),
    st.floats(0.35, 0.75),
)
def test_waterfill_is_close_to_the_exhaustive_optimum(values, reduce):
    sites, found = _synthetic(values, [(16, 12)] * len(values))
    total = sum(s.parameters() for s in sites.values())

    class Loss(Weights):
        def __init__(self):
            object.__setattr__(self, "name", "loss")

    given = {"sites": sites, "factorizations": found, "total": total, "made_for": MadeFor()}
    plan = allocate(torch.nn.Identity(), Loss(), reduce=reduce, multiple=1, **given)
    tails = {n: tail_loss(f) for n, f in found.items()}
    options = {
        n: [(s.parameters(r), float(tails[n][r])) for r in range(1, 5) if s.parameters(r) < s.parameters()]
        + [(s.parameters(), 0.0)]
        for n, s in sites.items()
    }
    target = (1 - reduce) * total
    best = min(
        sum(loss for _, loss in combo)
        for combo in itertools.product(*options.values())
        if sum(c for c, _ in combo) <= target + 1e-9
    )
    got = sum(float(tails[n][plan.sites[n].keep]) if n in plan.sites else 0.0 for n in sites)
    # Lagrangian choice reaches the convex hull; at most one site's largest jump to a neighbour is left
    jump = max(a[1] - b[1] for o in options.values() for a, b in itertools.pairwise(o))
    assert best - 1e-9 <= got <= best + jump + 1e-9
    assert got == pytest.approx(plan.made_by["predicted_loss"])


@pytest.mark.parametrize("rule", ["waterfill", "uniform"])
def test_step_by_step_chooses_as_compress_does(model, rule):
    found = calibrate(model, pictures(), statistic="loss")
    plan = allocate(model, found, reduce=0.4, rule=rule)
    small = compress(model, pictures(), reduce=0.4, ranks=rule)
    assert plan == small.comcat_record.plan and plan.made_by["multiple"] > 1


def test_the_default_multiple_is_the_roundest_that_costs_next_to_nothing():
    def plan_with(multiple):
        if multiple == 16:
            raise BudgetError("out of reach")
        return Plan(sites={}, made_by={"multiple": multiple, "error": {8: 1.2, 4: 1.05}.get(multiple, 1.0)})

    assert roundest(plan_with).made_by["multiple"] == 4


def test_waterfill_beats_uniform_in_predicted_loss(model):
    found = calibrate(model, pictures(), statistic="loss")
    losses = {
        rule: allocate(model, found, reduce=0.5, rule=rule).made_by["predicted_loss"]
        for rule in ("uniform", "waterfill", "energy")
    }
    assert losses["waterfill"] < losses["uniform"] and losses["waterfill"] < losses["energy"]


def test_energy_alone_keeps_the_asked_share_of_singular_values(model):
    found = spectra(model, find_sites(model))
    plan = allocate(model, rule="energy", energy=0.9, forms="ranks", multiple=1)
    for name, entry in plan.sites.items():
        values = found[name].singular_values
        values = values.sum(0) if values.ndim > 1 else values
        share = values.cumsum(0) / values.sum()
        assert share[entry.keep - 1] >= 0.9 - 1e-9
        assert entry.keep == 1 or share[entry.keep - 2] < 0.9


def test_budget_that_cannot_be_met_says_the_most_that_can(model):
    with pytest.raises(BudgetError, match=r"at most 0\.\d+"):
        allocate(model, reduce=0.99)


@pytest.mark.parametrize(
    "bad",
    [
        {"reduce": 0.0},
        {"reduce": 1.0},
        {"reduce": math.nan},
        {"reduce": 0.5, "rule": "watrfill"},
        {"reduce": 0.5, "multiple": 0},
        {},
        {"reduce": 0.5, "budget": "macs"},
    ],
)
def test_absurd_settings_are_refused(model, bad):
    with pytest.raises(SettingsError):
        allocate(model, **bad)


def test_tie_gives_one_rank_to_both_products(model):
    plan = allocate(model, reduce=0.4, tie=True, multiple=1)
    for layer in ("blocks.0.attn", "blocks.1.attn"):
        assert {plan.sites[f"{layer}:{k}"].keep for k in ("qk", "vo") if f"{layer}:{k}" in plan.sites} in (
            {plan.sites[f"{layer}:qk"].keep},
            set(),
        )


def test_per_head_ranks_are_padded_to_the_largest(model):
    plan = allocate(model, reduce=0.5, per_head=True, multiple=1, sites=find_sites(model))
    heads = [e.head_ranks for e in plan.sites.values() if e.head_ranks is not None]
    assert heads and all(max(h) == e.keep for h, e in ((e.head_ranks, e) for e in plan.sites.values()) if h)
    assert any(len(set(h)) > 1 for h in heads)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    x = torch.randn(2, 3, 32, 32)
    handle = apply_(model, plan)
    assert torch.isfinite(model(x)).all()
    handle.revert()

"""On every model: full rank is the no-op, low rank is what it costs on paper, and all of it can be taken back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.hosts import find_sites
from comcat.measure import count_parameters
from comcat.plan import Plan, SitePlan
from comcat.sites import Sites

from .conftest import Subject, subject_of
from .zoo import relative_error, run


def full_plan(sites: Sites) -> Plan:
    return Plan(sites={n: SitePlan(keep=s.full_rank, full=s.full_rank) for n, s in sites.items()})


def low_plan(sites: Sites) -> Plan:
    """Ranks below full everywhere; QK's and VO's differ, now the one larger, now the other."""
    ranks = {"qk": (2, 3), "vo": (4, 1), "linear": (3, 2)}
    paths = list(dict.fromkeys(s.path for s in sites.values()))
    chosen = {n: min(ranks[s.kind][paths.index(s.path) % 2], s.full_rank - 1) for n, s in sites.items()}
    return Plan(sites={n: SitePlan(keep=r, full=sites[n].full_rank) for n, r in chosen.items()})


def predicted(model: nn.Module, sites: Sites, plan: Plan) -> int:
    return count_parameters(model) - sum(
        sites[n].parameters() - sites[n].parameters(e.keep) for n, e in plan.sites.items()
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
def test_full_rank_changes_nothing_and_reverts(subject: Subject, dtype: torch.dtype, tolerance: float) -> None:
    model = subject.copy().to(dtype)
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    before = run(model, subject.images)
    plan = full_plan(subject.sites)
    expected = predicted(model, subject.sites, plan)
    with torch.no_grad():
        handle = apply_(model, plan)
        assert relative_error(run(model, subject.images), before) < tolerance
    assert count_parameters(model) == expected
    assert not any(type(m) is nn.Linear and m is modules[n] for n, m in model.named_modules() if n in subject.sites)
    assert handle.revert() is model
    after = model.state_dict()
    assert list(after) == list(state) and all(after[n].equal(state[n]) for n in state)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules.items()]
    assert run(model, subject.images).equal(before)


def test_low_rank_costs_what_the_sites_say_and_trains(subject: Subject) -> None:
    model, plan = subject.copy(), low_plan(subject.sites)
    old = {id(p) for p in model.parameters()}
    expected = predicted(model, subject.sites, plan)
    apply_(model, plan)
    output = run(model, subject.images)
    assert count_parameters(model) == expected < count_parameters(subject.original)
    assert output.isfinite().all() and relative_error(output.detach(), subject.output) > 1e-3
    output.square().mean().backward()
    for name, p in model.named_parameters():
        if id(p) not in old:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_the_factors_stand_for_themselves(subject: Subject) -> None:
    """A plan applied through factorisations that are already known is the same model, and a copy of it lives apart from
    the original.
    """
    plan = low_plan(subject.sites)
    first, second = subject.copy(), subject.copy()
    from comcat.methods.allocate import spectra

    apply_(first, plan)
    handle = apply_(second, plan, factorizations=spectra(second, subject.sites, Weights()))
    output = run(first, subject.images)
    assert run(second, subject.images).equal(output)
    copied, pickled = copy.deepcopy(second), pickle.loads(pickle.dumps(second))
    shared = {id(p) for p in second.parameters()}
    for twin in (copied, pickled):
        assert not shared & {id(p) for p in twin.parameters()}
        assert run(twin, subject.images).equal(output)
    handle.revert()
    assert run(copied, subject.images).equal(output)


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "timm-vit-qk-norm", "timm-eva02", "hand-plain"])
def test_what_is_compressed_is_not_compressed_again(name: str) -> None:
    subject = subject_of(name)
    model = subject.copy()
    apply_(model, low_plan(subject.sites))
    sites = find_sites(model)
    assert len(sites) == 0
    assert {r.reason for r in sites.refused} == {"already compressed"}


def test_one_product_alone(subject: Subject) -> None:
    """QK without VO and the other way round: what is not planned computes what it did."""
    for kind in ("qk", "vo"):
        sites = subject.sites.only(kind)
        if not sites:
            continue
        model = subject.copy().double()
        before = run(model, subject.images)
        with torch.no_grad():
            handle = apply_(model, full_plan(sites))
            assert relative_error(run(model, subject.images), before) < 1e-10
            handle.revert()
            apply_(model, low_plan(sites))
            assert relative_error(run(model, subject.images), before) > 1e-5


def test_reverting_keeps_the_mode_that_the_model_is_in_by_then() -> None:
    subject = subject_of("timm-vit")
    model = subject.copy().train()
    handle = apply_(model, full_plan(subject.sites))
    assert all(m.training for m in model.modules())
    model.eval()
    handle.revert()
    assert not any(m.training for m in model.modules())

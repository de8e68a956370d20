"""Every way to make a model small leaves all its tensors where the model is, and mixes none of them with the CPU's.

Pictures are on the CPU, as loaders give them. The values must be those that the CPU gives.
"""

import pytest
import torch

import comcat
from comcat.linalg.elimination import eliminate, refit_units
from comcat.methods.baselines import BASELINES

from .elsewhere import Elsewhere, second_device
from .models import pictures, tiny_vit

WAYS = {
    "default": {},
    "activation": {"statistic": "activation"},
    "weights": {"statistic": "weights"},
    "a rank for each head": {"forms": "ranks", "per_head": True},
    "blocks in turn": {"sequential": True},
    "MACs": {"budget": "macs"},
    "energy": {"ranks": "energy"},
    "one rank": {"ranks": "equal", "multiple": 1},
}


@pytest.fixture
def place(monkeypatch):
    """A second device, whose parameters are of a class that users' are not."""
    monkeypatch.setattr("comcat.hosts.ordinary._unusual", lambda name, value: ())
    with second_device() as name:
        yield name


def all_there(model):
    return all(isinstance(t, Elsewhere) for t in [*model.parameters(), *model.buffers()])


def test_the_second_device_refuses_what_a_card_refuses(place):
    there, here = torch.ones(3).to(place), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        here[torch.zeros(2, dtype=torch.long, device=place)]
    with pytest.raises(TypeError):
        there.numpy()
    assert torch.equal(there[torch.zeros(2, dtype=torch.long)].cpu(), torch.ones(2))
    assert (there * torch.tensor(2.0)).cpu().tolist() == [2.0] * 3 and torch.zeros(2, device=place).device.type == place


def model():
    return tiny_vit(embed_dim=24, mlp_ratio=2)


@pytest.mark.parametrize("way", WAYS)
def test_compress(way, place):
    settings = {"reduce": 0.3, "multiple": 1, **WAYS[way]}
    expected = comcat.compress(model(), pictures(), **settings)
    small = comcat.compress(model().to(place), pictures(), **settings)
    assert all_there(small)
    assert small.comcat_record.plan.to_dict()["sites"] == expected.comcat_record.plan.to_dict()["sites"]
    x = pictures(2)[0]
    with torch.no_grad():
        assert torch.allclose(small(x.to(place)).cpu(), expected(x), atol=1e-4)


def test_compress_to_a_drop(place):
    held_out = [(x, torch.zeros(len(x), dtype=torch.long)) for x in pictures(8, seed=1)]
    small = comcat.compress(model().to(place), pictures(4), held_out=held_out, max_drop=50.0, multiple=1)
    assert all_there(small) and small.comcat_record.plan.sites


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name, place):
    there, baseline = model().to(place), BASELINES[name]
    sites = comcat.find_sites(there)
    statistic = baseline.measured(there, sites, pictures(4)) if baseline.needs_pictures else baseline.statistic
    plan = baseline(there, sites, 0.3, None, statistic)
    handle = comcat.apply_(there, plan, statistic, sites=sites)
    assert all_there(there) and there(pictures(1)[0].to(place)).isfinite().all()
    handle.revert()
    assert all_there(there)


def test_elimination(place):
    h = torch.randn(40, 12, dtype=torch.float64)
    covariance, weight, metric = h.mT @ h / 40, torch.randn(5, 12), torch.eye(5)
    here = eliminate(covariance, weight, metric)
    there = eliminate(covariance.to(place), weight.to(place), metric.to(place))
    assert torch.equal(there.order.cpu(), here.order) and torch.allclose(there.prices.cpu(), here.prices)
    kept = there.kept(6)
    refitted = refit_units(covariance.to(place), weight.to(place), kept)
    assert torch.allclose(refitted.cpu(), refit_units(covariance, weight, kept.cpu()))


def test_a_budget_of_macs_in_half_precision():
    small = comcat.compress(model().bfloat16(), pictures(), reduce=0.2, budget="macs")
    assert small.comcat_record.plan.sites and next(small.parameters()).dtype == torch.bfloat16

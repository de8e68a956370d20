"""Feed-forwards of 1×1 convolutions, and with what acts on each unit alone between their layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.forms.gates import fold_, gate_
from comcat.forms.relax import relax_
from comcat.hosts import find_sites
from comcat.measure import count_macs
from comcat.methods.baselines.pruning import magnitudes, taylor_scores
from comcat.plan import Plan, SitePlan
from comcat.sites import HiddenSite, Sites
from comcat.statistics import calibrate

from .zoo import relative_error

DIM, HIDDEN = 8, 20


def depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class ConvMlp(nn.Module):
    """Of maps, with a batch norm and a convolution of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.mid = nn.Conv2d(DIM, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN), depthwise(HIDDEN)
        self.fc2, self.after = nn.Conv2d(HIDDEN, DIM, 1), nn.BatchNorm2d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.fc2(self.mid(self.norm(self.fc1(x)).relu()).relu()))


class MixMlp(nn.Module):
    """Of tokens, whose grid is told, as in SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mid, self.fc2 = nn.Linear(DIM, HIDDEN), depthwise(HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        maps = self.mid(self.fc1(x).mT.unflatten(-1, (height, width)))
        return self.fc2(maps.flatten(2).mT.relu())


class OnMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MixMlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x.flatten(2).mT, *x.shape[-2:]).mT.unflatten(-1, x.shape[-2:])


class Excited(ConvMlp):
    """Each unit is scaled by what all of them say."""

    def __init__(self) -> None:
        super().__init__()
        self.excite = nn.Conv2d(HIDDEN, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.fc1(x)).relu()
        return self.fc2(h * self.excite(h.mean((2, 3), keepdim=True)).sigmoid())


def model_of(mlp: Callable[[], nn.Module]) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), mlp(), mlp(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5)
    return model.eval()


def units_of(model: nn.Module) -> Sites:
    return find_sites(model).only("units")


def entries(sites: Sites, keep: int) -> Plan:
    return Plan(sites={n: SitePlan(form="units", keep=keep, full=s.full) for n, s in sites.items()})


@pytest.mark.parametrize("mlp", [ConvMlp, OnMaps])
def test_units_shrink_with_what_acts_on_each_of_them_and_cost_what_is_said(mlp: Callable[[], nn.Module]) -> None:
    model, images = model_of(mlp), torch.randn(2, 3, 16, 16)
    sites = units_of(model)
    assert len(sites) == 2 and all(isinstance(s, HiddenSite) and s.between for s in sites.values())

    def costs() -> tuple[int, int]:
        return sum(p.numel() for p in model.parameters()), count_macs(model, images)

    with torch.no_grad():
        before, whole = model(images), costs()
        handle = apply_(model, entries(sites, HIDDEN))
        assert relative_error(model(images), before) < 1e-5
        handle.revert()
        assert model(images).equal(before)
        for statistic in ("activation", "loss"):
            with torch.enable_grad():
                seen = calibrate(model, [images], statistic=statistic, sites=sites)  # type: ignore[arg-type]
            assert not seen.unreached
            handle = apply_(model, entries(sites, 12), seen)
            parameters, macs = costs()
            assert whole[0] - parameters == sum(s.parameters() - s.parameters(12) for s in sites.values())
            assert whole[1] - macs == sum(s.macs(None, 16) - s.macs(12, 16) for s in sites.values())
            assert 1e-4 < relative_error(model(images), before) < 1
            handle.revert()


@pytest.mark.parametrize("mlp", [ConvMlp, OnMaps])
def test_gates_searches_and_scores_know_them(mlp: Callable[[], nn.Module]) -> None:
    model, images = model_of(mlp), torch.randn(2, 3, 16, 16)
    sites = units_of(model)
    scores = taylor_scores(model, [images], sites)
    assert all(scores[n].shape == magnitudes(model, s).shape == (HIDDEN,) for n, s in sites.items())  # type: ignore[arg-type]
    with torch.no_grad():
        before = model(images)
        relaxation = relax_(model, sites, {n: (1, s.full) for n, s in sites.items()}, Weights())
        relaxation.decide({n: s.full for n, s in sites.items()})
        assert relative_error(model(images), before) < 1e-5  # in another order
        relaxation.decide(dict.fromkeys(sites, 4))
        assert relative_error(model(images), before) > 1e-3
        relaxation.fold()
        gates = gate_(model, sites, {n: torch.ones(s.full) for n, s in sites.items()})
        for gate in gates.values():
            gate.opening[:, ::2] = 0.3
        shut = model(images)
        gates.remove()
        fold_(model, sites, gates)
        assert relative_error(model(images), shut) < 1e-5


def test_units_that_see_each_other_stay() -> None:
    assert not units_of(model_of(Excited))

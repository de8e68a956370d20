"""Elimination of hidden units against brute force and against refitting from scratch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comcat.errors import NumericsError, SettingsError
from comcat.linalg.elimination import RIDGE, eliminate, refit_units


def layer(units: int, out: int, seed: int, samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A covariance (units, units), a weight (out, units) and a metric (out, out); singular with few samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples or 3 * units, units, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(units, units, generator=generator, dtype=torch.float64) * torch.rand(units, generator=generator)
    metric = torch.randn(out, out, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, units, generator=generator, dtype=torch.float64)
    return x.mT @ x / len(x), weight, metric @ metric.mT


def best(covariance: Tensor, weight: Tensor, metric: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """The refitted weight on some units, and half the squared error that is left, from scratch."""
    ridged = covariance + RIDGE * torch.diag(covariance.diagonal())
    index = torch.tensor(kept)
    refitted = weight @ ridged[:, index] @ torch.linalg.inv(ridged[index][:, index])
    whole = torch.zeros_like(weight)
    whole[:, index] = refitted
    error = weight - whole
    return refitted, float((error @ ridged @ error.mT * metric).sum()) / 2


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_greedy_elimination_is_brute_force(units, out, seed, block):
    """Each unit that goes raises the loss least, all others refitted from scratch; the price is that rise."""
    covariance, weight, metric = layer(units, out, seed)
    found = eliminate(covariance, weight, metric, block=block)
    left = list(range(units))
    for place in range(units - 1, 0, -1):
        before = best(covariance, weight, metric, left)[1]
        rises = {j: best(covariance, weight, metric, [k for k in left if k != j])[1] - before for j in left}
        gone = int(found.order[place])
        scale = max(abs(r) for r in rises.values()) + 1e-12
        assert rises[gone] <= min(rises.values()) + 1e-7 * scale
        assert float(found.prices[place]) == pytest.approx(rises[gone], rel=1e-5, abs=1e-8 * scale)
        left.remove(gone)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 10_000), st.data())
@settings(max_examples=40, deadline=None)
def test_refit_is_the_best_linear_prediction_at_every_width(units, out, seed, data):
    covariance, weight, metric = layer(units, out, seed)
    found = eliminate(covariance, weight, metric)
    keep = data.draw(st.integers(1, units))
    kept = found.kept(keep)
    expected, left = best(covariance, weight, metric, kept.tolist())
    torch.testing.assert_close(refit_units(covariance, weight, kept), expected, rtol=1e-6, atol=1e-8)
    assert float(found.prices[keep:].sum()) == pytest.approx(left, rel=1e-5, abs=1e-9 * float(found.prices.sum()))


def test_all_units_change_nothing():
    covariance, weight, metric = layer(40, 6, seed=3, samples=10)
    kept = eliminate(covariance, weight, metric).kept(40)
    torch.testing.assert_close(refit_units(covariance, weight, kept), weight, rtol=1e-12, atol=1e-12)


def test_the_numbering_of_units_does_not_matter():
    covariance, weight, metric = layer(30, 5, seed=4)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    one = eliminate(covariance, weight, metric)
    other = eliminate(covariance[shuffled][:, shuffled], weight[:, shuffled], metric)
    assert shuffled[other.order].tolist() == one.order.tolist()
    torch.testing.assert_close(other.prices, one.prices)


def test_the_scale_of_units_does_not_matter():
    """W D with D⁻¹ h is the same layer: the same units go, at the same prices."""
    covariance, weight, metric = layer(20, 5, seed=5)
    scale = 10 ** torch.linspace(-3, 3, 20, dtype=torch.float64)
    one = eliminate(covariance, weight, metric)
    other = eliminate(covariance * scale * scale[:, None], weight / scale, metric)
    assert other.order.tolist() == one.order.tolist()
    torch.testing.assert_close(other.prices, one.prices)


def test_dead_units_and_copies_go_first_and_cost_nothing():
    covariance, weight, metric = layer(12, 5, seed=6)
    covariance[3], covariance[:, 3] = 0, 0  # never varies: its mean is all there is to it
    covariance[7], covariance[:, 7] = covariance[2], covariance[:, 2]  # a copy of unit 2
    covariance[7, 7] = covariance[2, 2]
    found = eliminate(covariance, weight, metric)
    first = found.order[-2:].tolist()
    assert 3 in first and (2 in first or 7 in first)
    assert float(found.prices[-2:].max()) < 2 * RIDGE * float(found.prices.sum())
    assert float(found.prices[found.order.tolist().index(3)]) == 0.0


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_pictures_than_units(samples):
    """A singular covariance gives finite weights, and what it says can be predicted is."""
    covariance, weight, metric = layer(50, 6, seed=7, samples=samples)
    found = eliminate(covariance, weight, metric)
    assert torch.isfinite(found.prices).all() and sorted(found.order.tolist()) == list(range(50))
    refitted = refit_units(covariance, weight, found.kept(10))
    assert torch.isfinite(refitted).all()
    whole = torch.zeros_like(weight)
    whole[:, found.kept(10)] = refitted
    error = weight - whole
    assert float((error @ covariance @ error.mT * metric).sum()) < 0.02 * float(
        (weight @ covariance @ weight.mT * metric).sum()
    )


def test_blocks_lose_next_to_nothing_against_one_by_one():
    covariance, weight, metric = layer(200, 16, seed=8, samples=120)
    one, many = (eliminate(covariance, weight, metric, block=b) for b in (1, 16))
    for keep in (150, 100, 50):
        assert float(many.prices[keep:].sum()) <= 1.05 * float(one.prices[keep:].sum())


def test_bad_arguments_are_told():
    covariance, weight, metric = layer(6, 3, seed=9)
    with pytest.raises(SettingsError, match="covariance"):
        eliminate(covariance, weight[:, :5], metric)
    with pytest.raises(SettingsError, match="block=0"):
        eliminate(covariance, weight, metric, block=0)
    with pytest.raises(SettingsError, match="got 7 units, expected 1 to 6"):
        eliminate(covariance, weight, metric).kept(7)
    for argument in range(3):
        bad = [covariance.clone(), weight.clone(), metric.clone()]
        bad[argument][0, 0] = float("nan")
        with pytest.raises(NumericsError, match="NaN"):
            eliminate(*bad)

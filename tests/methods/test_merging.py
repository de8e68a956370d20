"""Schedules of tokens: measured without labels, within the share that was asked for."""

import numpy as np
import pytest
import torch

import comcat
from comcat.errors import ModelError, SettingsError
from comcat.methods.merging.meter import MEASURED, Meter, _law, shown_of, token_ladders
from comcat.methods.merging.offer import Offer
from comcat.statistics.losses import divergence
from comcat.statistics.trunk import find_trunk

from ..models import pictures, tiny_vit

X = pictures(8, 4)


def mean_share(plan, blocks):
    return (sum(e.keep / e.full for e in plan.sites.values()) + blocks - len(plan.sites)) / blocks


@pytest.mark.parametrize("how", ["similar", "drop"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_the_share_of_tokens_is_met(how, keep):
    model = tiny_vit(depth=4)
    before = model(X[0])
    plan = comcat.merge(model, X, keep=keep, how=how)
    assert mean_share(plan, 4) <= keep + 0.02  # within a token a block
    assert mean_share(plan, 4) >= keep - 0.05
    assert torch.equal(model(X[0]), before)
    handle = comcat.apply_(model, plan)
    assert not torch.equal(model(X[0]), before)
    handle.revert()


def test_the_schedule_that_moves_the_output_least_is_taken():
    model = tiny_vit(depth=4)
    plan = comcat.merge(model, X, keep=0.6)
    tried = plan.made_by["divergences"]
    assert set(tried) == {"linear", "even", "measured"}
    assert tried[plan.made_by["schedule"]] == min(tried.values())
    handle = comcat.apply_(model, plan)
    meter_of_both = [model(x) for x in X]
    handle.revert()
    measured = sum(divergence(model(x), after, frozenset({5})) for x, after in zip(X, meter_of_both, strict=True)) / 8
    assert measured == pytest.approx(min(tried.values()), rel=1e-4)


def test_without_pictures_tokens_fall_in_a_line():
    model = tiny_vit(depth=4)
    plan = comcat.merge(model, keep=0.7, example=X[0][:1])
    keeps = [plan.sites[f"blocks.{i}:tokens"].keep if f"blocks.{i}:tokens" in plan.sites else 16 for i in range(4)]
    assert keeps == sorted(keeps, reverse=True) and keeps[0] == 16 and keeps[3] < 8


def test_all_tokens_are_no_plan():
    assert not comcat.merge(tiny_vit(), X, keep=1.0).sites


def test_windows_of_the_grid():
    model = tiny_vit(depth=4)
    plan = comcat.merge(model, X, keep=0.75, how="grid")
    assert plan.sites and all(e.details["tokens"]["window"] in ([1, 2], [2, 1], [2, 2]) for e in plan.sites.values())
    comcat.apply_(model, plan)


def test_some_blocks_only():
    plan = comcat.merge(tiny_vit(depth=4), X, keep=0.6, blocks=["blocks.2", "blocks.3"])
    assert set(plan.sites) == {"blocks.2:tokens", "blocks.3:tokens"}
    assert plan.sites["blocks.2:tokens"].keep + plan.sites["blocks.3:tokens"].keep <= 2 * 0.6 * 16 + 1


def test_losses_rise_with_what_is_merged():
    model = tiny_vit(depth=2)
    shown = shown_of(model, X, 8, False)
    ladders = token_ladders(Offer(model, find_trunk(model, X[0][:1]).sites, "similar"), Meter(model, shown))
    for ladder in ladders:
        losses = [c.loss for c in ladder.choices]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0 < losses[-2]


def test_between_measured_shares_the_law_is_a_straight_line_of_logarithms():
    law = _law([(s, (1 - s) ** 2) for s in MEASURED])
    for share in (0.95, 0.8, 0.6, 0.4):
        assert law(share) == pytest.approx((1 - share) ** 2, rel=1e-6)
    assert np.isfinite(law(0.3))


@pytest.mark.parametrize(
    "output",
    [lambda g: g.randn(3, 5), lambda g: g.randn(2, 5, 3, 3), lambda g: g.randn(2, 1, 4, 4), lambda g: g.randn(2, 7, 6)],
)
def test_divergence_is_the_second_moment_of_the_sampled_loss(output):
    """½ δᵀFδ for small changes, with F the second moment of the gradient of the loss on drawn labels."""
    from comcat.statistics.losses import sampled_loss

    class G:
        randn = staticmethod(lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(3)))

    before = output(G)
    change = torch.randn_like(before) * 3e-3
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        x = before.clone().requires_grad_()
        sampled_loss(x, frozenset({5}), generator).backward()
        found.append(float((x.grad * change).sum()) ** 2)
    expected = np.mean(found) / 2
    assert divergence(before, before + change, frozenset({5})) == pytest.approx(expected, rel=0.15)
    assert divergence(before, before, frozenset({5})) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "bad", [{"keep": 0}, {"keep": 1.5}, {"keep": "half"}, {"keep": 0.01}, {"how": "alike"},
        {"how": "drop", "by": "norm"},
            {"pictures": 0}, {"blocks": ["block.1"]}],
)  # fmt: skip
def test_absurd_settings_are_told(bad):
    with pytest.raises(SettingsError, match=r"got|expected"):
        comcat.merge(tiny_vit(), X, **bad)


def test_an_output_that_nothing_moves_is_no_guide():
    model = tiny_vit()
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(ModelError, match="the same however few tokens its blocks run on, as with a head of zeros"):
        comcat.merge(model, X, keep=0.7)
    assert comcat.merge(model, example=X[0], keep=0.7).sites


def test_models_that_cannot():
    with pytest.raises(SettingsError, match="needs pictures"):
        comcat.merge(tiny_vit())
    with pytest.raises(ModelError, match="no class token"):
        comcat.merge(tiny_vit(class_token=False, global_pool="avg"), X, how="drop")
    with pytest.raises(ModelError, match="no trunk"):
        comcat.merge(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5)), X)

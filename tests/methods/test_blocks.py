"""Tokens beside ranks and units in one choice."""

import itertools

import numpy as np
import pytest
import torch

import comcat
from comcat.errors import BudgetError, SettingsError
from comcat.forms import Flow
from comcat.methods.choose import least_loss
from comcat.methods.compress import compress_
from comcat.methods.costs import Macs
from comcat.methods.ladders import AS_IT_IS, Choice, Ladder, entry_of
from comcat.methods.merging.blocks import TokenLadder, options_of_blocks
from comcat.methods.merging.merge import measured_tokens
from comcat.methods.settings import CompressSettings
from comcat.plan import Plan, SitePlan
from comcat.sites import LinearSite, TokenSite

from ..models import pictures, tiny_vit

X = pictures(16, 8)


def reduced(model, plan):
    handle = comcat.apply_(model, plan)
    macs = comcat.count_macs(model, X[0][:1])
    handle.revert()
    return 1 - macs / comcat.count_macs(model, X[0][:1])


@pytest.mark.parametrize("forms", ["ranks,units,tokens", "units,tokens", "tokens"])
def test_a_budget_of_macs_is_met_by_what_runs(forms):
    model = tiny_vit(depth=3)
    small = comcat.compress(model, X, reduce=0.3, budget="macs", forms=forms, pictures=16)
    plan = small.comcat_record.plan
    assert any(e.form == "similar" for e in plan.sites.values()) or forms != "tokens"
    saved = 1 - comcat.count_macs(small, X[0][:1]) / comcat.count_macs(model, X[0][:1])
    assert saved >= 0.3 - 0.01
    assert plan.made_by["saved"] == pytest.approx(saved, abs=0.02)
    assert torch.isfinite(small(X[0])).all()


def test_with_tokens_no_more_is_predicted_to_be_lost_than_without():
    model = tiny_vit(depth=3)
    common = {"reduce": 0.4, "budget": "macs", "pictures": 16, "multiple": 4, "tie": False}
    both = comcat.compress(model, X, forms="ranks,units,tokens", **common).comcat_record.plan.made_by
    alone = comcat.compress(model, X, forms="ranks,units", **common).comcat_record.plan.made_by
    assert both["predicted_loss"] <= alone["predicted_loss"] * 1.001


def test_a_block_s_options_are_all_combinations_at_their_best():
    """Against brute force: every number of tokens with every width of two layers."""
    rng = np.random.default_rng(0)
    sites = {f"b.0.{n}": LinearSite(f"b.0.{n}", "linear", f"b.0.{n}", 8, 16, 8) for n in ("x", "y")}
    cost = Macs({name: Flow(11, 0) for name in sites})
    decisions = []
    for name, site in sites.items():
        losses = np.sort(rng.random(4) ** 3)[::-1]
        choices = [
            Choice({name: entry_of(site, r)}, float(loss), 1.0) for r, loss in zip((1, 2, 3, 4), losses, strict=True)
        ]
        decisions.append(Ladder(name, {name: site}, (site,), (*choices, AS_IT_IS)))
    tokens = TokenSite("b.0:tokens", "b.0", 10, 1, 16)
    few = [
        Choice({tokens.name: SitePlan(form="grid", keep=k, full=10, details={})}, loss, 1.0)
        for k, loss in ((4, 0.4), (7, 0.05))
    ]
    ladder = TokenLadder(tokens, (*few, AS_IT_IS))
    table, options = options_of_blocks(decisions, [ladder], cost)[0]
    brute = []
    for choice in ladder.choices:
        keep = choice.entries[tokens.name].keep if choice.entries else 10
        for parts in itertools.product(*(d.choices for d in decisions)):
            at = cost.on_fewer_tokens((1 + keep) / 11)
            spent = sum(at(sites[d.name], p.entries.get(d.name)) for d, p in zip(decisions, parts, strict=True))
            brute.append((spent, choice.loss + sum(p.loss for p in parts)))
    for budget in np.linspace(table.costs[0] * 1.01, table.dense, 15):
        best = min(loss for spent, loss in brute if spent <= budget)
        place = least_loss([table], budget)[0]
        assert table.costs[place] <= budget + 1e-9
        assert table.losses[place] >= best - 1e-12
        assert (
            table.losses[place]
            <= max(best, min(loss for spent, loss in brute if spent <= budget * 0.8 or spent == min(brute)[0])) + 1e-9
        )
    assert options[-1] is not None and table.dense == table.costs[-1]


def test_tokens_ask_for_macs_a_loss_in_nats_and_the_one_choice():
    for bad in ({"budget": "parameters"}, {"ranks": "uniform"}, {"statistic": "activation"}, {"ranks": "search"}):
        with pytest.raises(SettingsError, match="tokens"):
            CompressSettings(forms="ranks,tokens", reduce=0.3, **{"budget": "macs", **bad})
    with pytest.raises(SettingsError, match=r"comcat\.merge"):
        comcat.search(tiny_vit(), X, reduce=0.3, forms="ranks,tokens")
    with pytest.raises(BudgetError, match="at most"):
        comcat.compress(tiny_vit(), X, reduce=0.95, budget="macs", forms="tokens")


def test_a_plan_with_tokens_is_applied_saved_and_loaded(tmp_path):
    model = tiny_vit(depth=3)
    small = comcat.compress(model, X, reduce=0.3, budget="macs", forms="ranks,units,tokens", pictures=16)
    tokens = comcat.merge(model, X, keep=0.7)
    plan = Plan(sites={**small.comcat_record.plan.sites, **tokens.sites})
    again = comcat.compress(model, X, plan=plan)
    comcat.save(again, tmp_path / "small")
    loaded = comcat.load(tmp_path / "small")
    torch.testing.assert_close(loaded(X[0]), again(X[0]), atol=1e-5, rtol=1e-5)
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in again.modules()]


def test_sequential_calibration_with_tokens():
    model = tiny_vit(depth=2)
    small = comcat.compress(
        model, X, reduce=0.3, budget="macs", forms="ranks,units,tokens", sequential=True, pictures=16
    )
    assert torch.isfinite(small(X[0])).all()


def test_what_was_measured_is_of_every_block():
    ladders, _ = measured_tokens(tiny_vit(depth=3), X)
    assert [t.site.path for t in ladders] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("forms", ["ranks,units", "ranks,units,tokens"])
def test_two_budgets_at_once(forms):
    model = tiny_vit(depth=3)
    whole, macs = comcat.count_parameters(model), comcat.count_macs(model, X[0][:1])
    most = int(0.6 * whole)
    small = comcat.compress(
        model, X, reduce=0.3, budget="macs", max_parameters=most, forms=forms, pictures=16, multiple=4
    )
    made_by = small.comcat_record.plan.made_by
    assert comcat.count_parameters(small) <= most and made_by["parameters"] == comcat.count_parameters(small)
    assert comcat.count_macs(small, X[0][:1]) <= 0.71 * macs
    assert 1 - comcat.count_macs(small, X[0][:1]) / macs == pytest.approx(made_by["saved"], abs=0.02)
    for wish in ({"max_parameters": 10}, {"max_parameters": most, "budget": "parameters"}):
        with pytest.raises((BudgetError, SettingsError), match="max_parameters"):
            comcat.compress(
                model, X, reduce=0.3, forms="ranks,units", pictures=16, multiple=4, **{"budget": "macs", **wish}
            )


def test_what_the_parameters_ask_for_is_not_put_down_to_coarse_steps():
    model = tiny_vit(depth=3)
    most = int(0.6 * comcat.count_parameters(model))
    asked = CompressSettings(reduce=0.1, budget="macs", max_parameters=most, multiple=1)
    notes = compress_(model, X, asked).notes
    assert any(f"since at most {most:,} parameters may stay" in note for note in notes)
    assert not any("coarse" in note for note in notes)


def test_losses_of_tokens_are_scaled_by_what_plans_of_each_alone_measure():
    from comcat.methods.merging.balance import balanced

    site = TokenSite("b.0:tokens", "b.0", 10, 1, 16)
    entry = SitePlan(form="grid", keep=4, full=10, details={})
    ladder = TokenLadder(site, (Choice({site.name: entry}, 0.4, 1.0), AS_IT_IS))

    class Scales:
        def loss(self, entries, **_):
            return 3.0 if site.name in entries else 2.0

    def plan_of(forms, tokens):
        entries = {site.name: entry} if forms == "tokens" else {"b.0.x": entry}
        return Plan(sites=entries, made_by={"error": 1.0 if forms == "tokens" else 0.5})

    scaled = balanced([ladder], Scales(), "ranks", plan_of)[0]
    assert scaled.choices[0].loss == pytest.approx(0.4 * 3.0 / 4.0) and scaled.choices[-1].loss == 0

    def out_of_reach(forms, tokens):
        raise BudgetError("too much")

    assert balanced([ladder], Scales(), "ranks", out_of_reach) == (ladder,)

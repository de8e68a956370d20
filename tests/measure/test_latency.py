"""A budget of time: with a clock that counts weights times tokens, so that nothing here depends on the machine."""

import json

import pytest
import torch

import comcat
from comcat.errors import BudgetError, SettingsError
from comcat.measure import Timing
from comcat.measure.latency import Latency, measure_latency
from comcat.measure.latency.cost import Curve, curves_of, rising
from comcat.methods.settings import CompressSettings
from comcat.statistics.trunk import find_trunk

from ..models import pictures, tiny_vit

X = pictures(16, 8)


def work(module, example):
    """Weights of linear layers times the rows that each gets."""
    done = []
    hooks = [
        m.register_forward_pre_hook(lambda m, i: done.append(m.weight.numel() * i[0].shape[:-1].numel()))
        for m in module.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    return sum(done) + 1


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    def timed(models, example, **_):
        return {
            name: Timing(
                median_s=(s := work(m, example) * 1e-8),
                low_s=s,
                high_s=s,
                repeats=1,
                batch_size=len(example),
                samples_s=(s,),
            )
            for name, m in models.items()
        }

    monkeypatch.setattr("comcat.measure.latency.table.benchmark", timed)
    monkeypatch.setattr("comcat.methods.budgets.pacing.benchmark", timed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def table(model, **more):
    return measure_latency(model, comcat.find_sites(model), X[0][:1], **more)


def test_parts_add_up_to_the_model():
    model = tiny_vit(depth=3)
    sites, latency = comcat.find_sites(model), table(model, batch=4)
    whole = sum(latency(sites[n], None) for n in sites if sites[n].kind in ("qk", "vo", "units")) + latency(
        sites["head"], None
    )
    assert whole == pytest.approx(latency.whole, rel=0.01)
    units = sites["blocks.0.mlp:units"]
    assert latency.parts["blocks.0.mlp:units"] == latency.parts["blocks.2.mlp:units"]  # timed once
    half = comcat.SitePlan(form="units", keep=96, full=192)
    assert latency(units, half) == pytest.approx(latency(units, None) / 2, rel=0.02)


def test_what_was_measured_is_kept_and_damage_is_measured_anew(tmp_path):
    model = tiny_vit()
    first = table(model, cache=tmp_path / "t")
    assert first.facts["measured_now"] == first.facts["parts"] > 10
    again = table(tiny_vit(), cache=tmp_path / "t")
    assert again.facts["measured_now"] == 0 and again.curves == first.curves
    assert table(model, cache=tmp_path / "t", batch=2).facts["measured_now"] > 0
    file = next((tmp_path / "t").glob("*.json"))
    held = json.loads(file.read_text())
    held["about"]["torch"] = "0.1"
    file.write_text(json.dumps(held))
    assert (
        table(model, cache=tmp_path / "t").facts["measured_now"]
        + table(model, cache=tmp_path / "t", batch=2).facts["measured_now"]
        > 0
    )
    for file in (tmp_path / "t").glob("*.json"):
        file.write_text("{ not json")
    assert table(model, cache=tmp_path / "t").facts["measured_now"] == first.facts["parts"]


def test_fewer_tokens_take_less():
    model = tiny_vit()
    trunk = find_trunk(model, X[0][:1])
    latency = table(model, tokens=trunk.sites)
    site = comcat.find_sites(model)["blocks.0.mlp:units"]
    assert latency.on_fewer_tokens(0.5)(site, None) < 0.6 * latency(site, None)
    assert latency.on_fewer_tokens(0.2)(site, None) < latency.on_fewer_tokens(0.35)(site, None)


@pytest.mark.parametrize("forms", ["ranks,units", "ranks,units,tokens"])
def test_the_time_that_was_asked_for_is_met(forms):
    model = tiny_vit(depth=3)
    small = comcat.compress(model, X, reduce=0.4, budget="latency", forms=forms, pictures=16)
    facts = small.comcat_record.plan.made_by["latency"]
    assert facts["measured_ms"] <= facts["target_ms"] * 1.02
    assert facts["predicted_ms"] == pytest.approx(facts["measured_ms"], rel=0.15)
    assert work(small, X[0][:1]) <= 0.62 * work(model, X[0][:1])
    assert facts["batch"] == 1 and facts["dtype"] == "float32"


def test_milliseconds_are_a_target_too_and_the_fastest_is_told():
    model = tiny_vit(depth=3)
    whole = table(model).whole
    small = comcat.compress(model, X, target_ms=0.7 * whole, budget="latency", pictures=16)
    assert small.comcat_record.plan.made_by["latency"]["measured_ms"] <= 0.7 * whole * 1.02
    with pytest.raises(BudgetError, match="at most"):
        comcat.compress(model, X, target_ms=whole / 1000, budget="latency", pictures=16)
    assert not comcat.compress(model, X, target_ms=2 * whole, budget="latency", pictures=16).comcat_record.plan.sites


def test_absurd_wishes():
    for bad in (
        {"target_ms": 3.0},
        {"target_ms": -1.0, "budget": "latency"},
        {"target_ms": 3.0, "reduce": 0.5, "budget": "latency"},
        {"batch": 0},
    ):
        with pytest.raises(SettingsError, match="got"):
            CompressSettings(**bad)
    with pytest.raises(SettingsError, match="latency"):
        comcat.search(tiny_vit(), X, reduce=0.3, budget="latency")


def test_between_measured_widths_a_straight_line_and_no_wider_part_is_cheaper():
    assert rising([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0] and rising([]) == []
    rows = {f"a@1#{w}": {"ms": ms, "spread": 0.1} for w, ms in (("8", 1.0), ("16", 3.0), ("24", 2.0), ("dense", 5.0))}
    curve = curves_of(rows)["a", 1.0]
    assert (curve.at(4), curve.at(12), curve.at(20), curve.at(99), curve.dense) == (1.0, 1.75, 2.5, 2.5, 5.0)
    assert Curve((8, 16), (1.0, 3.0), 9.0).at(24) == 5.0  # beyond what was measured it is never for nothing
    latency = Latency({("a", 1.0): curve, ("a", 0.5): Curve((), (), 2.0)}, {}, 10.0)
    assert latency._along("a", lambda c: c.dense, 0.75) == 3.5

"""Every budget from one calibration."""

import pytest

import comcat
from comcat.errors import SettingsError
from comcat.methods.exploring import explore

from ..models import pictures, tiny_vit

X = pictures(16, 8)


@pytest.fixture(scope="module")
def found():
    settings = {"pictures": 16, "budget": "macs", "forms": "ranks,units,tokens", "multiple": 4}
    return explore(tiny_vit(depth=3), X, X, points=6, measured=3, **settings)


def test_the_way_falls_in_cost_and_rises_in_loss(found):
    assert len(found.points) == 6
    macs, losses = [p.macs for p in found.points], [p.loss for p in found.points]
    assert macs == sorted(macs, reverse=True) and losses == sorted(losses)
    assert found.dense.macs > macs[0] and found.dense.parameters >= found.points[0].parameters
    assert sum(p.measured is not None for p in found.points) == 3
    assert all("agreement" in p.measured for p in (found.points[0], found.points[-1]))


def test_a_point_is_what_the_command_for_it_makes(found):
    model, point = tiny_vit(depth=3), found.points[3]
    small = comcat.compress(
        model, X, reduce=point.reduce, budget="macs", forms="ranks,units,tokens", multiple=4, pictures=16
    )
    for name, entry in small.comcat_record.plan.sites.items():
        block = ".".join(name.split(".")[:2]).split(":")[0]
        part = name.rpartition(":")[2] if ":" in name else name.rpartition(".")[2]
        assert tuple(point.parts[block][part]) == (entry.keep, entry.full)
    assert comcat.count_macs(small, X[0][:1]) == pytest.approx(point.macs, rel=0.02)
    assert comcat.count_parameters(small) == pytest.approx(point.parameters, rel=1e-6)


def test_other_rules_stand_beside(found):
    assert set(found.rivals) == {"uniform", "SVD of the weights"}
    assert all(p.loss is None and p.measured for ways in found.rivals.values() for p in ways)


def test_absurd_wishes():
    for bad in ({"points": 1}, {"ranks": "search"}, {"measured": -1}):
        with pytest.raises(SettingsError, match="got"):
            explore(tiny_vit(), X, **bad)

"""Plans as data: versions, which model they were made for, and old words."""

import copy
import json
import pickle

import pytest

import comcat
from comcat.apply import apply_
from comcat.errors import PlanError
from comcat.hosts import find_sites
from comcat.plan import MadeFor, Plan, SitePlan, fingerprint

from .models import pictures, tiny_vit


def units_and_ranks() -> Plan:
    return comcat.allocate(tiny_vit(), reduce=0.3, multiple=1)


def test_a_plan_survives_json_pickle_and_copies():
    plan = units_and_ranks()
    assert {e.form for e in plan.sites.values()} == {"product", "units"}
    for again in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert again == plan and again.made_for == plan.made_for
    assert json.loads(plan.to_json())["comcat_plan"] == 2


def test_a_plan_says_which_model_it_was_made_for():
    plan = units_and_ranks()
    made_for = json.loads(plan.to_json())["made_for"]
    assert made_for["fingerprint"] == fingerprint(made_for["sites"])
    assert made_for["sites"]["blocks.0.attn:qk"] == "qk 3 × 16 of 48 → 48"
    assert made_for["sites"]["blocks.1.mlp:units"] == "units 192 of 48 → 48"
    assert plan.made_by["budget"] == "parameters" and plan.made_by["statistic"] == "weights"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 6}, r"there blocks\.0\.attn:qk is qk 3 × 16 of 48 → 48, here qk 6 × 8 of 48 → 48"),
        ({"depth": 3}, r"VisionTransformer, which has no blocks\.2\.attn:qk"),
        ({"depth": 1}, r"VisionTransformer, which has blocks\.1\.attn:qk"),
        ({"mlp_ratio": 3}, r"there blocks\.0\.mlp:units is units 192 of 48 → 48, here units 144 of 48 → 48"),
    ],
)
def test_a_plan_for_another_model_is_an_error_that_names_the_first_difference(changed, message):
    other = tiny_vit(**changed)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match=message):
        apply_(other, units_and_ranks())
    assert all(a.equal(b) for a, b in zip(before.values(), other.state_dict().values(), strict=True))
    with pytest.raises(PlanError, match=message):
        comcat.compress(other, pictures(), plan=units_and_ranks())


def test_a_plan_for_a_part_of_the_model_says_so():
    model = tiny_vit()
    plan = comcat.allocate(model, reduce=0.1, sites=find_sites(model).only("blocks.0"))
    assert plan.made_for is not None and plan.made_for.chosen is not None
    handle = apply_(model, plan)
    assert handle.notes == (
        f"The plan was made for {len(plan.made_for.chosen)} of the model's {len(plan.made_for.sites)} sites; the "
        "others stay as they are.",
    )
    assert apply_(tiny_vit(), Plan(sites={"blocks.0.attn:qk": SitePlan(keep=4, full=16)})).notes == ()


def test_a_fingerprint_that_does_not_fit_its_sites_is_refused():
    data = units_and_ranks().to_dict()
    data["made_for"]["sites"]["blocks.0.attn:qk"] = "qk 3 × 17 of 48 → 48"
    with pytest.raises(PlanError, match="changed by hand"):
        Plan.from_dict(data)
    with pytest.raises(PlanError, match="made_for"):
        Plan.from_dict({**data, "made_for": {"sites": ["blocks.0"]}})


def test_version_1_is_read_and_written_as_version_2():
    old = {"comcat_plan": 1, "made_by": {}, "sites": {"a:qk": {"rank": 2, "full_rank": 8, "head_ranks": [2, 1]}}}
    plan = Plan.from_dict(old)
    assert plan.sites["a:qk"] == SitePlan(keep=2, full=8, details={"head_ranks": (2, 1)})
    assert plan.to_dict()["sites"]["a:qk"] == {"form": "product", "keep": 2, "full": 8, "head_ranks": [2, 1]}
    assert plan.made_for is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"comcat_plan": 3, "sites": {}}, "version 3, expected 1 or 2"),
        ({"comcat_plan": "2", "sites": {}}, "version '2'"),
        ({"comcat_plan": 2, "sites": {"a": {"rank": 2, "full_rank": 4}}}, "'keep' and 'full'"),
        ({"comcat_plan": 2, "sites": {"a": {"keep": 2, "full": 4, "fom": "units"}}}, "did you mean 'form'"),
        ({"comcat_plan": 2, "sites": {"a": {"keep": 2.5, "full": 4}}}, "whole numbers"),
        ({"comcat_plan": 2, "sites": {"a": {"keep": 2, "full": 4, "form": 7}}}, "a name"),
        ({"comcat_plan": 2, "sites": []}, "not a plan"),
        ({"comcat_plan": 2, "sites": {}, "made_by": []}, "expected an object"),
    ],
)
def test_what_is_no_plan_is_told(data, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_a_plan_that_was_changed_by_hand_is_told_with_its_file(tmp_path):
    path, plan = tmp_path / "plan.json", Plan(sites={"a": SitePlan(keep=2, full=4), "b": SitePlan(keep=3, full=4)})
    path.write_text(plan.to_json().replace('"b"', '"a"'))
    with pytest.raises(PlanError, match=r"plan.json: 'a' is there twice"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(PlanError, match=r"plan.json: not a plan: expected an object") as caught:
        Plan.load(path)
    assert str(caught.value).count("not a plan") == 1
    path.write_text(plan.to_json(), encoding="utf-8-sig")
    assert Plan.load(path) == plan
    with pytest.raises(PlanError, match=f"did you mean '{path}'"):
        Plan.load(tmp_path)


def test_old_words_still_work_for_a_release():
    with pytest.warns(DeprecationWarning, match="SitePlan\\(keep="):
        entry = SitePlan(rank=3, full_rank=8, head_ranks=(3, 2))
    assert entry == SitePlan(keep=3, full=8, details={"head_ranks": (3, 2)})
    with pytest.warns(DeprecationWarning, match="keep"):
        assert entry.rank == 3
    with pytest.warns(DeprecationWarning, match="full"):
        assert entry.full_rank == 8
    with pytest.raises(TypeError, match="rnk"):
        SitePlan(rnk=3, full=8)
    with pytest.raises(TypeError, match="needs keep and full"):
        SitePlan(keep=3)


def test_made_for_compares_names_and_shapes_alone():
    sites = find_sites(tiny_vit())
    made_for = comcat.allocate(tiny_vit(), reduce=0.1).made_for
    assert made_for is not None
    MadeFor(model="any", sites=dict(reversed(made_for.sites.items()))).check(sites)

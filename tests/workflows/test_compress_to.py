"""Compressing to a folder from Python: all that the command line does, and every refusal before the work."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import BudgetError, ComcatError, DataError, ModelError, PlanError, SettingsError, StoreError
from comcat.runs.claims import claimed
from comcat.workflows import compress as module

QUICK = {"reduce": 0.3, "pictures": 8, "batch_size": 8, "bench": False}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_model_is_made_smaller_and_saved_with_what_was_measured(model, places, tmp_path):
    before = weights(model)
    done = comcat.compress_to(tmp_path / "small", model, str(places[0]), evaluation=places[1], **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = comcat.load(done.folder)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), done.model(x))
    results = loaded.comcat_record.results
    assert results == done.record.results and results.judged_on == f"15 pictures of {places[1]}"
    assert results.agreement["count"] == 15 and 0 <= results.after["top1"] <= 100
    assert results.after["parameters"] <= 0.7 * results.before["parameters"]
    assert loaded.comcat_record.settings["reduce"] == 0.3 and "batch_size" not in loaded.comcat_record.settings
    page = (done.folder / "report.html").read_text()
    assert str(places[1]) in page and sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_a_name_and_a_plan_do_as_well(model, places, tmp_path):
    folder = comcat.compress_to(tmp_path / "one", model, places[0], **QUICK).folder
    comcat.save(
        comcat.apply_(copy.deepcopy(model), comcat.Plan(sites={})).model, tmp_path / "dense", plan=comcat.Plan(sites={})
    )
    again = comcat.compress_to(
        tmp_path / "two",
        tmp_path / "dense",
        places[0],
        plan=folder / "plan.json",
        name="mine",
        command="again",
        **QUICK,
    )
    assert dict(again.record.plan.sites) == dict(comcat.load(folder).comcat_record.plan.sites)
    assert again.report.title == "mine, compressed" and again.report.command == "again"
    assert "The plan says every rank, so reduce was not used." in again.notes
    assert again.report.predicted_loss == pytest.approx(comcat.load(folder).comcat_record.results.predicted_loss)


def test_a_plan_that_was_changed_is_predicted_anew(model, places, tmp_path):
    plan = comcat.compress_to(tmp_path / "one", model, places[0], **QUICK).record.plan
    sites = {name: replace(entry, keep=1) for name, entry in plan.sites.items()}
    given = {**QUICK, "only": ("qk",), "multiple": 2}
    done = comcat.compress_to(tmp_path / "two", model, places[0], plan=replace(plan, sites=sites), **given)
    assert done.report.predicted_loss > 1.5 * plan.made_by["predicted_loss"]
    assert done.record.results.predicted_loss == done.report.predicted_loss
    assert "The plan says every rank, so reduce, multiple, only were not used." in done.notes
    given = {**QUICK, "statistic": "weights"}
    by_weights = comcat.compress_to(tmp_path / "three", model, places[0], plan=plan, **given)
    assert by_weights.report.predicted_loss is None


def test_without_an_evaluation_set_a_part_is_held_out_and_said(model, places, tmp_path):
    done = comcat.compress_to(tmp_path / "small", model, places[0], **QUICK)
    assert done.notes[0] == f"Measured on {done.record.results.judged_on}, for want of an evaluation set."
    assert "did not see" in (tmp_path / "small" / "README.md").read_text()


def test_it_can_be_tuned_on_the_way(model, places, tmp_path):
    done = comcat.compress_to(
        tmp_path / "small",
        model,
        places[0],
        evaluation=places[1],
        tune=comcat.tuning.settings.TuneSettings(steps=2, batch_size=4),
        **QUICK,
    )
    assert len(done.record.results.tuning["curve"]) >= 1 and done.report.between["top1"] is not None
    assert "None of 15 evaluation pictures is among 40 training pictures, by their pixels." in done.notes
    assert done.record.results.measured_loss is not None


def blocked(folder):
    (folder / "file").touch()
    return folder / "file" / "out"


def full(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").touch()
    return folder / "out"


PLAN = comcat.Plan(sites={"nowhere:qk": comcat.SitePlan(keep=3, full=8)})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"out": blocked}, StoreError, "nothing can be written"),
        ({"out": full}, SettingsError, "is not empty; overwrite=True"),
        ({"out": full, "overwrite": True}, StoreError, "was not written by comcat"),
        ({"evaluation": "train"}, DataError, "are both"),
        ({"data": "nowhere"}, DataError, "nowhere"),
        ({"plan": "nowhere.json"}, PlanError, "no plan"),
        ({"ranks": "search", "reduce": None}, SettingsError, "needs reduce"),
        ({"reduce": None}, SettingsError, "how far to go"),
        ({"reduce": 0.9999}, BudgetError, "at most"),
        ({"reduce": 0.9999, "budget": "macs", "multiple": 8}, BudgetError, "at most"),
        ({"only": ("attm",)}, SettingsError, "leaves no site"),
        ({"model": "convolutions"}, ModelError, "nothing in this model can shrink"),
        ({"model": "compressed"}, ModelError, "compressed already"),
        ({"plan": PLAN}, ComcatError, "nowhere"),
        ({"reduce": 0.3, "max_drop": 1.0}, SettingsError, "both reduce and max_drop"),
        ({"redce": 0.3}, SettingsError, "did you mean 'reduce'"),
        ({"model": "own"}, ModelError, "origin"),
        ({"tune": {"steps": 2, "batch_size": 7, "accumulate": 2}}, SettingsError, "expected a multiple of 2"),
        ({"tune": {"steps": 2, "only": ("head",), "features": ("blocks.9",)}}, SettingsError, "no block"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_work(change, error, said, model, places, tmp_path, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("the work was begun")

    settings = {**QUICK, **change}
    out = settings.pop("out", lambda folder: folder / "out")(tmp_path)
    data, evaluation = settings.pop("data", places[0]), settings.pop("evaluation", None)
    subject = other_model(settings.pop("model", None), model)
    if "tune" in settings:
        settings["tune"] = comcat.tuning.settings.TuneSettings(**settings["tune"])
    there = sorted(tmp_path.rglob("*"))
    for work in ("compress_", "search_", "evaluate"):
        monkeypatch.setattr(module, work, never)
    with pytest.raises(error, match=said) as caught:
        comcat.compress_to(out, subject, data, evaluation=places[0] if evaluation else None, **settings)
    assert isinstance(caught.value, ComcatError) and sorted(tmp_path.rglob("*")) == there


def other_model(kind, model):
    if kind == "convolutions":
        import timm

        return timm.create_model("resnet10t", num_classes=5, avg_down=False, down_kernel_size=3).eval()
    if kind == "own":
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    if kind == "compressed":
        return comcat.compress(model, reduce=0.3, statistic="weights")
    return model


def test_two_runs_into_one_folder_at_once_are_refused(model, places, tmp_path):
    with claimed(tmp_path / "small"), pytest.raises(StoreError, match="another run is writing to"):
        comcat.compress_to(tmp_path / "small", model, places[0], **QUICK)
    comcat.compress_to(tmp_path / "small", model, places[0], **QUICK)


def test_pictures_that_judge_are_not_calibrated_on(model, places, tmp_path):
    pictures = comcat.open_pictures(places[0])
    with pytest.raises(DataError, match="also in the evaluation set"):
        comcat.compress_to(tmp_path / "small", model, pictures, evaluation=pictures.take(20, seed=3), **QUICK)
    assert not list(tmp_path.iterdir())


def test_labels_that_do_not_fit_are_left_out_and_not_needed(model, tmp_path):
    done = comcat.compress_to(tmp_path / "small", model, "digits:train", seed=1, **QUICK)
    (note,) = [note for note in done.notes if "labels" in note]
    assert "has 10 classes, the model 5" in note and done.record.results.agreement["agreement"] is not None
    assert "top1" not in done.report.after or done.report.after["top1"] is None


def test_a_title_has_no_path(model, places, tmp_path):
    folder = comcat.compress_to(tmp_path / "one", model, places[0], **QUICK).folder
    comcat.save(comcat.load(folder), tmp_path / "again")
    done = comcat.compress_to(
        tmp_path / "two", model, places[0], name=str(tmp_path / "again"), plan=folder / "plan.json", **QUICK
    )
    assert done.report.title == "again, compressed" and done.report.model == str(tmp_path / "again")

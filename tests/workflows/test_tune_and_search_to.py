"""Tuning and searching to a place from Python, and what leaks there."""

import shutil

import pytest
import torch
from PIL import Image

import comcat
from comcat.errors import DataError, SettingsError, StoreError
from comcat.runs.claims import claimed
from comcat.workflows.places import said_of_tuning

TUNE = {"steps": 2, "batch_size": 4}
SEARCH = {"rounds": 1, "rank_steps": 2, "weight_steps": 0, "batch_size": 4, "pictures": 8}


def test_a_student_is_tuned_saved_and_reported_on(model, places, tmp_path):
    done = comcat.tune_to(tmp_path / "tuned", model, places[0], evaluation=places[1], **TUNE)
    assert done.model is model and len(comcat.load(done.folder).comcat_record.results.tuning["curve"]) >= 1
    assert (done.folder / "report.html").is_file() and (done.folder / "log.jsonl").is_file()
    assert done.notes == ("None of 15 evaluation pictures is among 40 training pictures, by their pixels.",)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="is not empty"):
        comcat.tune_to(tmp_path / "full", model, places[0], **TUNE)


def test_a_plan_is_searched_for_and_written(model, places, tmp_path):
    found = comcat.search_to(tmp_path / "plan.json", model, places[0], evaluation=places[1], **SEARCH)
    assert comcat.Plan.load(tmp_path / "plan.json").sites == found.plan.sites and "None of 15" in found.notes[0]
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(SettingsError, match="exists; overwrite=True"):
        comcat.search_to(tmp_path / "plan.json", model, places[0], **SEARCH)
    with pytest.raises(SettingsError, match="expected a file to write the plan to"):
        comcat.search_to(tmp_path / "plan", model, places[0], **SEARCH)


CALLS = {
    "tune": lambda model, data, evaluation, folder: comcat.tune(model, data, evaluation=evaluation, **TUNE),
    "tune_to": lambda model, data, evaluation, folder: comcat.tune_to(
        folder / "out", model, data, evaluation=evaluation, **TUNE
    ),
    "search": lambda model, data, evaluation, folder: comcat.search(model, data, evaluation=evaluation, **SEARCH),
    "search_to": lambda model, data, evaluation, folder: comcat.search_to(
        folder / "p.json", model, data, evaluation=evaluation, **SEARCH
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_judged_on_is_not_trained_on(call, model, places, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="are both"):
        call(model, places[0], str(places[0]), tmp_path)
    with pytest.raises(DataError, match=r"with the .* of the training set"):
        call(model, places[0], comcat.open_pictures(places[0]).take(9, seed=1), tmp_path)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tune_to", "search_to"])
def test_two_runs_to_one_place_at_once_are_refused(name, model, places, tmp_path):
    place = tmp_path / ("out" if name == "tune_to" else "p.json")
    with claimed(place), pytest.raises(StoreError, match="another run is writing to"):
        CALLS[name](model, places[0], None, tmp_path)


def test_tuning_that_made_it_worse_says_so(model, places, tmp_path):
    """On pictures in folders by the model's own answers, of which it has all right, nothing can become better."""
    preprocess = comcat.preprocess_of(model)
    for label in range(5):
        (tmp_path / "eval" / f"class{label}").mkdir(parents=True)
    for file in sorted(places[1].rglob("*.png")):
        with torch.no_grad():
            label = int(model(preprocess(Image.open(file))[None]).argmax())
        shutil.copy(file, tmp_path / "eval" / f"class{label}" / f"{file.parent.name}-{file.name}")
    settings = {**TUNE, "steps": 3, "lr": 0.5, "warmup": 0.0}
    done = comcat.tune_to(tmp_path / "out", model, places[0], evaluation=tmp_path / "eval", **settings)
    (note,) = [note for note in done.notes if "worse" in note]
    assert note.startswith("Tuning made it worse: top-1 100.00 % before and ") and "on 15 pictures" in note
    assert note in done.report.notes
    assert said_of_tuning(None) == said_of_tuning({"before": None, "after": None}) == []
    better = {"before": {"top1": 50.0, "count": 10}, "after": {"top1": 60.0, "count": 10}}
    assert said_of_tuning(better) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"top1": 50.0, "loss": 1.6}, {"top1": 60.0, "loss": 31.3}, "Tuning raised the loss from 1.6 to 31.3 nats"),
        ({"top1": 50.0, "loss": 1.6}, {"top1": 50.0, "loss": 1.7}, None),
        ({"agreement": 90.0}, {"agreement": 80.0}, "agreement 90.00 % before and 80.00 % after it, on 10 pictures"),
        ({"cosine": 0.9}, {"cosine": 0.8}, "cosine agreement 0.9000 before and 0.8000 after it"),
        ({"cosine": 0.8}, {"cosine": 0.9}, None),
        ({"divergence": 0.1}, {"divergence": 0.2}, "divergence 0.1000 before and 0.2000 after it"),
        ({"divergence": 0.2}, {"divergence": 0.1}, None),
    ],
)
def test_tuning_is_judged_by_what_was_measured(before, after, said):
    """Without labels by the agreement with the teacher; with them by the loss as well."""
    notes = said_of_tuning({"before": {"count": 10, **before}, "after": {"count": 10, **after}})
    assert notes == [] if said is None else said in notes[0] and "smaller lr" in notes[0]

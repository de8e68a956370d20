"""What a model carries with it survives other versions, and tuning puts aside what it makes untrue."""

import copy
import pickle

import pytest

from comcat.plan import Plan
from comcat.record import Record, Results

FULL = Results(
    before={"top1": 90.0, "parameters": 9},
    after={"top1": 81.5, "loss": 0.5, "parameters": 5},
    judged_on="360 pictures of digits:test",
    agreement={"agreement": 98.5, "count": 360},
    predicted_loss=0.25,
    measured_loss=0.5,
    others={"mine": [1, 2]},
)
TUNING = {"curve": [{"step": 1, "loss": 0.1}], "seconds": 1.0}


def test_results_go_to_plain_data_and_back():
    assert Results.from_dict(FULL.to_dict()) == FULL
    assert Results().to_dict() == {} and Results.from_dict(None) == Results()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_results_are_copied(copied):
    assert copied(FULL) == FULL


def test_what_other_versions_wrote_is_kept():
    written = {"before": {"top1": 1.0}, "after": None, "agreement": 98.5, "predicted_loss": "nan", "new": {"x": 1}}
    found = Results.from_dict(written)
    assert found == Results(before={"top1": 1.0}, others={"agreement": 98.5, "predicted_loss": "nan", "new": {"x": 1}})
    assert found.to_dict() == {k: v for k, v in written.items() if v is not None}


def test_a_record_takes_results_as_plain_data():
    assert Record(plan=Plan(sites={}), results={"before": {"top1": 1.0}}).results == Results(before={"top1": 1.0})  # type: ignore[arg-type]


def test_tuning_puts_aside_what_it_makes_untrue():
    tuned = FULL.tuned(TUNING)
    assert tuned == Results(before=FULL.before, after={"parameters": 5}, untuned={
        "top1": 81.5, "loss": 0.5, "judged_on": FULL.judged_on, "agreement": FULL.agreement, "predicted_loss": 0.25,
        "measured_loss": 0.5,
    }, tuning=TUNING, others=FULL.others)  # fmt: skip
    again = tuned.tuned({**TUNING, "seconds": 2.0})
    assert again.untuned == tuned.untuned and again.tuning is not None and again.tuning["seconds"] == 2.0


def test_a_tuning_of_no_step_leaves_everything_true():
    assert FULL.tuned({"curve": []}).measured_loss == 0.5


def test_the_dictionary_of_old_still_answers():
    with pytest.warns(DeprecationWarning, match=r"results\['tuning'\] is deprecated, say results\.tuning"):
        assert FULL.tuned(TUNING)["tuning"] == TUNING
    assert "agreement" in Results(agreement={"cosine": 0.5}).to_dict() and len(FULL) == 7

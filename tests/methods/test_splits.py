"""Pictures are divided so that nothing is judged by what it was made from, and what could not be is said."""

import numpy as np
import pytest
from PIL import Image

from comcat.data import open_pictures
from comcat.errors import DataError
from comcat.methods.splits import divide


def folder(place, count, start=0):
    place.mkdir(parents=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return open_pictures(place)


def keys(pictures):
    return set() if pictures is None else {s.key for s in pictures}


@pytest.mark.parametrize("max_drop", [None, 30.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_picture_serves_twice(tmp_path, max_drop, seed):
    pictures = folder(tmp_path / "data", 60)
    found = divide(pictures, calibrate=20, seed=seed, max_drop=max_drop)
    calibration, deciding, judged = keys(found.calibration), keys(found.deciding), keys(found.judged)
    assert len(calibration) == 20 and judged and (deciding if max_drop else not deciding)
    assert not (calibration & judged or calibration & deciding or deciding & judged)
    assert calibration <= keys(found.training) and not keys(found.training) & (judged | deciding)
    assert found.notes == (f"Measured on {found.judged_on}, for want of an evaluation set.",)
    assert found.judged_on == f"{len(judged)} pictures of {tmp_path / 'data'} that calibration did not see"


@pytest.mark.parametrize("count", [1, 19])
def test_few_pictures_serve_for_everything_and_that_alone_is_said(tmp_path, count):
    found = divide(folder(tmp_path / "data", count), calibrate=512, seed=0)
    assert keys(found.calibration) == keys(found.judged) == keys(found.training)
    (note,) = found.notes
    assert ("1 picture," if count == 1 else "19 pictures,") in note and "flatters" in note
    assert "did not see" not in note + found.judged_on


def test_an_evaluation_set_judges_and_everything_else_trains(tmp_path):
    pictures, evaluation = folder(tmp_path / "data", 30), folder(tmp_path / "eval", 12, start=100)
    found = divide(pictures, evaluation, calibrate=10, seed=0, trains=True)
    assert keys(found.judged) == keys(evaluation) and keys(found.training) == keys(pictures)
    assert found.judged_on == f"12 pictures of {tmp_path / 'eval'}"
    assert len(found.notes) == 1 and "None of 12 evaluation pictures is among 30 training pictures" in found.notes[0]
    limited = divide(pictures, evaluation, calibrate=10, seed=0, limit=5)
    assert len(keys(limited.judged)) == 5 and limited.judged_on == f"5 pictures of {tmp_path / 'eval'}"
    assert limited.notes == ()


def test_few_pictures_with_an_evaluation_set_say_nothing_of_measuring(tmp_path):
    pictures, evaluation = folder(tmp_path / "data", 5), folder(tmp_path / "eval", 12, start=100)
    assert divide(pictures, evaluation, calibrate=10, seed=0).notes == ()
    (shared, coarse) = divide(pictures, evaluation, calibrate=10, seed=0, max_drop=5.0).notes
    assert "choose the saving" in shared and "cannot be resolved" in coarse


def test_a_drop_that_so_few_pictures_cannot_show_is_said(tmp_path):
    pictures, evaluation = folder(tmp_path / "data", 40), folder(tmp_path / "eval", 4, start=100)
    found = divide(pictures, evaluation, calibrate=10, seed=0, max_drop=2.0)
    deciding = len(keys(found.deciding))
    (note,) = found.notes
    assert note.startswith(
        f"max_drop=2 cannot be resolved on {deciding} held-out pictures: one of them is {100 / deciding:.1f}"
    )


@pytest.mark.parametrize("trains", [False, True])
def test_pictures_of_the_evaluation_set_are_not_calibrated_or_trained_on(tmp_path, trains):
    pictures = folder(tmp_path / "data", 30)
    folder(tmp_path / "all", 30)  # the same pixels at another place
    with pytest.raises(DataError, match="also in the evaluation set"):
        divide(pictures, open_pictures(tmp_path / "all"), calibrate=10, seed=0)
    apart = divide(pictures, calibrate=10, seed=0)
    left = [s.key for s in pictures if s.key not in keys(apart.calibration)]
    leaked = tmp_path / "leaked"
    leaked.mkdir()
    (leaked / left[0]).write_bytes((tmp_path / "data" / left[0]).read_bytes())
    if trains:
        with pytest.raises(DataError, match=r"shares 1 of its 1 picture with the 30 of the training set"):
            divide(pictures, open_pictures(leaked), calibrate=10, seed=0, trains=True)
    else:
        assert divide(pictures, open_pictures(leaked), calibrate=10, seed=0).notes == ()

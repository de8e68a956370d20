"""Pictures in both sets are found by their pixels."""

import pytest

from comcat.data import open_pictures
from comcat.errors import DataError
from comcat.tuning.leaks import check_apart, same_place

from .material import folder, shards


def test_other_pictures_pass_and_the_sentence_says_what_was_compared(tmp_path):
    a, b = (open_pictures(folder(tmp_path / name, 12, first=first)) for name, first in (("a", 0), ("b", 100)))
    assert check_apart(a, b) == "None of 12 evaluation pictures is among 12 training pictures, by their pixels."
    assert (
        check_apart(a, b, sample=5)
        == "None of 5 evaluation pictures drawn at random is among 5 training pictures drawn at random, by their "
        "pixels."
    )


def test_the_same_pixels_in_other_files_are_found(tmp_path):
    a = open_pictures(folder(tmp_path / "a", 20))
    b = open_pictures(shards(tmp_path / "b", 8))
    with pytest.raises(
        DataError, match=r"the evaluation set .* shares 8 of its 8 pictures with the 20 of the training set"
    ):
        check_apart(a, b)
    with pytest.raises(DataError, match="of its 6 pictures"):
        check_apart(a, b, sample=6)


def test_places(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert same_place("hf:a/b", "hf:a/b")
    assert same_place(str(tmp_path / "a"), str(tmp_path / "link"))
    assert not same_place(str(tmp_path / "a"), str(tmp_path / "b"))

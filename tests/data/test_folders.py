"""Pictures in folders."""

from collections import Counter
from pathlib import Path

import pytest

from comcat.data import batches, open_pictures
from comcat.errors import DataError

from .material import RGB8, fill, numbers_of


def test_class_folders_are_read_like_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path, {"cat/b.png": 0, "cat/a.PNG": 1, "dog/deep/er/c.jpg": 2, "Ant/x.png": 3, "cat/a.b.png": 4})
    reference = ImageFolder(tmp_path)
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / ".git").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    pictures = open_pictures(tmp_path)
    assert pictures.has_labels and pictures.count == len(pictures) == 5
    assert list(pictures.class_names) == reference.classes == ["Ant", "cat", "dog"]
    theirs = [(Path(file).relative_to(tmp_path).as_posix(), label) for file, label in reference.samples]
    assert [(sample.key, sample.label) for sample in pictures] == theirs


def test_flat_folders_have_no_labels(tmp_path):
    pictures = open_pictures(str(fill(tmp_path, {"b.png": 1, "a.bmp": 0})))
    assert not pictures.has_labels and pictures.class_names is None
    assert [(sample.key, sample.label) for sample in pictures] == [("a.bmp", None), ("b.png", None)]
    assert numbers_of(pictures) == [0, 1]


def test_pictures_beside_folders_make_a_flat_folder(tmp_path):
    fill(tmp_path, {"a.png": 0, "more/b.png": 1})
    with pytest.warns(UserWarning, match="not taken for classes"):
        pictures = open_pictures(tmp_path)
    assert not pictures.has_labels and numbers_of(pictures) == [0, 1]


def test_an_empty_class_keeps_its_index(tmp_path):
    fill(tmp_path, {"a/x.png": 0, "c/x.png": 1})
    (tmp_path / "b").mkdir()
    with pytest.warns(UserWarning, match="1 sub-folder of .* without pictures, counted as classes: b"):
        pictures = open_pictures(tmp_path)
    assert [sample.label for sample in pictures] == [0, 2]


def test_splits_are_not_taken_for_classes(tmp_path):
    fill(tmp_path, {"train/a/x.png": 0, "val/a/x.png": 1})
    with pytest.raises(DataError, match=r"splits, not classes \(train, val\)"):
        open_pictures(tmp_path)
    assert open_pictures(tmp_path / "val").class_names == ("a",)


def test_links_that_lead_back_up_end(tmp_path):
    fill(tmp_path, {"a/x.png": 0, "b/y.png": 1})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert Counter(sample.label for sample in open_pictures(tmp_path))[1] == 1


def test_a_single_picture(tmp_path):
    file = fill(tmp_path, {"only.png": 7}) / "only.png"
    for source in (file, tmp_path):
        pictures = open_pictures(source)
        assert pictures.count == 1 and numbers_of(pictures) == [7]
        ((images, labels),) = batches(pictures, RGB8)
        assert images.shape == (1, 3, 8, 8) and labels is None
        assert numbers_of(pictures.take(5, seed=0)) == [7]
        parts = pictures.split(0.5, seed=0)
        assert sorted(part.count for part in parts) == [0, 1]
        with pytest.raises(DataError, match="no pictures"):
            list(min(parts, key=len))


def test_missing_paths_name_the_nearest(tmp_path):
    fill(tmp_path, {"pictures/a.png": 0})
    with pytest.raises(DataError, match="did you mean 'pictures'"):
        open_pictures(tmp_path / "picturs")
    with pytest.raises(DataError, match="did you mean 'pictures'"):
        open_pictures(str(tmp_path / "picturs" / "val"))
    with pytest.raises(DataError, match="did you mean 'digits'"):
        open_pictures("digit")
    for nothing in ("", "a\0b", "x" * 5000, None, 3):
        with pytest.raises(DataError):
            open_pictures(nothing)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        open_pictures(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"found 'notes.txt'"):
        open_pictures(tmp_path)
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match="no pictures in the folder"):
        open_pictures(tmp_path)
    with pytest.raises(DataError, match="no source of pictures"):
        open_pictures(tmp_path / "notes.txt")

"""Pictures that cannot be read."""

import warnings

import pytest
from PIL import Image

from comcat.data import batches, open_pictures
from comcat.errors import DataError, SettingsError

from .material import RGB8, encoded, fill, numbers_of, picture


def test_unreadable_pictures_are_skipped_counted_and_warned_of_once(tmp_path):
    fill(tmp_path, {f"{number:02}.png": number for number in range(17)})
    (tmp_path / "03x.jpg").write_bytes(encoded(picture(3, (64, 64)), "JPEG")[:-400])
    (tmp_path / "05x.png").write_bytes(b"not a picture")
    (tmp_path / "07x.tif").write_bytes(encoded(Image.new("F", (4, 4)), "TIFF"))
    pictures = open_pictures(tmp_path, max_unreadable=0.15)
    with pytest.warns(UserWarning) as caught:
        assert numbers_of(pictures) == list(range(17))
    assert len(caught) == 1 and "03x.jpg" in str(caught[0].message)
    assert [line.partition(":")[0] for line in pictures.skipped] == ["03x.jpg", "05x.png", "07x.tif"]
    assert "truncated" in pictures.skipped[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = batches(pictures, RGB8, batch_size=4, workers=3)
        assert sum(len(images) for images, _ in read) == 17 and len(pictures.skipped) == 3
    expected = r"3 of the first 11 pictures .* at most 10% of 20 .*03x.jpg: .*05x.png: .*07x.tif: "
    with pytest.warns(UserWarning), pytest.raises(DataError, match=expected):
        list(open_pictures(tmp_path))
    with pytest.raises(DataError, match=r"1 of the first 5 .* at most 0%"):
        list(open_pictures(tmp_path, max_unreadable=0))


def test_limits_end_a_pass_before_what_is_unreadable(tmp_path):
    fill(tmp_path, {f"{number}.png": number for number in range(3)})
    (tmp_path / "9.png").write_bytes(b"")
    pictures = open_pictures(tmp_path)
    assert [len(images) for images, _ in batches(pictures, RGB8, limit=3)] == [3]
    assert pictures.skipped == []


def test_nothing_readable_is_an_error_even_if_all_may_be_unreadable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="1 of the first 1"):
        list(open_pictures(tmp_path, max_unreadable=1.0))


def test_decompression_bombs_are_unreadable(tmp_path, monkeypatch):
    fill(tmp_path, {"a.png": 0, "b.png": 1})
    picture(2, (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pictures = open_pictures(tmp_path, max_unreadable=0.5)
    with pytest.warns(UserWarning, match="bomb"):
        assert numbers_of(pictures) == [0, 1]
    assert "DecompressionBombError" in pictures.skipped[0]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.1", True])
def test_max_unreadable_is_checked(fraction):
    with pytest.raises(SettingsError, match="max_unreadable"):
        open_pictures("digits", max_unreadable=fraction)

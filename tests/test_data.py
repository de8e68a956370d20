"""Sources of pictures, what happens to bad input, sampling, splitting, batching, and preprocessing against timm's."""

import copy
import io
import json
import pickle
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from comcat.data import Pictures, Preprocess, batches, open_pictures, overlap
from comcat.data.picture import plain
from comcat.errors import DataError, SettingsError

GREY8 = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels=1)
RGB8 = Preprocess(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def picture(number: int, size: tuple[int, int] = (10, 12)) -> Image.Image:
    """A picture of noise that depends on the number; size is (width, height)."""
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, names: dict[str, int]) -> Path:
    """Writes one picture a name; the numbers choose the pictures."""
    for name, number in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def write_parquet(
    file: Path, columns: dict, types: dict | None = None, metadata: dict | None = None, group: int = 4
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values, type=(types or {}).get(name)) for name, values in columns.items()}
    table = pa.table(arrays)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)
    return file


def cells(count: int, start: int = 0) -> list[dict]:
    return [{"bytes": encoded(picture(number)), "path": f"{number}.png"} for number in range(start, start + count)]


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def numbers_of(pictures: Pictures) -> list[int]:
    """Which of ``picture(number)`` these are, in order."""
    known = {picture(number).tobytes(): number for number in range(40)}
    return [known[sample.image.tobytes()] for sample in pictures]


# Preprocessing


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [((32, 32), 0.875, "bicubic"), ((24, 40), 0.9, "bilinear"), ((17, 17), 1.0, "lanczos"), ((7, 5), 0.5, "nearest")],
)
def test_preprocess_is_timms_bit_for_bit(crop_mode, size, crop_pct, interpolation):
    from timm.data import create_transform

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = Preprocess(
        size=size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    theirs = create_transform(
        (3, *size), mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    for number, shape in enumerate([(64, 48), (48, 65), (33, 33), (5, 40), (41, 4), (1, 1), (32, 32), (300, 211)]):
        image = picture(number, shape)
        got = ours(image)
        assert got.dtype == torch.float32 and got.shape == (3, *size) and got.is_contiguous()
        assert torch.equal(got, theirs(image)), shape


@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_preprocess_of_grey_models_is_timms(crop_mode):
    from timm.data import create_transform

    ours = Preprocess(size=(28, 28), mean=(0.13,), std=(0.3,), channels=1, crop_mode=crop_mode, crop_pct=0.9)
    theirs = create_transform(
        (1, 28, 28), mean=(0.13,), std=(0.3,), interpolation="bicubic", crop_pct=0.9, crop_mode=crop_mode
    )
    for image in (picture(0, (40, 31)), picture(1, (12, 80))):
        assert torch.equal(ours(image), theirs(image.convert("L")))


def test_preprocess_of_long_thin_pictures(tmp_path):
    settings = {"size": (8, 8), "mean": (0.5,), "std": (0.5,)}
    line = Image.new("RGB", (1, 2000), "white")
    got = Preprocess(**settings, crop_mode="border")(line)  # timm fails: the width is rounded to 0
    assert got.shape == (3, 8, 8) and got.max() == 1
    assert Preprocess(**settings)(line).min() == 1
    Image.new("RGB", (1, 2_000_000)).save(tmp_path / "b.png")
    fill(tmp_path, {"a.png": 0})
    pictures = open_pictures(tmp_path, max_unreadable=0.5)
    with pytest.warns(UserWarning, match="too long and thin"):
        assert [len(images) for images, _ in batches(pictures, Preprocess(**settings))] == [1]


def test_preprocess_survives_json():
    before = Preprocess(size=(224, 192), mean=(0.1, 0.2, 0.3), std=(0.5,), interpolation="bilinear", crop_pct=0.9)
    assert before.std == (0.5, 0.5, 0.5)
    after = Preprocess.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before and hash(after) == hash(before)
    assert json.loads(json.dumps(before.to_dict())) == before.to_dict()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 8)}, "size"),
        ({"size": (8,)}, "height, width"),
        ({"size": 8}, "tuple of numbers"),
        ({"size": (8.5, 8)}, "whole numbers"),
        ({"mean": (0.5, 0.5)}, "one for each of 3"),
        ({"std": (0.5, 0.0, 0.5)}, "above 0"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"interpolation": "random"}, "interpolation"),
        ({"crop_mode": "centre"}, "did you mean 'center'"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"channels": 4}, "channels"),
        ({"crop_pc": 0.9}, "did you mean 'crop_pct'"),
    ],
)
def test_preprocess_refuses_with_a_reason(wrong, message):
    with pytest.raises(SettingsError, match=message):
        Preprocess.from_dict(RGB8.to_dict() | wrong)


def test_preprocess_says_what_is_missing():
    with pytest.raises(SettingsError, match="lacks mean, std"):
        Preprocess.from_dict({"size": [8, 8]})


# Pixels


def test_sixteen_bit_grey_is_scaled_to_eight():
    values = np.array([[0, 128, 129, 257, 514, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    files = [encoded(image, "PNG"), encoded(image, "TIFF"), b"P5 9 1 65535\n" + values.byteswap().tobytes()]
    opened = [Image.open(io.BytesIO(file)) for file in files] + [Image.fromarray(values.astype(np.int32))]
    assert {image.mode for image in opened} == {"I;16", "I"}
    for image in opened:
        assert plain(image).mode == "L"
        np.testing.assert_array_equal(np.asarray(plain(image)), expected)


def test_transparency_is_laid_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    opened = Image.open(io.BytesIO(encoded(palette, transparency=1)))
    assert opened.mode == "P"
    np.testing.assert_array_equal(np.asarray(plain(opened)), [[[255, 0, 0], [255, 255, 255]]])
    half = Image.new("RGBA", (1, 1), (0, 0, 255, 51))
    np.testing.assert_array_equal(np.asarray(plain(half)), [[[204, 204, 255]]])
    grey = Image.new("LA", (1, 1), (0, 51))
    np.testing.assert_array_equal(np.asarray(plain(grey)), [[[204, 204, 204]]])
    keyed = Image.open(io.BytesIO(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))))
    np.testing.assert_array_equal(np.asarray(plain(keyed)), [[[255, 255, 255]]])


def test_other_modes_become_grey_or_colour():
    red = Image.new("RGB", (4, 4), (200, 30, 20))
    for mode in ("CMYK", "HSV", "YCbCr"):
        assert plain(red.convert(mode)).mode == "RGB"
        assert np.abs(np.asarray(plain(red.convert(mode))).astype(int) - np.asarray(red)).max() <= 3
    assert plain(red.convert("P", palette=Image.Palette.ADAPTIVE)).getpixel((0, 0)) == (200, 30, 20)
    assert plain(Image.new("1", (2, 2), 1)).getextrema() == (255, 255)
    assert plain(red) is red
    with pytest.raises(DataError, match="floating-point"):
        RGB8(Image.new("F", (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_exif_orientation_is_applied_once(orientation, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.jpg"
    picture(0).convert(mode).save(file, exif=exif, quality=95)
    (sample,) = open_pictures(file)
    with Image.open(file) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels(sample.image), pixels(expected))
    np.testing.assert_array_equal(pixels(plain(sample.image)), pixels(expected))  # as preprocessing sees it
    assert sample.image.mode == ("L" if mode == "L" else "RGB")


# Folders


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
    with pytest.warns(UserWarning, match="hold no pictures but count as classes: b"):
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


# Unreadable pictures


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


# Parquet


def test_parquet_rows_groups_and_layouts(tmp_path):
    labels = [3, 0, 1, 2, 1, 0, 1, 0, 2, 3]
    struct = write_parquet(tmp_path / "struct.parquet", {"image": cells(10), "label": labels})
    binary = write_parquet(
        tmp_path / "binary.parquet", {"image": [cell["bytes"] for cell in cells(10)], "label": labels}
    )
    for file in (struct, binary):
        pictures = open_pictures(file)
        assert pictures.count == 10 and pictures.has_labels and pictures.class_names is None
        assert numbers_of(pictures) == list(range(10)) and [sample.label for sample in pictures] == labels
        assert [sample.key for sample in pictures][:2] == [f"{file.name}:0", f"{file.name}:1"]
        taken = pictures.take(3, seed=1)
        for sample in taken:
            row = int(sample.key.rpartition(":")[2])
            assert sample.image.tobytes() == picture(row).tobytes() and sample.label == labels[row]


def test_parquet_folders_and_patterns(tmp_path):
    write_parquet(tmp_path / "train-1.parquet", {"image": cells(5, 5), "label": [1] * 5})
    write_parquet(tmp_path / "train-0.parquet", {"image": cells(5), "label": [0] * 5})
    for source in (tmp_path, f"{tmp_path}/train-*.parquet", f"{tmp_path}/train-{{0..1}}.parquet"):
        pictures = open_pictures(source)
        assert numbers_of(pictures) == list(range(10)) and [sample.label for sample in pictures] == [0] * 5 + [1] * 5
        assert [sample.key for sample in pictures][5] == "train-1.parquet:0"
    write_parquet(tmp_path / "validation-0.parquet", {"image": cells(2), "label": [0] * 2})
    with pytest.raises(DataError, match="several splits"):
        open_pictures(tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'train-1.parquet'"):
        open_pictures(f"{tmp_path}/train-{{1..2}}.parquet")
    with pytest.raises(DataError, match="no file matches"):
        open_pictures(f"{tmp_path}/test-*.parquet")
    with pytest.raises(DataError, match="malformed"):
        open_pictures(f"{tmp_path}/train-{{0..1.parquet")


def test_parquet_string_labels_are_sorted_and_numbered(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"image": cells(3), "label": ["dog", "ant", "dog"]})
    pictures = open_pictures(file)
    assert pictures.class_names == ("ant", "dog") and [sample.label for sample in pictures] == [1, 0, 1]
    file = write_parquet(tmp_path / "b.parquet", {"image": cells(3), "label": ["10", "9", "2"]})
    pictures = open_pictures(file)
    assert pictures.class_names is None and [sample.label for sample in pictures] == [10, 9, 2]


def test_parquet_column_types_of_datasets_are_honoured(tmp_path):
    features = {
        "img": {"_type": "Image"},
        "kind": {"_type": "ClassLabel", "names": ["ant", "bee"]},
        "note": {"_type": "Value", "dtype": "string"},
        "boxes": [{"_type": "Value"}],
    }
    columns = {"note": ["x", "y"], "img": cells(2), "kind": [1, 0], "boxes": [[1], [2]]}
    pictures = open_pictures(write_parquet(tmp_path / "a.parquet", columns, metadata=features))
    assert pictures.class_names == ("ant", "bee") and [sample.label for sample in pictures] == [1, 0]
    columns["kind"] = [1, 2]
    with pytest.raises(DataError, match=r"a.parquet:1 has the label 2; expected one below 2"):
        open_pictures(write_parquet(tmp_path / "a.parquet", columns, metadata=features))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0, 2.0], "a.parquet:0 has the label 0.5; expected a whole number"),
        ([0.0, float("nan"), 1.0], "a.parquet:1 has the label nan"),
        ([0, 1, -1], "a.parquet:2 has the label -1"),
        ([0, None, 1], "a.parquet:1 has no label"),
        ([[0], [1], [2]], "has the type list"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(3), "label": labels}))


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_rows_without_labels(labels, tmp_path):
    columns = {"image": cells(2)} | ({} if labels is None else {"label": labels})
    pictures = open_pictures(write_parquet(tmp_path / "a.parquet", columns))
    assert not pictures.has_labels and [sample.label for sample in pictures] == [None, None]


def test_whole_floats_and_booleans_are_labels(tmp_path):
    for labels, expected in (([2.0, 0.0], [2, 0]), ([True, False], [1, 0])):
        pictures = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(2), "label": labels}))
        assert [sample.label for sample in pictures] == expected


def test_parquet_without_pictures_says_what_it_has(tmp_path):
    with pytest.raises(
        DataError, match=r"no column 'image'; its columns: images \(.*\), label \(int64\); did you mean 'images'"
    ):
        open_pictures(write_parquet(tmp_path / "a.parquet", {"images": cells(1), "label": [0]}))
    with pytest.raises(DataError, match="has the type double; expected binary"):
        open_pictures(write_parquet(tmp_path / "a.parquet", {"image": [1.0]}))
    import pyarrow as pa

    with pytest.raises(DataError, match="has no rows"):
        open_pictures(write_parquet(tmp_path / "a.parquet", {"image": []}, types={"image": pa.binary()}))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"b.parquet cannot be read"):
        open_pictures(tmp_path / "b.parquet")


def test_files_that_vanish_or_break_later_are_named(tmp_path):
    pictures = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(9)}, group=3))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"the parquet file .*a.parquet cannot be read: FileNotFoundError"):
        list(pictures)


def test_hopeless_streams_are_given_up(tmp_path):
    members = {f"{number:03}.png": b"x" for number in range(120)} | {"999.png": encoded(picture(0))}
    pictures = open_pictures(write_tar(tmp_path / "a.tar", members), max_unreadable=1.0)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="100 of the first 100 pictures"):
        list(pictures)
    few = open_pictures(write_tar(tmp_path / "b.tar", dict(list(members.items())[-2:])))
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"1 of the first 2 pictures .* of all"):
        list(few)


def test_parquet_files_must_agree(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": cells(1), "label": [0]})
    write_parquet(tmp_path / "b.parquet", {"image": cells(1)})
    with pytest.raises(DataError, match=r"has the columns 'image' and None, but .*a.parquet has 'image' and 'label'"):
        open_pictures(tmp_path)


def test_parquet_may_name_files_and_holds_damaged_pictures(tmp_path):
    fill(tmp_path, {"side/3.png": 3})
    rows = [
        *cells(2),
        {"bytes": None, "path": "side/3.png"},
        {"bytes": None, "path": None},
        {"bytes": b"x", "path": "y"},
    ]
    pictures = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": rows}), max_unreadable=0.4)
    with pytest.warns(UserWarning):
        assert numbers_of(pictures) == [0, 1, 3]
    assert pictures.skipped[0] == "a.parquet:3: ValueError: it has neither bytes nor a file"
    assert pictures.skipped[1].startswith("a.parquet:4: ")


# Tar shards


def test_shards_are_read_as_webdataset_reads_them(tmp_path):
    import webdataset as wds

    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"x-{shard:03}.tar")) as writer:
            for number in range(3):
                index = 3 * shard + number
                writer.write(
                    {
                        "__key__": f"dir/{index:04}",
                        "png": encoded(picture(index)),
                        "cls": str(index % 4),
                        "txt": "caption",
                    }
                )
    theirs = wds.WebDataset([str(tmp_path / f"x-{shard:03}.tar") for shard in range(2)], shardshuffle=False)
    expected = [(sample["__key__"], int(sample["cls"])) for sample in theirs]
    for source in (tmp_path, f"{tmp_path}/x-{{000..001}}.tar"):
        pictures = open_pictures(source)
        assert pictures.has_labels and pictures.class_names is None and pictures.count is None
        assert [(sample.key.partition(":")[2], sample.label) for sample in pictures] == expected
        assert numbers_of(pictures) == list(range(6))
    assert [sample.key for sample in pictures][-1] == "x-001.tar:dir/0005"
    with pytest.raises(TypeError, match="unknown length"):
        len(pictures)
    with pytest.raises(TypeError, match="unknown length"):
        len(batches(pictures, RGB8))
    assert (
        pictures
        and len(pictures.take(4, seed=0)) == 4
        and numbers_of(open_pictures(tmp_path / "x-001.tar")) == [3, 4, 5]
    )


def test_shard_labels_in_words_json_or_not_at_all(tmp_path):
    data = [encoded(picture(number)) for number in range(3)]
    words = {"a.png": data[0], "a.cls": b"dog\n", "b.PNG": data[1], "b.cls": b"ant", "c.png": data[2], "c.cls": b"dog"}
    pictures = open_pictures(write_tar(tmp_path / "words.tar", words))
    assert pictures.class_names == ("ant", "dog") and [sample.label for sample in pictures] == [1, 0, 1]
    values = {"a.json": b'{"label": 2}', "a.png": data[0], "b.json": b'{"label": 0, "x": 1}', "b.rgb.png": data[1]}
    pictures = open_pictures(write_tar(tmp_path / "json.tar", values))
    assert [sample.label for sample in pictures] == [2, 0] and numbers_of(pictures) == [0, 1]
    for more in ({}, {"a.cls": b"-1", "b.cls": b"-1"}, {"a.cls": b"", "b.cls": b""}, {"a.json": b"[]"}):
        bare = {"._a.png": b"x", "a.png": data[0], "b.png": data[1]} | more
        ordered = dict(sorted(bare.items()))
        pictures = open_pictures(write_tar(tmp_path / "bare.tar", ordered))
        assert not pictures.has_labels and numbers_of(pictures) == [0, 1]
    two = {"a.input.png": data[2], "a.mask.png": data[0], "b.png": data[1]}
    assert numbers_of(open_pictures(write_tar(tmp_path / "two.tar", two))) == [2, 1]
    mixed = {"a.png": data[0], "a.cls": b"1", "b.png": data[1]}
    with pytest.raises(DataError, match=r"mixed.tar:b has no label"):
        list(open_pictures(write_tar(tmp_path / "mixed.tar", mixed)))
    broken = {"a.png": data[0], "a.json": b'{"label": '}
    with pytest.raises(DataError, match=r"broken.tar:a.json is no JSON"):
        open_pictures(write_tar(tmp_path / "broken.tar", broken))
    fraction = {"a.png": data[0], "a.json": b'{"label": 0.5}'}
    with pytest.raises(DataError, match=r"label 0.5"):
        list(open_pictures(write_tar(tmp_path / "fraction.tar", fraction)))


def test_bad_shards_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no pictures in .*a.tar.*found 'x.txt'"):
        open_pictures(write_tar(tmp_path / "a.tar", {"x.txt": b"1"}))
    with pytest.raises(DataError, match="found none"):
        open_pictures(write_tar(tmp_path / "b.tar", {}))
    (tmp_path / "c.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(DataError, match=r"the shard .*c.tar cannot be read"):
        open_pictures(tmp_path / "c.tar")
    whole = write_tar(tmp_path / "d.tar", {f"{number}.bmp": encoded(picture(number), "BMP") for number in range(4)})
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"the shard .*d.tar cannot be read"):
        list(open_pictures(whole))
    (tmp_path / "both").mkdir()
    for name in ("train.tar", "test.tar"):
        write_tar(tmp_path / "both" / name, {"a.png": encoded(picture(0))})
    with pytest.raises(DataError, match="several splits"):
        open_pictures(tmp_path / "both")


# Data sets of the hub's library


def dataset(count: int = 6, labels: list | None = None):
    import datasets

    datasets.disable_progress_bars()
    labels = labels or [number % 3 for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": cells(count), "label": labels}, features=features)


def test_saved_data_sets(tmp_path):
    import datasets

    data = dataset()
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "single")
    for source in (tmp_path / "one", tmp_path / "two" / "test", tmp_path / "single"):
        pictures = open_pictures(source)
        assert pictures.count == 6 and pictures.class_names == ("a", "b", "c")
        assert numbers_of(pictures) == list(range(6)) and [sample.label for sample in pictures] == [0, 1, 2] * 2
    with pytest.raises(DataError, match=r"several splits; open one: .*two/train, .*two/test"):
        open_pictures(tmp_path / "two")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_pictures(tmp_path / "one")


def test_hub_data_sets_are_streamed(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    dataset().to_parquet(tmp_path / "data" / "train-0.parquet")
    dataset(4).to_parquet(tmp_path / "data" / "test-0.parquet")
    pictures = open_pictures("hf:./data:train")
    assert pictures.count is None and pictures.class_names == ("a", "b", "c") and pictures.has_labels
    assert numbers_of(pictures) == list(range(6)) and [sample.label for sample in pictures] == [0, 1, 2] * 2
    assert [sample.key for sample in pictures][3] == "train:3"
    assert numbers_of(open_pictures("hf:./data:test[:3]")) == [0, 1, 2]
    taken = pictures.take(3, seed=0)
    assert taken.count == 3 and len(set(numbers_of(taken))) == 3
    with pytest.raises(DataError, match=r"several splits; name one: .*hf:./data:train"):
        open_pictures("hf:./data")
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_pictures("hf:./data:trian")
    with pytest.raises(DataError, match="cannot be opened"):
        open_pictures("hf:./date")
    with pytest.raises(DataError, match=r"expected hf:OWNER/NAME"):
        open_pictures("hf::train")

    def unreachable(*arguments, **options):
        raise ConnectionError(f"no network for {arguments}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot be opened: no network for \('o/n', 'c'\)"):
        open_pictures("hf:o/n/c:train")
    with pytest.raises(DataError, match=r"cannot be opened: no network for \('o/n', None\)"):
        open_pictures("hf:o/n:train")


def test_hub_counts_spare_a_pass_and_streams_are_read_no_further_than_needed(monkeypatch):
    import datasets

    reads = []

    def rows():
        for number, cell in enumerate(cells(20)):
            reads.append(number)
            yield {"image": cell, "label": number % 2}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    info = datasets.SplitInfo("train", num_examples=20)
    stream.info.splits = datasets.SplitDict({"train": info})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: {"train": stream})
    pictures = open_pictures("hf:o/n")
    assert pictures.count == 20 and open_pictures("hf:o/n:train[:7]").count == 7
    reads.clear()
    taken = pictures.take(2, seed=3)
    assert reads == []
    chosen = numbers_of(taken)
    assert len(reads) == max(chosen) + 1 < 20 and [sample.key for sample in taken] == [f"train:{n}" for n in chosen]


@pytest.mark.parametrize(
    ("labels", "names", "expected"), [([-1, -1], None, [None] * 2), (["b", "a"], ("a", "b"), [1, 0])]
)
def test_hub_labels_missing_or_in_words(labels, names, expected, tmp_path):
    write_parquet(
        tmp_path / "d" / "train.parquet", {"image": cells(2), "label": labels}, metadata={"image": {"_type": "Image"}}
    )
    pictures = open_pictures(f"hf:{tmp_path}/d")
    assert pictures.class_names == names and [sample.label for sample in pictures] == expected


def test_hub_pictures_may_be_files_or_urls(tmp_path):
    import fsspec

    from comcat.data.picture import decode

    fill(tmp_path, {"d/train/a/x.png": 0, "d/train/b/y.png": 1})
    pictures = open_pictures(f"hf:{tmp_path}/d")
    assert numbers_of(pictures) == [0, 1] and [sample.label for sample in pictures] == [0, 1]
    with fsspec.open("memory://pictures/z.png", "wb") as file:
        file.write(encoded(picture(5)))
    assert decode("memory://pictures/z.png").tobytes() == picture(5).tobytes()


# Digits


def test_digits_have_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    everything, train, test = (open_pictures(name) for name in ("digits", "digits:train", "digits:test"))
    assert (everything.count, train.count + test.count) == (1797, 1797)
    assert everything.class_names == tuple("0123456789")
    assert {s.key for s in train} | {s.key for s in test} == {s.key for s in everything}
    share = [np.bincount([s.label for s in part]) for part in (test, everything)]
    assert (share[0] == share[1] // 5).all()
    reference = load_digits()
    assert [s.label for s in everything] == reference.target.tolist()
    first = next(iter(everything)).image
    assert first.mode == "L" and first.size == (8, 8)
    np.testing.assert_array_equal(np.asarray(first), np.floor(reference.images[0] * 255 / 16 + 0.5))
    assert overlap(train, test) == 0


# Samples, splits, shuffles


@given(n=st.integers(1, 3000), seed=st.integers(-(2**40), 2**40))
@settings(max_examples=15, deadline=None)
def test_taking_is_exact_and_repeatable(n, seed):
    digits = open_pictures("digits:test")
    keys = {entry.key for entry in digits.take(n, seed)._entries(None)}
    assert len(keys) == min(n, digits.count) == digits.take(n, seed).count
    assert keys == {entry.key for entry in digits.take(n, seed)._entries(None)}


def test_taking_is_uniform(tmp_path):
    pictures = open_pictures(fill(tmp_path, {f"{number:02}.png": 0 for number in range(20)}))
    counts = Counter(entry.key for seed in range(2000) for entry in pictures.take(5, seed)._entries(None))
    assert len(counts) == 20
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_samples_and_splits_do_not_depend_on_the_place_or_the_x(tmp_path):
    names = {f"{number:02}.png": number for number in range(20)}
    here, there = (open_pictures(fill(tmp_path / name, names)) for name in ("here", "there"))
    assert numbers_of(here.take(6, 1)) == numbers_of(there.take(6, 1)) != numbers_of(here.take(6, 2))
    assert [numbers_of(part) for part in here.split(0.3, 1)] == [numbers_of(part) for part in there.split(0.3, 1)]


@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 10**6), n=st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_splits_are_disjoint_and_complete(fraction, seed, n):
    digits = open_pictures("digits:test").take(n, seed)
    rest, held_out = digits.split(fraction, seed)
    keys = [{entry.key for entry in part._entries(None)} for part in (digits, rest, held_out)]
    assert keys[1] | keys[2] == keys[0] and not keys[1] & keys[2]
    assert (rest.count, held_out.count) == (len(keys[1]), len(keys[2]))


def test_splits_are_stable_sized_right_and_can_be_split_again():
    digits = open_pictures("digits")
    rest, held_out = digits.split(0.25, seed=5)
    assert abs(held_out.count / 1797 - 0.25) < 0.04
    in_train = {entry.key for entry in open_pictures("digits:train").split(0.25, seed=5)[1]._entries(None)}
    assert in_train < {entry.key for entry in held_out._entries(None)}
    again = rest.split(0.25, seed=5)[1]
    assert abs(again.count / rest.count - 0.25) < 0.05
    assert {s.key for s in digits.split(0.25, seed=6)[1]} != {s.key for s in held_out}
    assert len(held_out.take(10, 0)) == 10 and {s.key for s in held_out.take(10, 0)} <= {s.key for s in held_out}


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.take(0, seed=0),
        lambda p: p.take(-1, seed=0),
        lambda p: p.take(1.5, seed=0),
        lambda p: p.take(1, seed=None),
        lambda p: p.split(0.0, seed=0),
        lambda p: p.split(1.0, seed=0),
        lambda p: p.split("half", seed=0),
        lambda p: p.fingerprint(0),
        lambda p: batches(p, GREY8, limit=0),
        lambda p: batches(p, GREY8, limit=-3),
        lambda p: batches(p, GREY8, batch_size=0),
        lambda p: batches(p, GREY8, batch_size=2.5),
        lambda p: batches(p, GREY8, workers=0),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(SettingsError, match=r"got .*expected"):
        call(open_pictures("digits:test"))


def test_shuffles_reorder_everything_by_the_seed(tmp_path):
    rows = write_parquet(tmp_path / "rows" / "a.parquet", {"image": cells(24)}, group=5)
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(4):
        members = {f"{number}.png": encoded(picture(number)) for number in range(6 * shard, 6 * shard + 6)}
        write_tar(shards / f"{shard}.tar", members)
    folder = fill(tmp_path / "folder", {f"{number:02}.png": number for number in range(24)})
    for source in (rows, shards, folder):
        pictures = open_pictures(source)
        orders = []
        for seed in (0, 0, 1):
            images = torch.cat([images for images, _ in batches(pictures, RGB8, shuffle=True, seed=seed, batch_size=7)])
            orders.append(images)
        plainly = torch.cat([images for images, _ in batches(pictures, RGB8)])
        assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
        assert not torch.equal(orders[0], plainly)
        numbers = [next(n for n in range(24) if torch.equal(image, plainly[n])) for image in orders[0]]
        assert sum(abs(one - other) == 1 for one, other in pairwise(numbers)) < 8  # not in chunks
        assert sorted(image.sum().item() for image in orders[0]) == sorted(image.sum().item() for image in plainly)


def test_the_shuffle_buffer_is_bounded_and_loses_nothing(monkeypatch):
    from comcat.data import pictures
    from comcat.data.sources import Entry

    monkeypatch.setattr(pictures, "_SHUFFLE_BYTES", 10 * 600)
    drawn = 0

    def entries():
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield Entry(str(number), None, b"x" * 88)

    order = []
    for entry in pictures._shuffle_buffer(entries(), 0):
        order.append(int(entry.key))
        assert drawn - len(order) <= 11
    assert sorted(order) == list(range(100)) and order != sorted(order)


def test_sets_can_be_copied_and_pickled(tmp_path):
    rest, _ = open_pictures(fill(tmp_path, {f"{number}.png": number for number in range(6)})).take(5, 0).split(0.3, 0)
    for twin in (copy.deepcopy(rest), pickle.loads(pickle.dumps(rest))):
        assert numbers_of(twin) == numbers_of(rest) and twin.name == rest.name


# Batches


def test_batches_have_the_promised_shapes_order_and_length():
    digits = open_pictures("digits:test")
    read = batches(digits, GREY8, batch_size=100)
    sizes = []
    for images, labels in read:
        assert images.dtype == torch.float32 and images.shape[1:] == (1, 8, 8)
        assert labels is not None and labels.dtype == torch.int64 and labels.shape == (len(images),)
        sizes.append(len(images))
    assert sizes == [100, 100, 100, 55] and len(read) == 4
    first, second = (torch.cat([labels for _, labels in read]) for _ in range(2))
    assert torch.equal(first, second) and first.tolist() == [sample.label for sample in digits]
    expected = torch.stack([GREY8(sample.image) for sample in digits])
    for workers in (1, 5):
        got = torch.cat([images for images, _ in batches(digits, GREY8, batch_size=64, workers=workers)])
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (10, [8, 2]), (16, [8, 8]), (99999, [8] * 44 + [3])])
def test_limits(limit, sizes):
    read = batches(open_pictures("digits:test"), GREY8, batch_size=8, limit=limit)
    assert [len(images) for images, _ in read] == sizes and len(read) == len(sizes)


def test_other_functions_may_preprocess():
    digits = open_pictures("digits:test").take(4, 0)
    ((images, _),) = batches(digits, lambda image: torch.full((2,), float(image.width)))
    assert images.tolist() == [[8.0, 8.0]] * 4
    sizes = iter(range(4))
    with pytest.raises(DataError, match="different shapes"):
        list(batches(digits, lambda image: torch.zeros(next(sizes))))

    def broken(image):
        raise RuntimeError("a mistake of the caller's")

    with pytest.raises(RuntimeError, match="mistake"):  # no unreadable picture
        list(batches(digits, broken, workers=2))


def test_grey_and_colour_models_take_either_kind_of_picture(tmp_path):
    grey = open_pictures("digits").take(2, 0)
    colour = open_pictures(fill(tmp_path, {"a.png": 0}))
    assert next(iter(batches(grey, RGB8)))[0].shape == (2, 3, 8, 8)
    assert next(iter(batches(colour, GREY8)))[0].shape == (1, 1, 8, 8)


# Pictures in two sets


def test_overlap_finds_the_same_pixels_in_other_files(tmp_path):
    one = fill(tmp_path / "one", {f"{number}.png": number for number in range(6)})
    two = fill(tmp_path / "two", {f"x{number}.bmp": number for number in range(4, 9)})
    picture(4).save(two / "copy.png")
    assert overlap(open_pictures(one), open_pictures(two)) == 2
    assert len(open_pictures(two).fingerprint()) == 5
    assert len(open_pictures(one).fingerprint(limit=3)) == 3
    assert open_pictures(one).fingerprint(limit=3) < open_pictures(one).fingerprint()
    turned = fill(tmp_path / "turned", {"a.png": 4})
    picture(4).transpose(Image.Transpose.ROTATE_90).save(turned / "a.png")
    assert overlap(open_pictures(one), open_pictures(turned)) == 0


def test_importing_is_light():
    heavy = [
        "datasets",
        "pyarrow",
        "sklearn",
        "timm",
        "torchvision",
        "transformers",
        "webdataset",
        "fsspec.implementations",
    ]
    code = f"import sys, comcat.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _classes(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    return open_pictures(folder)


def test_labels_in_terms_of_other_names(tmp_path):
    pictures = _classes(tmp_path, "ship", "truck")
    known = ("car", "ship", "tree", "truck")
    named = pictures.in_terms_of(known)
    assert [s.label for s in pictures] == [0, 1] and [s.label for s in named] == [1, 3]
    assert named.class_names == known and sorted(s.label for s in named.take(2, 0)) == [1, 3]  # parts of it as well
    assert [s.label for s in named.in_terms_of(("truck", "tree", "ship", "car"))] == [2, 0]  # and of others again
    bare = named.without_labels()
    assert [s.label for s in bare] == [None, None] and not bare.has_labels and bare.class_names is None
    assert not bare.split(0.5, 0)[0].has_labels
    with pytest.raises(DataError, match="no class is called 'truck'; did you mean 'trucks'"):
        pictures.in_terms_of(("ship", "trucks"))


def test_pictures_are_labelled_as_the_model_counts(tmp_path):
    import timm

    from comcat.models import in_classes_of

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["car", "ship", "truck"]}
    named, note = in_classes_of(model, _classes(tmp_path / "a", "ship", "truck"))
    assert [s.label for s in named] == [1, 2] and note is None
    strange, note = in_classes_of(model, _classes(tmp_path / "b", "ship", "sloop"))
    assert not strange.has_labels and "none called 'sloop'" in note
    numbered = _classes(tmp_path / "c", "n01", "n02", "n03")  # another vocabulary for all of them
    assert in_classes_of(model, numbered) == (numbered, None)
    with pytest.raises(DataError, match="4 classes, the model 3"):
        in_classes_of(model, _classes(tmp_path / "d", "a", "b", "c", "d"))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": None}
    kept, note = in_classes_of(model, _classes(tmp_path / "e", "ship", "truck"))
    assert kept.has_labels and "first of the model's 3" in note

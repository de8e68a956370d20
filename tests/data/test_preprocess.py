"""Preprocessing against timm's."""

import json

import pytest
import torch
from PIL import Image

from comcat.data import Preprocess, batches, open_pictures
from comcat.errors import SettingsError

from .material import RGB8, fill, picture


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

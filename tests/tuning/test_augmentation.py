"""Augmentation goes by the model's own preprocessing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from comcat.data import Preprocess
from comcat.errors import SettingsError
from comcat.runs.seeding import seeded
from comcat.tuning.augmentation import Augment
from comcat.tuning.settings import TuneSettings

COLOUR = Preprocess(size=(12, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_pct=0.9)
GREY = Preprocess(size=(8, 8), mean=(0.3,), std=(0.2,), channels=1)
ALL = {"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 1.0}


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("preprocess", [COLOUR, GREY])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("settings", [{}, ALL, {**ALL, "crop_scale": None}])
def test_the_result_is_an_input_of_the_model_and_depends_on_the_seed_alone(image, preprocess, mode, settings):
    augment = Augment(preprocess, TuneSettings(**settings))
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        with seeded(seed):
            drawn.append(augment(image.convert(mode)))
    assert drawn[0].shape == (preprocess.channels, *preprocess.size) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])


@pytest.mark.parametrize("preprocess", [COLOUR, GREY])
def test_nothing_switched_on_is_what_evaluation_sees(image, preprocess):
    augment = Augment(preprocess, TuneSettings(crop_scale=None, flip=0))
    expected = preprocess(image.convert("L") if preprocess.channels == 1 else image)
    got = augment(image.convert("L") if preprocess.channels == 1 else image)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_a_flip_is_a_flip(image):
    plain, flipped = (Augment(COLOUR, TuneSettings(crop_scale=None, flip=share))(image) for share in (0.0, 1.0))
    torch.testing.assert_close(flipped, plain.flip(2))


def test_the_whole_area_is_normalised_as_the_model_says():
    grey = Image.new("RGB", (16, 12), (102, 102, 102))
    x = Augment(COLOUR, TuneSettings(flip=0))(grey)
    expected = (torch.full((3,), 0.4) - torch.tensor(COLOUR.mean)) / torch.tensor(COLOUR.std)
    torch.testing.assert_close(x.mean((1, 2)), expected)


@pytest.mark.parametrize("words", ["augmix-m3", "rand-k3", "nonsense"])
def test_words_that_timm_does_not_know_are_told(words):
    with pytest.raises(SettingsError, match=f"does not understand '{words}'"):
        Augment(COLOUR, TuneSettings(rand_augment=words))


@pytest.mark.parametrize(("side", "scale"), [(32, (0.6, 1.0)), (64, (0.6, 1.0)), (65, (0.08, 1.0)), (224, (0.08, 1.0))])
def test_crops_of_small_pictures_show_most_of_them(side, scale):
    preprocess = replace(COLOUR, size=(side, side))
    assert Augment(preprocess, TuneSettings()).crop.scale == scale
    assert Augment(preprocess, TuneSettings(crop_scale=(0.3, 0.9))).crop.scale == (0.3, 0.9)
    assert Augment(preprocess, TuneSettings(crop_scale=None)).crop is None

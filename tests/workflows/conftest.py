"""A small model, and pictures of its size in two folders."""

import numpy as np
import pytest
from PIL import Image

from ..models import tiny_vit


def drawn(place, per_class, start):
    for label in range(5):
        folder = place / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = np.random.default_rng(1000 * label + start + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return place


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Two folders without a common picture: to train on, and to evaluate on."""
    root = tmp_path_factory.mktemp("pictures")
    return drawn(root / "train", 8, 0), drawn(root / "val", 3, 500)


@pytest.fixture
def model():
    return tiny_vit()

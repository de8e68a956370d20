"""Batches of tensors."""

import pytest
import torch

from comcat.data import batches, open_pictures
from comcat.errors import DataError

from .material import GREY8, RGB8, fill


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

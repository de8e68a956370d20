"""The built-in digits; samples, splits and shuffles."""

import copy
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.data import batches, open_pictures, overlap
from comcat.errors import SettingsError

from .material import GREY8, RGB8, cells, encoded, fill, numbers_of, picture, write_parquet, write_tar


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
    from comcat.data import reading
    from comcat.data.sources import Entry

    monkeypatch.setattr(reading, "_SHUFFLE_BYTES", 10 * 600)
    drawn = 0

    def entries():
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield Entry(str(number), None, b"x" * 88)

    order = []
    for entry in reading.shuffle_buffer(entries(), 0):
        order.append(int(entry.key))
        assert drawn - len(order) <= 11
    assert sorted(order) == list(range(100)) and order != sorted(order)


def test_sets_can_be_copied_and_pickled(tmp_path):
    rest, _ = open_pictures(fill(tmp_path, {f"{number}.png": number for number in range(6)})).take(5, 0).split(0.3, 0)
    for twin in (copy.deepcopy(rest), pickle.loads(pickle.dumps(rest))):
        assert numbers_of(twin) == numbers_of(rest) and twin.name == rest.name

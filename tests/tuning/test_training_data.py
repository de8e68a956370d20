"""The order and augmentation of training data depend on nothing but the seed and the epoch."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from comcat.data import open_pictures
from comcat.errors import DataError, SettingsError
from comcat.tuning.data import TrainingData, check_labels

from .material import folder, rows, shards

COUNT = 23


def noisy(image):
    """The picture's pixels, with noise from each of the three generators."""
    x = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
    return x + 0.3 * random.random() + 0.3 * float(np.random.rand()) + 0.3 * torch.rand(())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_pictures(folder(tmp_path_factory.mktemp("pictures"), COUNT))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return open_pictures(shards(tmp_path_factory.mktemp("shards"), COUNT))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """As the hub streams it: of unknown length."""
    folder = tmp_path_factory.mktemp("hub")
    rows(folder / "train.parquet", COUNT)
    return open_pictures(f"hf:{folder}")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return open_pictures(rows(tmp_path_factory.mktemp("rows") / "train.parquet", COUNT))


def global_batches(data: TrainingData, epoch: int = 0, start: int = 0):
    """The batches of all processes, each joined to the global one."""
    shares = [replace(data, process=p).epoch(epoch, start=start) for p in range(data.processes)]
    for parts in zip(*shares, strict=True):
        yield tuple(torch.cat([part[i] for part in parts]) for i in range(3))


def seen(data: TrainingData, epoch: int = 0) -> Counter:
    """How often each picture counts in an epoch, by its pixels without the noise (which is below 1)."""
    return Counter(
        image.floor().numpy().tobytes()
        for images, _, weights in global_batches(data, epoch)
        for image, weight in zip(images, weights, strict=True)
        if weight
    )


def same(a, b) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)
    )


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("source", ["pictures", "stream", "table"])
def test_processes_see_together_what_one_would(request, source, repeats):
    base = TrainingData(
        pictures=request.getfixturevalue(source), transform=noisy, batch_size=4, repeats=repeats, count=COUNT
    )
    whole = list(global_batches(base, 1))
    assert same(whole, global_batches(replace(base, batch_size=2, processes=2), 1))
    assert same(whole, global_batches(replace(base, batch_size=1, processes=4), 1))


@pytest.mark.parametrize("source", ["pictures", "stream", "table"])
def test_workers_do_not_change_batches(request, source):
    base = TrainingData(
        pictures=request.getfixturevalue(source), transform=noisy, batch_size=2, processes=2, count=COUNT, repeats=3
    )
    assert same(global_batches(base), global_batches(replace(base, workers=2)))
    assert same(global_batches(base, start=3), global_batches(replace(base, workers=2), start=3))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("source", ["pictures", "stream", "table"])
def test_an_epoch_begun_in_the_middle_is_the_rest_of_it(request, source, repeats):
    data = TrainingData(
        pictures=request.getfixturevalue(source), transform=noisy, batch_size=4, repeats=repeats, count=COUNT
    )
    whole = list(global_batches(data, 2))
    for start in (1, 4, len(whole)):
        assert same(whole[start:], global_batches(data, 2, start=start))


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (2, 2), (1, 3), (50, 1), (5, 7)])
def test_each_picture_counts_once_an_epoch(pictures, batch_size, processes):
    data = TrainingData(pictures=pictures, transform=noisy, batch_size=batch_size, processes=processes)
    counted = seen(data)
    assert len(counted) == COUNT and set(counted.values()) == {1}
    shapes = {images.shape for images, _, _ in global_batches(data)}
    assert shapes == {(batch_size * processes, 3, 8, 8)}  # the last batch is full as well
    assert len(list(global_batches(data))) == data.steps()


def test_padding_shows_pictures_of_the_same_batch(pictures):
    *_, (images, labels, weights) = global_batches(TrainingData(pictures=pictures, transform=noisy, batch_size=10))
    assert weights.tolist() == [1, 1, 1] + [0] * 7
    shown = [image.floor().numpy().tobytes() for image in images]
    assert shown == [shown[place % 3] for place in range(10)]
    assert labels.tolist() == [labels[place % 3] for place in range(10)]


def test_epochs_differ_and_are_reproducible(pictures):
    data = TrainingData(pictures=pictures, transform=noisy, batch_size=COUNT)
    (first,), (again,), (second,) = (list(global_batches(data, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], second[1])  # another order
    other = next(iter(global_batches(replace(data, seed=1))))
    assert not torch.equal(first[0], other[0])
    by_pixels = [{i.floor().numpy().tobytes(): i for i in images} for images, _, _ in (first, second)]
    assert any(not torch.equal(image, by_pixels[1][key]) for key, image in by_pixels[0].items())  # another augmentation


def test_a_picture_is_augmented_anew_each_epoch(pictures):
    """One picture, always at the same position."""
    data = TrainingData(pictures=pictures.take(1, seed=0), transform=noisy, batch_size=1)
    drawn = [next(iter(data.epoch(epoch))).images for epoch in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_labels_go_with_their_pictures(pictures):
    plain = TrainingData(pictures=pictures, transform=noisy, batch_size=4)
    for images, labels, _ in global_batches(plain):
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            corner = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert corner.min() >= 127


def test_repeated_augmentation_shows_each_picture_in_a_row_differently(pictures):
    data = TrainingData(pictures=pictures, transform=noisy, batch_size=6, repeats=3)
    images = torch.cat([images[weights > 0] for images, _, weights in global_batches(data)])
    assert len(images) == COUNT  # the epoch is as long as without
    for place in range(COUNT - COUNT % 3):
        first = images[place - place % 3]
        assert torch.equal(images[place].floor(), first.floor())
        assert place % 3 == 0 or not torch.equal(images[place], first)
    assert len(seen(data, 0)) == -(-COUNT // 3)
    assert set(seen(data, 0)) != set(seen(data, 1))


def test_randomness_outside_is_left_alone(pictures):
    data = TrainingData(pictures=pictures, transform=noisy, batch_size=4)
    for workers in (0, 1):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = random.random(), float(np.random.rand()), float(torch.rand(()))
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        list(replace(data, workers=workers).epoch(0))
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


# ---------------------------------------------------------------- what cannot be read


@pytest.fixture
def damaged(tmp_path):
    path = tmp_path / "damaged"
    folder(path, 20)
    for name in ("class0/0000.png", "class3/0007.png"):
        (path / name).write_bytes(b"no picture")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_counts_nothing_and_is_named(damaged, workers):
    pictures = open_pictures(damaged)
    data = TrainingData(pictures=pictures, transform=noisy, batch_size=3, workers=workers)
    with pytest.warns(UserWarning, match=r"class\d/000\d\.png .* cannot be read \(.*\) and is left out"):
        batches = list(data.epoch(0))
    assert sum(float(batch.weights.sum()) for batch in batches) == 18
    skipped = [entry for batch in batches for entry in batch.skipped]
    assert sorted(entry.partition(":")[0] for entry in skipped) == ["class0/0000.png", "class3/0007.png"]
    assert pictures.skipped == skipped
    for batch in batches:
        assert len(batch.images) == 3
        for image, weight in zip(batch.images, batch.weights, strict=True):
            assert weight or batch is batches[-1] or not image.any()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_pictures_stop_the_run(damaged, workers):
    data = TrainingData(
        pictures=open_pictures(damaged, max_unreadable=0.05), transform=noisy, batch_size=3, workers=workers
    )
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"2 of the first \d+ samples .* at most 5% .*class"):
        list(data.epoch(0))


def test_a_batch_of_nothing_but_unreadable_pictures_has_the_usual_shape(tmp_path):
    for number in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.png").write_bytes(b"no picture")
    data = TrainingData(pictures=open_pictures(tmp_path, max_unreadable=1), transform=noisy, batch_size=3)
    with pytest.warns(UserWarning):
        (batch,) = data.epoch(0)
    assert batch.images.shape == (3, 3, 64, 64) and not batch.images.any() and not batch.weights.any()


def test_errors_of_a_transform_pass_on(pictures):
    def broken(image):
        raise ZeroDivisionError("a mistake")

    with pytest.raises(ZeroDivisionError):
        list(TrainingData(pictures=pictures, transform=broken, batch_size=3).epoch(0))


# ---------------------------------------------------------------- streams and sizes


def test_a_stream_wants_to_know_its_epoch(stream):
    data = TrainingData(pictures=stream, transform=noisy, batch_size=4)
    with pytest.raises(DataError, match=r"stream of unknown length.*--epoch-size N"):
        data.steps()
    assert replace(data, count=10).steps() == 3
    assert sum(seen(replace(data, count=10)).values()) == 10
    counted = seen(replace(data, count=COUNT))
    assert len(counted) == COUNT and set(counted.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_shorter_than_its_epoch_is_an_error(stream, workers):
    data = TrainingData(pictures=stream, transform=noisy, batch_size=4, count=COUNT + 10, workers=workers)
    with pytest.raises(DataError, match="fewer pictures than the 33 of an epoch"):
        list(data.epoch(0))


def test_what_is_not_needed_is_not_decoded(stream, sharded, pictures, table):
    for source in (stream, sharded, pictures, table):
        decoded = []

        def noting(image, decoded=decoded):
            decoded.append(1)
            return noisy(image)

        data = TrainingData(pictures=source, transform=noting, batch_size=2, processes=2, process=1, count=COUNT)
        batches = list(data.epoch(0, start=2))
        assert len(decoded) == sum(len(batch.weights) for batch in batches)


def test_parts_and_samples_of_a_set_can_be_trained_on(pictures):
    rest, _ = pictures.split(0.3, seed=1)
    for part in (rest, pictures.take(9, seed=0)):
        counted = seen(TrainingData(pictures=part, transform=noisy, batch_size=2, processes=2))
        assert len(counted) == part.count and set(counted.values()) == {1}


def test_settings_are_checked(pictures):
    fine = {"pictures": pictures, "transform": noisy, "batch_size": 2}
    for wrong in ({"batch_size": 0}, {"repeats": 0}, {"process": 1}, {"workers": -1}, {"count": 0}, {"processes": 1.5}):
        with pytest.raises(SettingsError):
            TrainingData(**{**fine, **wrong})
    with pytest.raises(SettingsError, match=rf"30 samples.*has {COUNT} pictures"):
        TrainingData(**fine, count=30)


def test_labels_outside_the_classes_are_refused():
    check_labels(torch.tensor([0, 3]), 4)
    check_labels(None, 4)
    with pytest.raises(DataError, match="got the label 4, expected 0 to 3"):
        check_labels(torch.tensor([0, 4]), 4)
    with pytest.raises(DataError, match="got the label -1"):
        check_labels(torch.tensor([-1]), 4)


# ---------------------------------------------------------------- sharing


@pytest.mark.parametrize("source", ["pictures", "stream", "table"])
@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_shares_hold_every_picture_once(request, source, processes):
    whole = request.getfixturevalue(source)
    parts = [whole.share(p, processes) for p in range(processes)]
    keys = [entry.key for part in parts for _, entry in part.entries()]
    assert sorted(keys) == sorted(entry.key for _, entry in whole.entries())
    sample = whole.take(10, seed=0)
    assert sum(sample.share(p, processes).count for p in range(processes)) == 10


def test_a_share_must_exist(pictures):
    with pytest.raises(SettingsError, match="got 2, expected one below 2"):
        pictures.share(2, 2)


@pytest.mark.parametrize("source", ["pictures", "stream", "table"])
def test_entries_come_in_the_order_of_reading(request, source):
    whole = request.getfixturevalue(source)
    read = [entry.key for _, entry in whole.read(lambda image: None, seed=5)]
    assert [entry.key for _, entry in whole.entries(5)] == read
    some = list(whole.entries(5, lambda position: position % 3 == 1))
    assert [(position, entry.key) for position, entry in some] == [(i, k) for i, k in enumerate(read) if i % 3 == 1]

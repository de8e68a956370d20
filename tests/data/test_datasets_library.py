"""Data sets that the library `datasets` saved, or streams from the hub."""

import pytest

from comcat.data import batches, open_pictures
from comcat.errors import DataError

from .material import RGB8, cells, encoded, fill, numbers_of, picture, write_parquet


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
    for of_unknown_length in (pictures, batches(pictures, RGB8)):
        with pytest.raises(TypeError, match="unknown length"):
            len(of_unknown_length)
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

    from comcat.data.decoding import decode

    fill(tmp_path, {"d/train/a/x.png": 0, "d/train/b/y.png": 1})
    pictures = open_pictures(f"hf:{tmp_path}/d")
    assert numbers_of(pictures) == [0, 1] and [sample.label for sample in pictures] == [0, 1]
    with fsspec.open("memory://pictures/z.png", "wb") as file:
        file.write(encoded(picture(5)))
    assert decode("memory://pictures/z.png").tobytes() == picture(5).tobytes()


def test_every_worker_of_torch_sees_the_whole_stream(tmp_path):
    """`datasets` gave each of two workers the rows of one file, numbered from 0: half of the pictures were lost."""
    from torch.utils.data import DataLoader, IterableDataset

    class Keys(IterableDataset):
        def __init__(self, pictures):
            self.pictures = pictures

        def __iter__(self):
            yield from ((entry.key, entry.label) for _, entry in self.pictures.entries())

    for shard in range(2):
        columns = {"image": cells(3, 3 * shard), "label": [3 * shard, 3 * shard + 1, 3 * shard + 2]}
        write_parquet(tmp_path / "d" / f"train-{shard}.parquet", columns)
    pictures = open_pictures(f"hf:{tmp_path}/d:train")
    seen = map(tuple, DataLoader(Keys(pictures), batch_size=None, num_workers=2))
    assert sorted(seen) == sorted([(f"train:{row}", row) for row in range(6)] * 2)

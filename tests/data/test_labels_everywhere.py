"""The same pictures of twelve classes through every reader, in every order: the same labels, or none and the reason."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from comcat.data import Pictures, open_pictures
from comcat.data.labels import in_natural_order

from .material import cells, encoded, fill, numbers_of, picture, write_parquet, write_tar

Rows = list[tuple[int, str]]  # which picture, and the name of its class

NAMES = {
    "numbers": [str(number) for number in range(12)],
    "padded numbers": [f"{number:02}" for number in range(12)],
    "numbered words": [f"class_{number}" for number in range(12)],
    "mixed case": ["Zebra", "ant", "Bee", "cow", "Cat", "cat", "dog", "Eel", "fox", "Gnu", "hen", "ibis"],
    "dots and spaces": ["v0.5", "v0.10", "v0.7", "a b", "a  b", "a,b", 'a"b', "a;b", "é", "e", "É", "ß"],
}


def by_folder(folder: Path, rows: Rows) -> Path:
    return fill(folder, {f"{name}/{number}.png": number for number, name in rows})


def by_csv(folder: Path, rows: Rows) -> Path:
    fill(folder, {f"{number}.png": number for number, _ in rows})
    with open(folder / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
        csv.writer(file).writerows([["label", "file_name"], *([name, f"{number}.png"] for number, name in rows)])
    return folder


def by_jsonl(folder: Path, rows: Rows) -> Path:
    fill(folder, {f"deep/er/{number}.png": number for number, _ in rows})
    lines = [json.dumps({"file_name": f"deep/er/{number}.png", "label": name}) for number, name in rows]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


def by_metadata_parquet(folder: Path, rows: Rows) -> Path:
    fill(folder, {f"{number}.png": number for number, _ in rows})
    columns = {"file_name": [f"{number}.png" for number, _ in rows], "label": [name for _, name in rows]}
    write_parquet(folder / "metadata.parquet", columns)
    return folder


def by_parquet(folder: Path, rows: Rows) -> Path:
    columns = {"image": [cells(1, number)[0] for number, _ in rows], "label": [name for _, name in rows]}
    return write_parquet(folder / "a.parquet", columns, group=5)


def by_numbers_in_parquet(folder: Path, rows: Rows) -> Path:
    columns = {"image": [cells(1, number)[0] for number, _ in rows], "label": [int(name) for _, name in rows]}
    return write_parquet(folder / "a.parquet", columns)


def by_hub(folder: Path, rows: Rows) -> str:
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "string"}}
    columns = {"image": [cells(1, number)[0] for number, _ in rows], "label": [name for _, name in rows]}
    write_parquet(folder / "train.parquet", columns, metadata=features)
    return f"hf:{folder}"


def by_saved(folder: Path, rows: Rows, names: list[str] | None = None) -> Path:
    import datasets

    datasets.disable_progress_bars()
    label = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": [cells(1, number)[0] for number, _ in rows], "label": [name for _, name in rows]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return folder


def by_saved_in_the_order_of_text(folder: Path, rows: Rows) -> Path:
    """As ``datasets`` itself makes it of class folders."""
    return by_saved(folder, rows, sorted({name for _, name in rows}))


def by_cls(folder: Path, rows: Rows) -> Path:
    """All pictures first, then all labels: no picture stands beside its label."""
    pictures = {f"{number}.png": encoded(picture(number)) for number, _ in rows}
    labels = {f"{number}.cls": f"{name}\n".encode() for number, name in reversed(rows)}
    return write_tar(folder / "a.tar", pictures | labels)


def by_json_in_shards(folder: Path, rows: Rows) -> Path:
    for shard in (0, 1):
        members: dict[str, bytes] = {}
        for number, name in rows[shard::2]:
            members[f"{number}.json"] = json.dumps({"label": name}).encode()
            members[f"{number}.png"] = encoded(picture(number))
        write_tar(folder / f"{shard}.tar", members)
    return folder


READERS: list[Callable[[Path, Rows], Path | str]] = [
    by_folder, by_csv, by_jsonl, by_metadata_parquet, by_parquet, by_hub, by_saved, by_cls, by_json_in_shards,
    by_saved_in_the_order_of_text, by_numbers_in_parquet,
]  # fmt: skip


def labels_of(pictures: Pictures) -> dict[int, int | None]:
    """The label of each picture, by its number."""
    return dict(zip(numbers_of(pictures), [sample.label for sample in pictures], strict=True))


@pytest.mark.filterwarnings("ignore:.*the order of text")
@pytest.mark.parametrize(
    ("reader", "names"),
    [
        pytest.param(reader, names, id=f"{reader.__name__}, {kind}")
        for reader in READERS
        for kind, names in NAMES.items()
        if reader is not by_numbers_in_parquet or "numbers" in kind
    ],
)
def test_every_reader_gives_the_same_labels(reader, names, tmp_path):
    """Folders named 0, 2 and 10 were sorted as text where numbers in parquet were not: 0 % instead of 100 %."""
    rows = [(number, names[number % 12]) for number in range(24)]
    random.Random(len(names[0])).shuffle(rows)
    (tmp_path / "data").mkdir()
    pictures = open_pictures(reader(tmp_path / "data", rows))
    assert pictures.count in (24, None) and pictures.labels_from is not None
    found = labels_of(pictures)
    if reader is by_saved_in_the_order_of_text and names is not NAMES["numbers"]:
        assert pictures.class_names == tuple(sorted(names))  # the data says itself which class has which number
        expected = {number: sorted(names).index(name) for number, name in rows}
    else:
        expected = {number: in_natural_order(names).index(name) for number, name in rows}
    assert found == expected
    if pictures.class_names is not None:  # numbers in data are labels and need no names
        assert {number: pictures.class_names[label or 0] for number, label in found.items()} == dict(rows)
        ours = random.Random(1).sample(names, 12)
        assert labels_of(pictures.in_terms_of(ours)) == {number: ours.index(name) for number, name in rows}
        assert {s.label for s in pictures.take(3, 0)} <= set(range(12))


@pytest.mark.filterwarnings("ignore:.*order of text")
@pytest.mark.parametrize("numbers", [(0, 2, 10), (3, 1, 11), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_some_of_a_models_twelve_classes(reader, numbers, tmp_path):
    """The case of the folders 0, 2 and 10: read by a model of twelve unnamed classes, they are its 0, 2 and 10."""
    import timm

    from comcat.models import in_classes_of

    rows = [(place, str(numbers[place % 3])) for place in (5, 3, 1, 0, 4, 2)]
    (tmp_path / "data").mkdir()
    model = timm.create_model("test_vit", num_classes=12)
    pictures, _ = in_classes_of(model, open_pictures(reader(tmp_path / "data", rows)))
    assert labels_of(pictures) == {place: int(name) for place, name in rows}
    assert pictures.labels_from is not None


PICTURES = {f"{number}.png": encoded(picture(number)) for number in range(3)}
PARTLY = {
    "csv": lambda folder: by_csv(fill(folder, {"9.png": 9}), [(0, "a"), (1, "b")]),
    "jsonl": lambda folder: by_jsonl(fill(folder, {"9.png": 9}), [(0, "a"), (1, "b")]),
    "parquet": lambda folder: write_parquet(folder / "a.parquet", {"image": cells(3), "label": [None, "a", "b"]}),
    "cls": lambda folder: write_tar(folder / "a.tar", PICTURES | {"1.cls": b"1", "2.cls": b"2"}),
    "json": lambda folder: write_tar(folder / "a.tar", PICTURES | {f"{n}.json": b'{"label": 1}' for n in (1, 2)}),
}


@pytest.mark.parametrize("write", PARTLY.values(), ids=PARTLY)
def test_labels_of_some_pictures_only_are_left_out_with_the_reason(write, tmp_path):
    """A first picture without a label took those of all others away, without a word."""
    (tmp_path / "data").mkdir()
    with pytest.warns(UserWarning, match=r"no label in .* for 1 of \d pictures, the first is .*(0|9)") as caught:
        pictures = open_pictures(write(tmp_path / "data"))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert pictures.notes == (str(caught[0].message),)
    assert pictures.labels_from is None and not pictures.has_labels
    assert {sample.label for sample in pictures} == {None}


def test_labels_late_in_a_stream_are_said(tmp_path):
    """Nobody knows a stream's labels before a pass over it."""
    write_parquet(tmp_path / "d" / "train.parquet", {"image": cells(3), "label": [None, 1, 2]})
    pictures = open_pictures(f"hf:{tmp_path}/d")
    with pytest.warns(UserWarning, match=r"train:1 of .* has the label 1, but the first picture has none") as caught:
        assert [sample.label for sample in pictures] == [None] * 3
    assert len(caught) == 1


def test_what_is_said_of_a_set(tmp_path):
    pictures = open_pictures(by_csv(tmp_path, [(0, "b"), (1, "a")]))
    said = {"name": str(tmp_path), "pictures": 2, "labels": "metadata.csv"}
    assert pictures.describe() == said == json.loads(json.dumps(pictures.describe()))
    named = pictures.in_terms_of(["b", "a", "c"])
    assert named.take(1, 0).describe()["labels"] == "metadata.csv, by name" and named.largest_label == 1
    assert open_pictures("digits:test").describe() == {
        "name": "digits:test", "pictures": 355, "labels": "scikit-learn's targets",
    }  # fmt: skip
    assert pictures.without_labels().describe()["labels"] is None

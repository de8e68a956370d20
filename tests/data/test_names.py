"""Whatever files are called, and in whatever order they come: no picture takes another's label."""

import csv
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.data import open_pictures
from comcat.data.sources import SPLITS, is_data, printable

from .material import encoded, fill, numbers_of, picture, write_tar

PIECES = st.sampled_from(
    ["a", "b", "A", "v0", "5", "7", "0001", "mask", "png", "cls", "json", " x", "é", "a b", "-", "_"]
)
STEMS = st.lists(st.tuples(PIECES, st.sampled_from([".", "/", "", ".."])), min_size=1, max_size=4).map(
    lambda pairs: "".join(piece + mark for piece, mark in pairs).rstrip("./")
)
SETS = st.lists(STEMS.filter(lambda stem: all(map(is_data, stem.split("/")))), min_size=1, max_size=7, unique=True)


def opened(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_pictures(source)


def check(pictures, labels: dict[int, int | None]):
    """No picture has another's label; what is lost is said."""
    found = dict(zip(numbers_of(pictures), [sample.label for sample in pictures], strict=True))
    if pictures.has_labels:
        assert all(labels[number] == label for number, label in found.items())
    if len(found) < len(labels) or (not pictures.has_labels and any(label is not None for label in labels.values())):
        assert pictures.notes


@given(stems=SETS, seed=st.integers(0, 10**6), unlabelled=st.floats(0, 1) | st.just(0.0), as_json=st.booleans())
@settings(max_examples=60, deadline=None)
def test_shards_of_any_names(stems, seed, unlabelled, as_json):
    choose = random.Random(seed)
    labels: dict[int, int | None] = {}
    members = []
    for number, stem in enumerate(stems):
        labels[number] = None if choose.random() < unlabelled else number
        members.append((f"{stem}.{choose.choice(('png', 'PNG', 'bmp'))}", encoded(picture(number))))
        if labels[number] is not None:
            text = f'{{"label": {number}}}' if as_json else f"{number}"
            members.append((f"{stem}.{'json' if as_json else 'cls'}", text.encode()))
    choose.shuffle(members)
    with tempfile.TemporaryDirectory() as folder:
        pictures = opened(write_tar(Path(folder) / "a.tar", dict(members)))
        check(pictures, labels)
        if unlabelled == 0:  # every picture has a label of its very name
            assert pictures.has_labels and pictures.count == len(stems)


NAMES = st.text(st.characters(blacklist_characters="/\\\0", blacklist_categories=["Cc", "Cs"]), min_size=1, max_size=20)


def is_class(name: str) -> bool:
    """Whether a folder of this name is a class: no hidden one, and no split, which is refused in its own test."""
    return is_data(name) and not any(split in name.lower() for split in SPLITS)


@given(
    names=st.lists(NAMES.filter(is_class), min_size=1, max_size=6, unique=True),
    files=st.lists(NAMES, min_size=1, max_size=3, unique=True),
)
@settings(max_examples=30, deadline=None)
def test_folders_of_any_names(names, files):
    root = Path(tempfile.mkdtemp())
    try:
        rows = [(name, file) for name in names for file in files]
        for number, (name, file) in enumerate(rows):
            (root / "data" / name).mkdir(parents=True, exist_ok=True)
            picture(number).save(root / "data" / name / f"x{file}.png")
        pictures = opened(root / "data")
        found = dict(zip(numbers_of(pictures), [sample.label for sample in pictures], strict=True))
        assert pictures.class_names is not None
        assert {number: pictures.class_names[label or 0] for number, label in found.items()} == {
            number: printable(name) for number, (name, _) in enumerate(rows)
        }
    finally:
        shutil.rmtree(root)


@given(
    files=st.lists(NAMES.filter(lambda name: name == name.strip()), min_size=1, max_size=6, unique=True),
    words=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_metadata_of_any_names(files, words, seed):
    root = Path(tempfile.mkdtemp())
    try:
        numbers = list(range(len(files)))
        for number, file in enumerate(files):
            picture(number).save(root / f"x{file}.png")
        random.Random(seed).shuffle(numbers)
        with open(root / "metadata.csv", "w", encoding="utf-8", newline="") as table:
            rows = [[f"x{files[number]}.png", f"class {number}" if words else number] for number in numbers]
            csv.writer(table).writerows([["file_name", "label"], *rows])
        pictures = opened(root)
        assert pictures.has_labels and pictures.labels_from == "metadata.csv"
        check(pictures, dict(enumerate(range(len(files)))))
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize(
    ("members", "labels", "said"),
    [
        (["0.png", "1.png", "1.x", "2.png", "2.x"], None, "no label in .* for 1 of 3 pictures, the first is a.tar:0"),
        (["0.png", "1.png", "2.png", "2.x", "0.x", "1.x"], [0, 1, 2], None),
        (["v0.5.png", "v0.5.x", "v0.7.png", "v0.7.x"], [5, 7], None),
        (["v0.7.x", "v0.5.x", "v0.5.png", "v0.7.png"], [5, 7], None),
        (["v0.5.png", "v0.7.png"], [None, None], None),
        (["v0.5.png", "v0.7.png", "v0.5.x"], None, "no label in .* for 1 of 2 pictures, the first is a.tar:v0.7"),
        (["run.final.png", "run.final.x", "run.copy.png", "run.copy.x"], [0, 0], None),
        (["run.final.png", "run.copy.png"], [None], "1 picture left out, such as run.copy.png"),
        (["v0.5.png", "v0.png", "v0.x"], [0], "1 picture left out, such as v0.5.png"),
        (["a1.rgb.png", "a1.x", "a2.rgb.png", "a2.x"], [1, 2], None),
        (["./a1.png", "./a1.x", "b/a2.png", "b/a2.x"], [1, 2], None),
        (["__MACOSX/._a1.png", "@eaDir/a2.png", "a3.png", "a3.x", "b/.hidden/a4.png"], [3], None),
        (["a1.png", "b2.png", "c3.x"], None, None),
    ],
)
def test_names_of_samples_in_shards(members, labels, said, suffix, tmp_path):
    """Labels were lost where a first picture had none, where they came after all, and where names hold dots."""
    held: dict[str, bytes] = {}
    for place, name in enumerate(members):
        number = name.rpartition(".")[0][-1]
        number = number if number.isdigit() else "0"
        label = number if suffix == "cls" else f'{{"label": {number}}}'
        held[name.replace(".x", f".{suffix}")] = label.encode() if name.endswith(".x") else encoded(picture(place))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pictures = open_pictures(write_tar(tmp_path / "a.tar", held))
    found = [sample.label for sample in pictures]
    assert found == labels if labels is not None else set(found) == {None}
    if labels is None and said is None:
        said = r"1 label file of .*a.tar without a picture .*, such as a.tar:c3.cls" if suffix == "cls" else None
    assert len(caught) == (said is not None)
    if said is not None:
        with pytest.warns(UserWarning, match=said.replace(".x", f".{suffix}")):
            open_pictures(tmp_path / "a.tar")


def test_two_files_of_one_name_in_a_shard_are_refused(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = len(encoded(picture(number)))
            tar.addfile(info, io.BytesIO(encoded(picture(number))))
    with pytest.raises(Exception, match=r"the shard .*a.tar holds 'a.png' twice; names must differ"):
        open_pictures(tmp_path / "a.tar")


def test_labels_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(Exception, match=r"a.cls is no UTF-8 text"):
        open_pictures(write_tar(tmp_path / "a.tar", {"a.png": encoded(picture(0)), "a.cls": b"\xff\xfe"}))
    marked = {"a.png": encoded(picture(0)), "a.cls": b"\xef\xbb\xbf7\r\n"}
    assert [sample.label for sample in open_pictures(write_tar(tmp_path / "b.tar", marked))] == [7]


def test_folders_in_shards_are_no_classes_and_it_is_said(tmp_path):
    members = {"cat/1.png": encoded(picture(0)), "dog/1.png": encoded(picture(1))}
    with pytest.warns(UserWarning, match="the folders in .*a.tar are not taken for classes; unpack it"):
        assert not open_pictures(write_tar(tmp_path / "a.tar", members)).has_labels


def test_what_systems_leave_behind_is_no_data(tmp_path):
    """__MACOSX became class 0, and the thumbnails in @eaDir were read as pictures."""
    fill(tmp_path, {"ant/1.png": 0, "bee/2.png": 1})
    left = ["__MACOSX/ant/._1.png", "ant/@eaDir/1.png", "@eaDir/x/SYNOPHOTO_THUMB_M.jpg", ".ipynb_checkpoints/1.png"]
    left += ["bee/._2.png", ".Trash-1000/files/3.png", "bee/.hidden/4.png", "lost+found/5.png", "$RECYCLE.BIN/6.png"]
    left += ["System Volume Information/7.png", "#recycle/8.png", "ant/__pycache__/9.png"]
    fill(tmp_path, dict.fromkeys(left, 9))
    for name in (".DS_Store", "ant/.DS_Store", "ant/Thumbs.db", "thumbs.db", "Desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = open_pictures(tmp_path)
    assert pictures.class_names == ("ant", "bee")
    assert [(sample.key, sample.label) for sample in pictures] == [("ant/1.png", 0), ("bee/2.png", 1)]
    shutil.rmtree(tmp_path / "ant")
    shutil.rmtree(tmp_path / "bee")
    with pytest.raises(Exception, match="is empty"):
        open_pictures(tmp_path)

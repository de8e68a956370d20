"""Pictures in parquet files."""

import pytest

from comcat.data import open_pictures
from comcat.errors import DataError

from .material import cells, encoded, fill, numbers_of, picture, write_parquet, write_tar


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
    with pytest.warns(UserWarning, match=r"a.parquet:1 has the label 2; expected one below 2.*labels were left out"):
        assert not open_pictures(write_parquet(tmp_path / "a.parquet", columns, metadata=features)).has_labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0, 2.0], "a.parquet:0 has the label 0.5; expected a whole number"),
        ([0, 1, 2**40], "a.parquet:2 has the label 1099511627776; expected a whole number"),
        ([0.0, float("nan"), 1.0], "no label in the column 'label' for 1 of 3 pictures, the first is a.parquet:1"),
        ([0, 1, -1], "for 1 of 3 pictures, the first is a.parquet:2"),
        ([0, None, None], "for 2 of 3 pictures, the first is a.parquet:1"),
        ([[0], [1], [2]], r"a.parquet:0 has the label \[0\]; expected a whole number"),
    ],
)
def test_labels_are_whole_or_left_out_with_the_reason(labels, message, tmp_path):
    """Calibration needs no labels, so wrong ones stop nothing; what is measured on them would be wrong."""
    with pytest.warns(UserWarning, match=message) as caught:
        pictures = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(3), "label": labels}))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not pictures.has_labels and [sample.label for sample in pictures] == [None] * 3


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
    with pytest.raises(DataError, match=r"1 of the first 1 picture .* of 2 may be"):
        list(few)
    write_parquet(tmp_path / "hub" / "train.parquet", {"image": [{"bytes": b"x", "path": None}, *cells(1)]})
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"1 of the first 2 pictures .* of all may be"):
        list(open_pictures(f"hf:{tmp_path}/hub"))


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

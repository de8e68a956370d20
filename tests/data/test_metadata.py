"""Labels in metadata files beside pictures, as `datasets` reads them."""

import warnings

import pytest

from comcat.data import open_pictures
from comcat.errors import DataError

from .material import fill, numbers_of, picture, write_parquet


def labels_of(pictures):
    return {sample.key: sample.label for sample in pictures}


def test_labels_are_those_that_datasets_reads(tmp_path):
    """Labels in metadata.csv were ignored."""
    import datasets

    datasets.disable_progress_bars()
    fill(tmp_path, {"a.png": 0, "sub/b.png": 1, "c.jpg": 2})
    (tmp_path / "metadata.csv").write_text("file_name,label,text\nc.jpg,2,x\na.png,0,y\nsub/b.png,1,z\n")
    pictures = open_pictures(tmp_path)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    expected = {picture(number).size: None for number in range(3)} and {0: 0, 1: 1, 2: 2}
    assert dict(zip(theirs["label"], theirs["label"], strict=True)) == expected
    assert labels_of(pictures) == {"a.png": 0, "c.jpg": 2, "sub/b.png": 1}
    assert pictures.labels_from == "metadata.csv" and pictures.class_names is None


def test_metadata_goes_before_class_folders_and_captions_do_not(tmp_path):
    fill(tmp_path, {"x/a.png": 0, "y/b.png": 1})
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "x/a.png", "text": "a"}\n{"file_name": "y/b.png", "text": "b"}\n'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_pictures(tmp_path).class_names == ("x", "y")
        (tmp_path / "x" / "metadata.csv").write_text("file_name,label\na.png,dog\n")
        (tmp_path / "y" / "metadata.csv").write_text("file_name,label\n./b.png,cat\n")
        pictures = open_pictures(tmp_path)
    assert labels_of(pictures) == {"x/a.png": 1, "y/b.png": 0} and pictures.class_names == ("cat", "dog")
    assert pictures.labels_from == "x/metadata.csv and y/metadata.csv"


def test_a_split_of_its_own_may_lie_in_a_sub_folder(tmp_path):
    fill(tmp_path, {"train/a.png": 0, "train/b.png": 1})
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/a.png,1\ntrain/b.png,0\n")
    assert labels_of(open_pictures(tmp_path)) == {"train/a.png": 1, "train/b.png": 0}
    fill(tmp_path, {"test/c.png": 2})
    with pytest.raises(DataError, match=r"splits, not classes \(test, train\)"):
        open_pictures(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message", "labels"),
    [
        (
            "metadata.csv",
            "file_name,label\na.png,1\nb.png,0\nc.png,1\nd.png,1\n",
            "names 2 pictures that are not there, such as 'c.png'",
            [1, 0],
        ),
        (
            "metadata.csv",
            "file_name,label\na.png,1\n",
            r"no label in metadata.csv for 1 of 2 pictures, the first is b.png",
            None,
        ),
        ("metadata.csv", "file_name,label\na.png,1\nb.png,0\na.png,1\n", None, [1, 0]),
        (
            "metadata.csv",
            "file_name,label\na.png,1\nb.png,0\na.png,0\n",
            "1 picture another label than before, such as a.png",
            None,
        ),
        ("metadata.csv", "\ufefffile_name, label\r\na.png, cat\r\nb.png, ant\r\n", None, [1, 0]),
        (
            "metadata.csv",
            "file_name;label\na.png;1\nb.png;0\n",
            "no column 'file_name'; its columns: 'file_name;label'",
            None,
        ),
        ("metadata.csv", "file_name,Label\na.png,1\nb.png,0\n", "has no column 'label', and 'Label' is not read", None),
        ("metadata.csv", "file_name,class\na.png,1\nb.png,0\n", "has no column 'label', and 'class' is not read", None),
        ("metadata.csv", "file_name,label\n..\\a.png,1\n/b.png,0\n", "names 2 pictures that are not there", None),
        ("metadata.csv", 'file_name,label\n"a.png,1\nb.png,0\n', "names 1 picture that is not there", None),
        ("metadata.csv", "", "no column 'file_name'; its columns: none", None),
        ("metadata.csv", "file_name,label\n", None, None),
        ("metadata.csv", "file_name,label\na.png,\nb.png,\n", None, None),
        ("metadata.csv", "file_name,label\na.png\nb.png,1,2,3\n", "for 1 of 2 pictures, the first is a.png", None),
        ("metadata.csv", "file_name,label\na.png,-1\nb.png,-1\n", None, None),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": 0}', None, [1, 0]),
        ("metadata.jsonl", '{"file_name": "a.png", "label": "x"}\n{"file_name": "b.png", "label": 3}', None, [1, 0]),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": [1]}\n{"file_name": "b.png", "label": [0]}',
            r"a.png has the label \[1\]",
            None,
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": 1}\n{"file_name": ',
            "cannot be read.*line 2 is no JSON",
            None,
        ),
        ("metadata.jsonl", '["a.png", 1]', "cannot be read.*line 1 is no JSON object", None),
        ("metadata.jsonl", '{"file_name": 3, "label": 1}', "names 1 picture that is not there, such as 3", None),
    ],
)
def test_right_labels_or_none_and_the_reason(file, text, message, labels, tmp_path):
    fill(tmp_path, {"a.png": 0, "b.png": 1})
    (tmp_path / file).write_bytes(text.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pictures = open_pictures(tmp_path)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if message is None:
        assert said == []
    else:
        with pytest.warns(UserWarning, match=message):
            open_pictures(tmp_path)
    assert list(labels_of(pictures).values()) == (labels or [None, None]) and numbers_of(pictures) == [0, 1]


@pytest.mark.parametrize(
    "damaged", [b"file_name,label\nb\xe4r.png,1\n", b"\xff\xfe\x00", b"file_name,label\n" + b'"' + b"x" * 200_000]
)
def test_damaged_metadata_counts_as_not_there(damaged, tmp_path):
    fill(tmp_path, {"x/a.png": 0, "y/b.png": 1})
    (tmp_path / "metadata.csv").write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"metadata.csv cannot be read, so its labels are not known"):
        assert open_pictures(tmp_path).class_names == ("x", "y")


def test_metadata_in_parquet_beside_pictures_and_alone(tmp_path):
    fill(tmp_path, {"a.png": 0})
    write_parquet(tmp_path / "metadata.parquet", {"file_name": ["a.png"], "label": [3]})
    assert labels_of(open_pictures(tmp_path)) == {"a.png": 3}
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"no pictures in the folder .* found 'metadata.parquet'"):
        open_pictures(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"metadata.parquet cannot be read"):
        open_pictures(tmp_path)


def test_windows_paths_are_found_and_files_with_backslashes_too(tmp_path):
    fill(tmp_path, {"sub/a.png": 0, "sub\\b.png": 1})
    (tmp_path / "metadata.csv").write_text("file_name,label\nsub\\a.png,7\nsub\\b.png,5\n")
    assert labels_of(open_pictures(tmp_path)) == {"sub/a.png": 7, "sub\\b.png": 5}

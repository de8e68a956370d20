"""What a folder of a stranger's may hold: right results, or errors that say what is wrong."""

import os
import subprocess
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from comcat.data import batches, open_pictures
from comcat.errors import DataError

from .material import RGB8, cells, encoded, fill, numbers_of, picture, write_parquet, write_tar


def quietly(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_pictures(source, **options)


def test_pictures_of_every_kind_are_read(tmp_path):
    """Of animations and of files with many pages, the first picture."""
    frames = [picture(number).quantize(255) for number in (1, 2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        picture(1).save(tmp_path / f"a.{suffix}", save_all=True, append_images=[picture(2)], **options)
    picture(1).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    picture(1).quantize(255).save(tmp_path / "palette.png")
    Image.fromarray(np.full((3, 3), 65535, np.uint16)).save(tmp_path / "white.png")
    found = {sample.key: sample.image for sample in open_pictures(tmp_path)}
    assert {image.mode for key, image in found.items() if key != "white.png"} == {"RGB"}
    assert found["white.png"].mode == "L" and found["white.png"].getextrema() == (255, 255)
    wanted = np.asarray(picture(1)).astype(int)
    for key in ("a.png", "a.webp", "a.tif"):
        assert (np.asarray(found[key]) == wanted).all()
    for key in ("a.gif", "cmyk.jpg", "palette.png"):
        assert np.abs(np.asarray(found[key]) - wanted).mean() < 12
    assert sum(len(images) for images, _ in batches(open_pictures(tmp_path), RGB8)) == 7


def test_pipes_are_not_waited_for(tmp_path):
    """Reading one that nobody writes to never ended."""
    fill(tmp_path, {"a/1.png": 1, "b/2.png": 2})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    pictures = open_pictures(tmp_path, max_unreadable=0.5)
    with pytest.warns(UserWarning, match=r"a/pipe.png of .* cannot be read .*it is no regular file"):
        assert numbers_of(pictures) == [1, 2]
    for name in ("pipe.parquet", "pipe.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name} is no regular file"):
            open_pictures(tmp_path / name)


def test_links_and_loops(tmp_path):
    """A link up to the root gave the pictures of all classes the label of the class that it lay in."""
    fill(tmp_path, {"a/1.png": 1, "b/2.png": 2, "elsewhere/x/3.png": 3})
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "a").rename(root / "a")
    (tmp_path / "b").rename(root / "b")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "down").symlink_to(root / "b")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    pictures = quietly(root, max_unreadable=0.5)
    with pytest.warns(UserWarning, match="cannot be read"):
        found = dict(zip(numbers_of(pictures), [sample.label for sample in pictures], strict=True))
    assert found == {1: 0, 2: 1, 3: 2}
    assert [line.partition(":")[0] for line in pictures.skipped] == ["a/self.png", "b/gone.png"]


def test_folders_nested_deeper_than_python_recurses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        for _ in range(1100):  # a path may be 4,096 bytes long
            os.mkdir("d")
            os.chdir("d")
        picture(3).save("3.png")
        os.chdir(tmp_path)
        assert numbers_of(quietly(tmp_path)) == [3]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own way of removing folders recurses


def test_names_that_are_no_utf8(tmp_path):
    """Their bytes reached what is printed and written, which raised there."""
    root = os.fsencode(tmp_path) + b"/ro\xf6t"
    for number, name in enumerate((b"caf\xe9", "café".encode())):
        os.makedirs(root + b"/" + name)
        with open(root + b"/" + name + b"/\xff.png", "wb") as file:
            file.write(encoded(picture(number)))
    with open(root + b"/caf\xe9/\xfe.png", "wb") as file:
        file.write(b"no picture")
    pictures = open_pictures(os.fsdecode(root), max_unreadable=0.5)
    assert pictures.class_names == ("café", "caf\\xe9") and pictures.name.endswith("ro\\xf6t")
    with pytest.warns(UserWarning, match=r"cannot be read") as caught:
        assert numbers_of(pictures) == [1, 0]
    said = [*pictures.class_names, pictures.name, *pictures.skipped, *(str(w.message) for w in caught)]
    assert "".join(said).encode("utf-8")  # no half of a surrogate pair
    assert pictures.take(1, 0).count == 1


def test_long_names(tmp_path):
    fill(tmp_path, {f"{'n' * 255}/{'f' * 251}.png": 1, "m/2.png": 2})
    assert numbers_of(open_pictures(tmp_path)) == [2, 1]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("data", [b"", b"x", b"PAR1" * 9, b"\0" * 2000])
def test_empty_and_foreign_files_are_named(kind, data, tmp_path):
    (tmp_path / f"a.{kind}").write_bytes(data)
    for source in (tmp_path, tmp_path / f"a.{kind}"):
        with pytest.raises(DataError, match=rf"a.{kind} cannot be read|no pictures in .*found none") as caught:
            open_pictures(source)
        assert "\n" not in str(caught.value)


def test_classes_that_differ_in_case_alone(tmp_path):
    pictures = open_pictures(fill(tmp_path, {"cat/0.png": 0, "Cat/1.png": 1, "CAT/2.png": 2}))
    assert pictures.class_names == ("CAT", "Cat", "cat") and [s.label for s in pictures] == [0, 1, 2]


def test_classes_a_level_deeper_are_said(tmp_path):
    fill(tmp_path, {"data/cat/0.png": 0, "data/dog/1.png": 1})
    with pytest.warns(
        UserWarning, match=r"its sub-folders \(data\), but their pictures lie deeper \(data/cat, data/dog\)"
    ):
        assert open_pictures(tmp_path).class_names == ("data",)
    fill(tmp_path / "tiny", {"cat/images/0.png": 0, "dog/images/1.png": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_pictures(tmp_path / "tiny").class_names == ("cat", "dog")


def test_splits_by_other_names_are_no_classes(tmp_path):
    """COCO's train2017 and val2017, beside a folder without pictures, became three classes."""
    fill(tmp_path, {"train2017/a/0.png": 0, "val2017/a/1.png": 1})
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match=r"splits, not classes \(train2017, val2017\); open one of them"):
        open_pictures(tmp_path)
    vehicles = fill(tmp_path / "vehicles", {"train/0.png": 0, "car/1.png": 1, "trainer/2.png": 2})
    assert open_pictures(vehicles).class_names == ("car", "train", "trainer")


def test_what_lies_beside_data_files_is_said(tmp_path):
    """An archive beside the folders that were unpacked from it was read in their stead, and gave no labels."""
    fill(tmp_path, {"cat/0.png": 0, "dog/1.png": 1})
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "cat", arcname="cat")
    with pytest.warns(
        UserWarning, match=r"read as 1 file such as all.tar; pictures and folders beside, such as cat, are not"
    ):
        assert open_pictures(tmp_path).count == 1
    write_parquet(tmp_path / "rows" / "._a.parquet", {"image": cells(1)})
    (tmp_path / "rows" / "._a.parquet").write_bytes(b"Mac OS X")
    write_parquet(tmp_path / "rows" / "a.parquet", {"image": cells(2)})
    assert open_pictures(tmp_path / "rows").count == 2
    assert open_pictures(fill(tmp_path / "x", {"d.tar/0.png": 0, "e.parquet/1.png": 1})).class_names == (
        "d.tar",
        "e.parquet",
    )


def test_a_folder_called_digits_is_not_forgotten(tmp_path, monkeypatch):
    fill(tmp_path, {"digits/a/0.png": 0})
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="'digits' is the built-in data set; for what lies here write ./digits"):
        assert open_pictures("digits").count == 1797
    assert open_pictures("./digits").count == 1


def test_columns_of_nearly_the_right_name_are_said(tmp_path):
    with pytest.warns(UserWarning, match="has no column 'label', and 'fine_label' is not read: no labels"):
        open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(1), "fine_label": [1]}))


def test_counts_and_nouns_agree(tmp_path):
    """One picture was "1 pictures"."""
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of the first 1 picture of"):
        list(open_pictures(tmp_path))
    with pytest.warns(UserWarning, match="because of 1 picture directly in"):
        open_pictures(fill(tmp_path / "b", {"1.png": 1, "c/2.png": 2}))
    with pytest.warns(UserWarning, match=r"1 picture left out, such as a.y.png"):
        open_pictures(write_tar(tmp_path / "c.tar", {"a.x.png": encoded(picture(0)), "a.y.png": encoded(picture(1))}))

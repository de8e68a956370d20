"""Pictures in tar shards."""

import gzip

import pytest

from comcat.data import batches, open_pictures
from comcat.errors import DataError

from .material import RGB8, encoded, numbers_of, picture, write_tar


def test_shards_are_read_as_webdataset_reads_them(tmp_path):
    import webdataset as wds

    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"x-{shard:03}.tar")) as writer:
            for number in range(3):
                index = 3 * shard + number
                writer.write(
                    {
                        "__key__": f"dir/{index:04}",
                        "png": encoded(picture(index)),
                        "cls": str(index % 4),
                        "txt": "caption",
                    }
                )
    theirs = wds.WebDataset([str(tmp_path / f"x-{shard:03}.tar") for shard in range(2)], shardshuffle=False)
    expected = [(sample["__key__"], int(sample["cls"])) for sample in theirs]
    for source in (tmp_path, f"{tmp_path}/x-{{000..001}}.tar"):
        pictures = open_pictures(source)
        assert pictures.has_labels and pictures.class_names is None and pictures.count == 6
        assert [(sample.key.partition(":")[2], sample.label) for sample in pictures] == expected
        assert numbers_of(pictures) == list(range(6))
    assert [sample.key for sample in pictures][-1] == "x-001.tar:dir/0005"
    assert len(batches(pictures, RGB8, batch_size=4)) == 2 and len(pictures.take(4, seed=0)) == 4
    assert numbers_of(open_pictures(tmp_path / "x-001.tar")) == [3, 4, 5]


def test_shard_labels_in_words_json_or_not_at_all(tmp_path):
    data = [encoded(picture(number)) for number in range(3)]
    words = {"a.png": data[0], "a.cls": b"dog\n", "b.PNG": data[1], "b.cls": b"ant", "c.png": data[2], "c.cls": b"dog"}
    pictures = open_pictures(write_tar(tmp_path / "words.tar", words))
    assert pictures.class_names == ("ant", "dog") and [sample.label for sample in pictures] == [1, 0, 1]
    values = {"a.json": b'{"label": 2}', "a.png": data[0], "b.json": b'{"label": 0, "x": 1}', "b.rgb.png": data[1]}
    pictures = open_pictures(write_tar(tmp_path / "json.tar", values))
    assert [sample.label for sample in pictures] == [2, 0] and numbers_of(pictures) == [0, 1]
    for more in ({}, {"a.cls": b"-1", "b.cls": b"-1"}, {"a.cls": b"", "b.cls": b""}, {"a.json": b"[]"}):
        bare = {"._a.png": b"x", "a.png": data[0], "b.png": data[1]} | more
        ordered = dict(sorted(bare.items()))
        pictures = open_pictures(write_tar(tmp_path / "bare.tar", ordered))
        assert not pictures.has_labels and numbers_of(pictures) == [0, 1]
    two = {"a.input.png": data[2], "a.mask.png": data[0], "b.png": data[1]}
    with pytest.warns(UserWarning, match=r"several pictures, of which one is used: 1 picture left out, such as a.mask"):
        assert numbers_of(open_pictures(write_tar(tmp_path / "two.tar", two))) == [2, 1]
    mixed = {"a.png": data[0], "a.cls": b"1", "b.png": data[1]}
    with pytest.warns(UserWarning, match=r"no label in .cls files for 1 of 2 pictures, the first is mixed.tar:b"):
        assert not open_pictures(write_tar(tmp_path / "mixed.tar", mixed)).has_labels
    broken = {"a.png": data[0], "a.json": b'{"label": '}
    with pytest.raises(DataError, match=r"broken.tar:a.json is no JSON"):
        open_pictures(write_tar(tmp_path / "broken.tar", broken))
    fraction = {"a.png": data[0], "a.json": b'{"label": 0.5}'}
    with pytest.warns(UserWarning, match=r"fraction.tar:a has the label 0.5"):
        assert not open_pictures(write_tar(tmp_path / "fraction.tar", fraction)).has_labels


def test_a_shard_that_is_not_read_to_its_end_is_refused(tmp_path):
    files = {f"{number}.bmp": encoded(picture(number), "BMP") for number in range(4)}
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    starts = [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]
    headless = whole[: starts[2]] + bytes([255]) * 512 + whole[starts[2] + 512 :]
    for name, content in {"in_header": whole[: starts[2] + 100], "damaged": headless}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.tar cannot be read to its end: it is cut off or damaged"):
            open_pictures(tmp_path / f"{name}.tar")
    (tmp_path / "two.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"two.tar cannot be read to its end: another follows behind its end"):
        open_pictures(tmp_path / "two.tar")
    (tmp_path / "endless.tar").write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    (tmp_path / "zipped.tar.gz").write_bytes(gzip.compress(whole))
    for name in ("endless.tar", "zipped.tar.gz", "whole.tar"):
        assert len(list(open_pictures(tmp_path / name))) == 4


def test_bad_shards_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no pictures in .*a.tar.*found 'x.txt'"):
        open_pictures(write_tar(tmp_path / "a.tar", {"x.txt": b"1"}))
    with pytest.raises(DataError, match="found none"):
        open_pictures(write_tar(tmp_path / "b.tar", {}))
    (tmp_path / "c.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(DataError, match=r"the shard .*c.tar cannot be read"):
        open_pictures(tmp_path / "c.tar")
    whole = write_tar(tmp_path / "d.tar", {f"{number}.bmp": encoded(picture(number), "BMP") for number in range(4)})
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"the shard .*d.tar cannot be read"):
        list(open_pictures(whole))
    (tmp_path / "both").mkdir()
    for name in ("train.tar", "test.tar"):
        write_tar(tmp_path / "both" / name, {"a.png": encoded(picture(0))})
    with pytest.raises(DataError, match="several splits"):
        open_pictures(tmp_path / "both")

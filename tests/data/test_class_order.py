"""In which order classes are numbered, what is said of it, and how to choose."""

import warnings

import pytest

from comcat.data import open_pictures
from comcat.data.labels import class_names_of, in_natural_order
from comcat.errors import DataError, SettingsError

from .material import cells, fill, write_parquet


def folder(path, *names):
    return fill(path, {f"{name}/x.png": number for number, name in enumerate(names)})


def test_natural_order_is_timms():
    from timm.data.readers.reader_image_folder import find_images_and_targets  # noqa: F401  the same key as its reader
    from timm.utils.misc import natural_key

    names = ["10", "9", "a10b2", "a2", "A3", "z", "Zebra", "ant", "v0.10", "v0.9", "2x", "-1", "_", "é"]
    assert list(in_natural_order(names)) == sorted(names, key=natural_key)
    assert in_natural_order({"a", "A", "01", "1", "001"}) == (
        "001",
        "01",
        "1",
        "A",
        "a",
    )  # ties by text, whatever the set's order


def test_folders_are_numbered_as_timm_numbers_them(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    folder(tmp_path, *map(str, range(12)), "b10", "b9", "Alpha")
    with pytest.warns(UserWarning, match="natural order"):
        pictures = open_pictures(tmp_path)
    _, places = find_images_and_targets(str(tmp_path))
    assert {name: place for place, name in enumerate(pictures.class_names)} == places
    assert pictures.class_names[:12] == tuple(map(str, range(12)))


@pytest.mark.parametrize("as_option", [False, True])
def test_another_order_can_be_chosen(as_option, tmp_path):
    """Where torchvision's order differs it is said which was used, and how to choose."""
    from torchvision.datasets import ImageFolder

    folder(tmp_path, "0", "2", "10")
    said = (
        rf"the classes of {tmp_path} are numbered in natural order, as timm does: '2' is 1; in the order of text, as "
        rf"torchvision does, '10' is\. Write {tmp_path}:class_order=text for that, or class_order=natural to say"
    )
    with pytest.warns(UserWarning, match=said):
        pictures = open_pictures(tmp_path)
    assert pictures.class_names == ("0", "2", "10")

    def opened(order):
        return (
            open_pictures(tmp_path, class_order=order)
            if as_option
            else open_pictures(f"{tmp_path}:class_order={order}")
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = {order: opened(order) for order in ("natural", "text", "number")}
    assert {s.key: s.label for s in chosen["natural"]} == {"0/x.png": 0, "2/x.png": 1, "10/x.png": 2}
    assert {s.key: s.label for s in chosen["text"]} == {"0/x.png": 0, "2/x.png": 2, "10/x.png": 1}
    assert chosen["text"].class_names == tuple(ImageFolder(tmp_path).classes)
    assert {s.key: s.label for s in chosen["number"]} == {"0/x.png": 0, "2/x.png": 2, "10/x.png": 10}
    assert chosen["number"].class_names is None and chosen["number"].largest_label == 10
    assert {s.label for s in chosen["number"].split(0.5, 0)[0]} <= {0, 2, 10}
    with pytest.raises(SettingsError, match=r"class_order='txt', expected one of natural, .*did you mean 'text'"):
        opened("txt")


def test_orders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="has the class 'a', which is no whole number"):
        open_pictures(f"{folder(tmp_path / 'a', 'a', '1')}:class_order=number")
    with pytest.raises(DataError, match="several classes that spell 1"):
        open_pictures(folder(tmp_path / "b", "01", "1"), class_order="number")
    with pytest.raises(SettingsError, match="expected one order of classes"):
        open_pictures(f"{tmp_path}/a:class_order=text", class_order="number")
    real = folder(tmp_path / "c:class_order=text", "10", "9")
    assert open_pictures(str(real), class_order="text").class_names == ("10", "9")  # a folder that is called so
    assert open_pictures("digits:test:class_order=text").class_names == tuple("0123456789")


def test_nothing_is_said_where_orders_agree(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_pictures(folder(tmp_path / "a", "00", "01", "02", "10"))
        open_pictures(folder(tmp_path / "b", *map(str, range(10))))
        columns = {"image": cells(12), "label": [str(number) for number in range(12)]}
        open_pictures(write_parquet(tmp_path / "a.parquet", columns))


def test_lists_of_numbers_in_another_order(tmp_path):
    """``datasets`` lists class folders in the order of text: its 1 is the class "10"."""

    def saved(file, names):
        kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        columns = {"image": cells(len(names)), "label": list(range(len(names)))}
        return write_parquet(tmp_path / file, columns, metadata=kinds)

    text = sorted(map(str, range(12)))
    with pytest.warns(UserWarning, match=r"in the order of text \('10' as 2\); here the numbers are the labels"):
        pictures = open_pictures(saved("a.parquet", text))
    assert [s.label for s in pictures] == [int(name) for name in text]
    kept = open_pictures(tmp_path / "a.parquet", class_order="text")
    assert [s.label for s in kept] == list(range(12)) and kept.class_names == tuple(text)
    with pytest.warns(UserWarning, match=r"its own order of them: '1' has the label 0. Write .*class_order=number"):
        odd = open_pictures(saved("b.parquet", ["1", "0", "2"]))
    assert [s.label for s in odd] == [0, 1, 2]
    assert [s.label for s in open_pictures(tmp_path / "b.parquet", class_order="number")] == [1, 0, 2]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "2"], None),
        (["2.0", "0.0", "1.0"], None),  # as pandas writes whole numbers of a column with gaps
        (["1", "01", "2"], ("01", "1", "2")),  # two classes, which numbers would merge
        (["1_0", "10", "2"], ("1_0", "2", "10")),  # Python reads an underscore in a number
        (["٣", "3", "x"], ("3", "x", "٣")),
        (["cat", "10", "9"], ("9", "10", "cat")),
    ],
)
def test_words_and_numbers(labels, names, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(3), "label": labels}))
    assert pictures.class_names == names == class_names_of(labels)
    expected = [int(float(label)) for label in labels] if names is None else [names.index(label) for label in labels]
    assert [sample.label for sample in pictures] == expected


def test_files_that_list_classes_differently_do_not_go_together(tmp_path):
    for file, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        write_parquet(tmp_path / f"{file}.parquet", {"image": cells(2), "label": [0, 1]}, metadata=kinds)
    with pytest.raises(DataError, match=r"b.parquet names other classes than .*a.parquet, or in another order"):
        open_pictures(tmp_path)

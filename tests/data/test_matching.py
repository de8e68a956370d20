"""Pictures in two sets, and labels in terms of a model's classes."""

import pytest
from PIL import Image

from comcat.data import open_pictures, overlap
from comcat.errors import DataError
from comcat.models import in_classes_of

from .material import cells, fill, picture, write_parquet


def test_overlap_finds_the_same_pixels_in_other_files(tmp_path):
    one = fill(tmp_path / "one", {f"{number}.png": number for number in range(6)})
    two = fill(tmp_path / "two", {f"x{number}.bmp": number for number in range(4, 9)})
    picture(4).save(two / "copy.png")
    assert overlap(open_pictures(one), open_pictures(two)) == 2
    assert len(open_pictures(two).fingerprint()) == 5
    assert len(open_pictures(one).fingerprint(limit=3)) == 3
    assert open_pictures(one).fingerprint(limit=3) < open_pictures(one).fingerprint()
    turned = fill(tmp_path / "turned", {"a.png": 4})
    picture(4).transpose(Image.Transpose.ROTATE_90).save(turned / "a.png")
    assert overlap(open_pictures(one), open_pictures(turned)) == 0


def _classes(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    return open_pictures(folder)


def test_labels_in_terms_of_other_names(tmp_path):
    pictures = _classes(tmp_path, "ship", "truck")
    known = ("car", "ship", "tree", "truck")
    named = pictures.in_terms_of(known)
    assert [s.label for s in pictures] == [0, 1] and [s.label for s in named] == [1, 3]
    assert named.class_names == known and sorted(s.label for s in named.take(2, 0)) == [1, 3]  # parts of it as well
    assert [s.label for s in named.in_terms_of(("truck", "tree", "ship", "car"))] == [2, 0]  # and of others again
    bare = named.without_labels()
    assert [s.label for s in bare] == [None, None] and not bare.has_labels and bare.class_names is None
    assert not bare.split(0.5, 0)[0].has_labels
    with pytest.raises(DataError, match="no class is called 'truck'; did you mean 'trucks'"):
        pictures.in_terms_of(("ship", "trucks"))
    with pytest.raises(DataError, match="two classes are called 'truck'"):
        pictures.in_terms_of(("ship", "truck", "truck"))
    numbers = open_pictures(write_parquet(tmp_path / "a.parquet", {"image": cells(2), "label": [1, 0]}))
    with pytest.raises(DataError, match="its labels are numbers without names"):  # all labels were lost
        numbers.in_terms_of(known)
    with pytest.raises(DataError, match="got places for 1 class, expected one for each of its own"):
        pictures.relabelled([3], None, "by hand")


def _model(count: int, names: list[str] | None = None):
    import timm

    model = timm.create_model("test_vit", num_classes=count)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    return model


def test_classes_are_matched_by_name(tmp_path):
    model = _model(4, ["car", "cargo ship", "truck", "T-shirt/top"])
    for names, labels in (
        (["cargo ship", "truck"], [1, 2]),
        (["Cargo_Ship", "TRUCK"], [1, 2]),
        (["cargo-ship", "T-shirt_top", "car"], [0, 1, 3]),  # no file system takes the slash
    ):
        named, note = in_classes_of(model, _classes(tmp_path / names[0], *names))
        assert (sorted(s.label for s in named), note) == (labels, None)
        assert named.labels_from == "class folders, matched by name" and len(named.class_names) == 4


def test_strange_classes_leave_labels_out(tmp_path):
    model = _model(3, ["car", "ship", "truck"])
    strange, note = in_classes_of(model, _classes(tmp_path / "b", "ship", "sloop"))
    assert not strange.has_labels and "has 2 classes, but the model has none called 'sloop'" in note
    several, note = in_classes_of(model, _classes(tmp_path / "c", "Ship", "ship"))
    assert not several.has_labels and "several classes that may be the model's 'ship'" in note
    many, note = in_classes_of(model, _classes(tmp_path / "d", "a", "b", "c", "d"))
    assert not many.has_labels and "has 4 classes, the model 3: the labels were left out" in note
    twice, note = in_classes_of(_model(3, ["crane", "ship", "crane"]), _classes(tmp_path / "e", "crane", "ship"))
    assert not twice.has_labels and "has the class 'crane', which the model has twice" in note


def test_no_class_in_common_leaves_labels_out():
    """Digits on a model of CIFAR's ten classes were scored by place: 9.13 %."""
    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    strange, note = in_classes_of(_model(10, cifar), open_pictures("digits:test"))
    assert not strange.has_labels and {s.label for s in strange.take(3, 0)} == {None}
    assert note == (
        "digits:test has none of the model's classes: its own are '0', '1', '2', …, the model's 'airplane', "
        "'automobile', 'bird', …; if they are the model's numbers, write class_order=number: the labels were left out, "
        "since they would be wrong"
    )
    numbered, note = in_classes_of(_model(10, cifar), open_pictures("digits:test:class_order=number"))
    assert note is None and [s.label for s in numbered] == [s.label for s in open_pictures("digits:test")]


def test_models_without_names(tmp_path):
    by_place, note = in_classes_of(_model(2), _classes(tmp_path / "a", "ship", "truck"))
    assert [s.label for s in by_place] == [0, 1] and note is None and by_place.labels_from.endswith("by place")
    guess, note = in_classes_of(_model(3), _classes(tmp_path / "b", "ship", "truck"))
    assert (
        not guess.has_labels and "2 classes, the model 3 without names, so nothing says which of them 'ship' is" in note
    )
    numbers, note = in_classes_of(_model(12), open_pictures("digits:test"))
    assert [s.label for s in numbers] == [s.label for s in open_pictures("digits:test")]
    assert "10 classes, the model 12 without names: they are taken for the model's by the numbers" in note
    for names in (["1", "12"], ["-1", "1"], ["01", "1"]):
        unclear, note = in_classes_of(_model(12), _classes(tmp_path / "-".join(names), *names))
        assert not unclear.has_labels and "nothing says" in note


def test_numbers_beyond_the_models_classes(tmp_path):
    """Calibration needs no labels, and stopped over one after minutes."""
    file = write_parquet(tmp_path / "a.parquet", {"image": cells(3), "label": [0, 5, 4]})
    kept, note = in_classes_of(_model(6), open_pictures(file))
    assert [s.label for s in kept] == [0, 5, 4] and note is None
    beyond, note = in_classes_of(_model(5), open_pictures(file))
    assert not beyond.has_labels and "has the label 5, the model 5 classes, 0 to 4: the labels were left out" in note


@pytest.mark.parametrize("named", [False, True])
def test_imagenets_classes_are_known_by_wordnets_numbers(named, tmp_path):
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    model = _model(1000, info.label_descriptions() if named else None)
    ids = ["n03063599", "n02129165", "n01440764"]  # coffee mug, lion, tench
    pictures, note = in_classes_of(model, _classes(tmp_path / "a", *ids))
    assert note is None and [s.label for s in pictures] == sorted(info.label_names().index(name) for name in ids)
    unknown, note = in_classes_of(model, _classes(tmp_path / "b", "n03063599", "n99999999"))
    assert not unknown.has_labels and note
    other, note = in_classes_of(_model(1000, [f"thing {n}" for n in range(1000)]), _classes(tmp_path / "c", *ids))
    assert not other.has_labels and "none of the model's classes" in note


def test_models_whose_classes_nobody_counts(tmp_path):
    import torch

    pictures = _classes(tmp_path, "a", "b")
    assert in_classes_of(torch.nn.Linear(2, 2), pictures) == (pictures, None)
    assert in_classes_of(_model(0), pictures) == (pictures, None)

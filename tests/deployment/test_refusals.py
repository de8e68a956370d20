"""What cannot be exported says so, before long work, and leaves nothing behind."""

from __future__ import annotations

import errno
import importlib.util
import os

import pytest
import torch
from torch import nn

import comcat
from comcat.deployment import compare, formats, packages
from comcat.deployment.export import export
from comcat.errors import ExportError, SettingsError, StoreError

from ..models import pictures, tiny_vit
from .cases import Broken


@pytest.fixture
def vit():
    return tiny_vit(depth=1)


def nothing_in(folder) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": "onx"}, r"got to='onx'.*onnx"),
        ({"opset": 17}, r"opset=17, expected 18 to 23"),
        ({"opset": 24}, r"opset=24, expected 18 to 23"),
        ({"opset": 18, "to": "openvino"}, r"an opset is a matter of to='onnx'"),
        ({"batch": 0}, r"batch=0"),
        ({"target": "tensorrt", "to": "torch"}, r"TensorRT reads ONNX"),
        ({"precision": "int8-static", "to": "torch"}, r"expected 'int8'"),
        ({"precision": "int4"}, r"precision='int4'"),
        ({"lose_at_most": 2}, r"lose_at_most"),
        ({"oversize": True}, r"unknown setting 'oversize'"),
    ],
)
def test_settings_that_do_not_go_together(vit, tmp_path, settings, words):
    with pytest.raises(SettingsError, match=words):
        export(vit, out=tmp_path / "m.onnx", **settings)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("values", r"the forward of Broken depends on the values in the pictures \(cases.py, line \d+: if self.kind"),
        ("random", r"another output each time"),
        ("batch", r"fixes a size that was to vary"),
        ("operator", r"Broken uses .*bessel_j0.*no operator in opset 23"),
        ("text", r"no plain tensors"),
    ],
)
def test_forwards_that_no_file_can_hold(tmp_path, kind, words):
    model = Broken(kind).eval()
    with torch.no_grad():
        model.layer.bias.fill_(9.0)
    with pytest.raises(ExportError, match=words):
        export(model, out=tmp_path / "m.onnx", data=[torch.randn(2, 3, 64, 64)])
    assert nothing_in(tmp_path)


def test_a_model_of_more_than_pictures(tmp_path):
    with pytest.raises(ExportError, match=r"cannot run on pictures \(2, 3, 32, 32\) alone"):
        export(nn.Bilinear(3, 3, 2), out=tmp_path / "m.onnx", data=[torch.randn(2, 3, 32, 32)])


def test_an_output_that_exists_is_kept_unless_told(vit, tmp_path):
    out = tmp_path / "m.onnx"
    out.write_text("precious")
    with pytest.raises(ExportError, match=r"m.onnx' exists; say overwrite=True \(--overwrite\)"):
        export(vit, out=out)
    assert out.read_text() == "precious"
    export(vit, out=out, overwrite=True, pictures=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_a_description_that_exists_is_kept_as_well(vit, tmp_path):
    (tmp_path / "m.onnx.json").write_text("mine")
    with pytest.raises(ExportError, match=r"m\.onnx\.json' exists"):
        export(vit, out=tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("name", "words"),
    [("m.pt", r"expected a name that ends in .onnx"), ("folder.onnx", r"is a folder, expected a file")],
)
def test_names_that_do_not_fit_the_format(vit, tmp_path, name, words):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match=words):
        export(vit, out=tmp_path / name)


def test_a_folder_that_cannot_be_written_to(vit):
    with pytest.raises(StoreError, match="/proc"):
        export(vit, out="/proc/m.onnx")


@pytest.mark.parametrize(("library", "extra"), [("onnxscript", "onnx"), ("onnxruntime", "onnx")])
def test_a_missing_package_names_the_extra(vit, tmp_path, monkeypatch, library, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == library else real(name))
    with pytest.raises(ExportError, match=rf"needs {library}: pip install 'comcat\[{extra}\]'"):
        export(vit, out=tmp_path / "m.onnx")


def test_a_file_that_computes_something_else_is_not_called_done(vit, tmp_path, monkeypatch):
    """The runtime answers as if another model had been written."""
    form = formats.FORMATS["onnx"]
    opened = form.open

    def wrong(path, threads):
        run = opened(path, threads)
        return lambda images: {name: value + 0.01 for name, value in run(images).items()}

    monkeypatch.setattr(form, "open", wrong, raising=False)
    with pytest.raises(ExportError, match=r"does not compute what the model does: largest error 0.01"):
        export(vit, out=tmp_path / "m.onnx", data=pictures(4))
    assert nothing_in(tmp_path)


def test_infinity_is_no_agreement():
    ours, theirs = {"logits": torch.tensor([[1.0, 2.0]])}, {"logits": torch.tensor([[1.0, float("nan")]])}
    found = compare.compare(lambda _: ours, lambda _: theirs, [torch.zeros(1)], source="pictures", real=True)
    with pytest.raises(ExportError):
        compare.check(found, "int8", 1.0)


def choosing(turned: set[int]):
    """A model that says which of two pixels is the larger, and one that says the contrary of some pictures."""

    def model(images):
        return {"output": torch.stack([images[:, 0] - images[:, 1], (images[:, 0] > images[:, 1]).float()], 1)}

    def file(images):
        said = model(images)["output"].clone()
        for row, number in enumerate(images[:, 2].int().tolist()):
            said[row, 1] = 1 - said[row, 1] if number in turned else said[row, 1]
        return {"output": said}

    return model, file


def choices(alike: int, count: int = 20):
    """Pictures of two pixels and their own number; some have two pixels that are alike."""
    images = torch.rand(count, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 2.0, 0.0])
    images[:alike, 1] = images[:alike, 0]
    images[:, 2] = torch.arange(count)
    return [images[:12], images[12:]]


def test_where_rounding_decides_the_file_may_decide_otherwise():
    settings = {"source": "pictures", "real": True, "tolerance": 1e-4}
    found = compare.compare(*choosing({0, 1}), choices(alike=2), **settings)
    assert found.unsettled == 2 and found.max_error == 0
    compare.check(found, "float32", 0.1)
    assert "2 pictures apart on which rounding decides" in str(found)
    found = compare.compare(*choosing({0, 5}), choices(alike=2), **settings)  # the fifth is settled
    assert found.unsettled == 1 and found.max_error == 1
    with pytest.raises(ExportError, match="does not compute what the model does"):
        compare.check(found, "float32", 0.1)
    found = compare.compare(*choosing(set(range(5))), choices(alike=5), **settings)
    with pytest.raises(ExportError, match="rounding decides what the model says on 5 of 20 pictures"):
        compare.check(found, "float32", 0.1)


def test_more_than_may_be_lost_is_refused():
    ours = {"logits": torch.eye(4)}
    theirs = {"logits": torch.eye(4)[[0, 1, 3, 2]]}
    found = compare.compare(lambda _: ours, lambda _: theirs, [torch.zeros(4)], source="pictures", real=True)
    assert found.agreement == 50.0
    with pytest.raises(ExportError, match=r"int8 loses 50.0% of the agreement.*at most 10.0%"):
        compare.check(found, "int8", 0.1)
    compare.check(found, "int8", 0.5)


def test_areas_are_compared_by_intersection_over_union():
    ours, theirs = torch.full((1, 1, 2, 4), -1.0), torch.full((1, 1, 2, 4), -1.0)
    ours[..., :2], theirs[..., 1:3] = 1.0, 1.0  # four and four, two in common, six together
    found = compare.compare(
        lambda _: {"output": ours}, lambda _: {"output": theirs}, [torch.zeros(1)], source="", real=True
    )
    assert found.iou == pytest.approx(2 / 6)
    several = torch.stack([ours[:, 0], -ours[:, 0]], 1), torch.stack([theirs[:, 0], -theirs[:, 0]], 1)
    found = compare.compare(
        lambda _: {"o": several[0]}, lambda _: {"o": several[1]}, [torch.zeros(1)], source="", real=True
    )
    assert found.iou == pytest.approx((2 / 6 + 2 / 6) / 2)


def test_a_full_disk_leaves_nothing(vit, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnx.save", full)
    with pytest.raises(StoreError, match=r"m.onnx cannot be written: No space left on device; nothing was"):
        export(vit, out=tmp_path / "m.onnx", pictures=2)
    assert nothing_in(tmp_path)


def test_a_disk_that_fills_at_the_very_end_keeps_what_was_there(vit, tmp_path, monkeypatch):
    export(vit, out=tmp_path / "m.onnx", pictures=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("comcat.deployment.export.write_json", full)
    with pytest.raises(StoreError, match="No space left"):
        export(vit, out=tmp_path / "m.onnx", pictures=3, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("operator", "domain", "opset"), [("Abs", "", 99), ("Fancy", "org.example", 1)])
def test_a_runtime_without_an_operator(tmp_path, operator, domain, opset):
    from onnx import TensorProto, helper

    source, result = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("images", "y"))
    node = helper.make_node(operator, ["images"], ["y"], domain=domain)
    graph = helper.make_graph([node], "g", [source], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"onnxruntime .* lacks an operator of m\.onnx"):
        comcat.open_exported(tmp_path / "m.onnx")


def test_files_that_are_no_exports(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(StoreError, match=r"m.onnx cannot be loaded by onnxruntime"):
        comcat.open_exported(tmp_path / "m.onnx")
    for path in (tmp_path / "absent.onnx", tmp_path, tmp_path / "m.bin"):
        with pytest.raises(StoreError, match="is no exported file"):
            comcat.open_exported(path)

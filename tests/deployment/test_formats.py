"""Programs of torch.export and folders of OpenVINO, and int8 in every format."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import comcat
from comcat.deployment import packages
from comcat.errors import DataError, ExportError, StoreError
from comcat.measure import benchmark

from ..hosts.zoo import CASES
from ..models import pictures, tiny_vit
from .cases import FAMILIES, Dense, compressed

NAMES = {"onnx": "small.onnx", "torch": "small.pt2", "openvino": "small"}


@pytest.fixture(scope="module")
def small():
    return comcat.compress(tiny_vit(), calibration=pictures(), reduce=0.4)


@pytest.fixture(scope="module")
def shallow():
    """One block: most of the time of an export goes with the number of operations."""
    return comcat.compress(tiny_vit(depth=1), calibration=pictures(), reduce=0.3)


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """What exporting the model says, by format, made once."""
    root = tmp_path_factory.mktemp("written")
    return {to: comcat.export(small, to=to, out=root / NAMES[to], data=pictures(5)) for to in ("torch", "openvino")}


@pytest.fixture(scope="module")
def openvino_int8(small, tmp_path_factory):
    return comcat.export(
        small, to="openvino", out=tmp_path_factory.mktemp("int8") / "q", precision="int8", data=pictures(9),
        lose_at_most=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("to", ["torch", "openvino"])
def test_a_format_computes_what_the_model_does(small, written, to):
    done = written[to]
    assert done.comparison.count == 5 and done.comparison.relative_error < 1e-5
    opened = comcat.open_exported(done.path)
    for count in (1, 3):
        images = torch.randn(count, 3, 32, 32)
        assert torch.allclose(opened(images), small(images), atol=1e-5)
    assert opened.num_classes == 5 and opened.preprocess == comcat.preprocess_of(small)
    assert json.loads(done.description.read_text())["outputs"] == [{"name": "logits", "shape": ["batch", 5]}]
    with pytest.raises(ExportError, match="exists"):
        comcat.export(small, to=to, out=done.path)


def test_a_program_runs_where_comcat_is_not(small, written, tmp_path):
    done = written["torch"]
    (tmp_path / "small.pt2").write_bytes(done.path.read_bytes())
    torch.save(torch.ones(1, 3, 32, 32), tmp_path / "x.pt")
    code = (
        "import sys, torch; p = torch.export.load('small.pt2').module()(torch.load('x.pt', weights_only=True))[0]; "
        "assert not any(n.partition('.')[0] in ('comcat', 'timm') for n in sys.modules); print(p.tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert np.allclose(json.loads(said), small(torch.ones(1, 3, 32, 32)).tolist(), atol=1e-5)
    assert done.path.name in json.loads(done.description.read_text())["file"]


def test_onnx_in_int8_quantises_products_with_weights_alone(small, tmp_path):
    done = comcat.export(small, out=tmp_path / "q.onnx", precision="int8", data=pictures(9), lose_at_most=0.5)
    graph = onnx.load(done.path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMul"] == 0 and kinds["Gemm"] == 0 and kinds["MatMulInteger"] >= 9
    assert kinds["Attention"] == 2 and kinds["Conv"] == 1 and kinds["Gelu"] == 2 and kinds["ConvInteger"] == 0
    stored = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weight = stored[node.input[1]]
            assert weight.data_type == onnx.TensorProto.INT8
            scales = [
                t for n, t in stored.items() if n.startswith(weight.name.removesuffix("_quantized")) and "scale" in n
            ]
            assert any(list(t.dims) == [weight.dims[1]] for t in scales), "one scale a channel"
    assert 1e-4 < done.comparison.relative_error < 0.2
    assert set(done.speed) == {1, 8} and all("times as fast as float32 here" in note for note in done.notes)


def test_convolutions_are_stored_in_int8_and_computed_in_float(tmp_path):
    model = Dense(CASES["timm-vit"].model(), classes=3).eval()
    images = [torch.randn(6, 3, 32, 32)]
    done = comcat.export(model, out=tmp_path / "q.onnx", precision="int8", data=images, lose_at_most=0.5)
    graph = onnx.load(done.path).graph
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            source = next(n for n in graph.node if node.input[1] in n.output)
            assert source.op_type == "DequantizeLinear"
    assert {t.data_type for t in graph.initializer if len(t.dims) == 4} == {onnx.TensorProto.INT8}
    assert done.comparison.iou > 0.5 and 1e-4 < done.comparison.relative_error < 0.2


def test_static_int8_measures_what_flows_in_beforehand(shallow, tmp_path):
    done = comcat.export(shallow, out=tmp_path / "q.onnx", precision="int8-static", data=pictures(9), lose_at_most=0.5)
    kinds = Counter(node.op_type for node in onnx.load(done.path).graph.node)
    assert kinds["DynamicQuantizeLinear"] == 0 and kinds["QuantizeLinear"] >= 5 and kinds["Attention"] == 1


def test_static_int8_loads_where_a_thin_product_is_split_into_heads(tmp_path):
    """ONNX Runtime carries a product's rounding on past reshapes, and knows unsigned numbers alone there."""
    case = CASES["hf-dinov2"]
    images = case.images(6)
    small = comcat.compress(case.model(), calibration=[images], reduce=0.3)
    settings = {"precision": "int8-static", "lose_at_most": 1.0}
    done = comcat.export(small, out=tmp_path / "m.onnx", data=[images], **settings)
    assert done.comparison.cosine > 0.9


def test_openvino_in_int8_quantises_products_with_weights_alone(written, openvino_int8):
    import openvino

    done = openvino_int8
    sizes = [(d.path / "openvino_model.bin").stat().st_size for d in (written["openvino"], done)]
    assert sizes[1] < 0.5 * sizes[0]
    model = openvino.Core().read_model(done.path / "openvino_model.xml")
    fed = [
        user.get_node().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "FakeQuantize"
        for user in op.output(0).get_target_inputs()
    ]
    assert fed and set(fed) == {"MatMul"}
    assert 1e-4 < done.comparison.relative_error < 0.2


def test_ctrl_c_is_heard_after_openvino_has_gone(openvino_int8):
    """Plugins that came and went left the main thread a stack for signals that was gone, and the next one killed it."""
    program = comcat.open_exported(openvino_int8.path)
    program(pictures()[0])
    del program
    gc.collect()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_torch_in_int8_holds_int8_and_loads_by_itself(shallow, tmp_path):
    done = comcat.export(
        shallow, to="torch", out=tmp_path / "q.pt2", precision="int8", data=pictures(9), lose_at_most=0.5
    )
    program = torch.export.load(done.path)
    assert {t.dtype for t in program.state_dict.values() if type(t).__name__ == "Int8Tensor"} == {torch.float32}
    assert 1e-4 < done.comparison.relative_error < 0.2
    assert comcat.open_exported(done.path)(torch.randn(3, 3, 32, 32)).shape == (3, 5)


def test_int8_that_loses_too_much_is_not_written(tmp_path):
    case = CASES["hf-vit-no-bias"]  # of features, whose cosine is never whole
    with pytest.raises(ExportError, match=r"int8 loses 0\.\d% of the agreement.* at most 0.0%"):
        comcat.export(case.model(), out=tmp_path / "q.onnx", precision="int8", data=[case.images(4)], lose_at_most=0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "library", "extra"),
    [
        ({"to": "openvino"}, "openvino", "openvino"),
        ({"to": "openvino", "precision": "int8"}, "nncf", "openvino"),
        ({"to": "torch", "precision": "int8"}, "torchao", "torchao"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, settings, library, extra):
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == library else real(name))
    with pytest.raises(ExportError, match=rf"needs {library}: pip install 'comcat\[{extra}\]'"):
        comcat.export(tiny_vit(), out=tmp_path / NAMES[settings["to"]], **settings)


def test_damaged_files_say_so(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"not a program")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "openvino_model.xml").write_text("<net>")
    for path, runtime in ((tmp_path / "m.pt2", "torch"), (tmp_path / "folder", "openvino")):
        with pytest.raises(StoreError, match=f"cannot be loaded by {runtime}"):
            comcat.open_exported(path)


def test_a_file_says_which_pictures_it_takes(written):
    done = written["torch"]
    with pytest.raises(DataError, match=r"cannot run on pictures \(2, 3, 16, 16\).*expected \['batch', 3, 32, 32\]"):
        comcat.open_exported(done.path)(torch.randn(2, 3, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "openvino"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_compressed(name, to, tmp_path):
    model, data = compressed(name)
    done = comcat.export(model, to=to, out=tmp_path / NAMES[to], data=data)
    assert done.comparison.relative_error < 1e-5
    assert benchmark({"file": comcat.open_exported(done.path)}, data[0], repeats=1, min_seconds=0)

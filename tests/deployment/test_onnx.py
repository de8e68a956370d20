"""Exports to ONNX: the file computes what the model does, for one picture and for several, and says how to feed it."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import comcat
from comcat.data import Preprocess
from comcat.deployment.pictures import generated
from comcat.errors import ExportError
from comcat.measure import model_output
from comcat.modules.lowrank import LowRankAttention

from ..hosts.zoo import CASES
from ..models import pictures, tiny_vit
from .cases import FAMILIES, Dense, compressed


def operators(path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def attentions(path) -> tuple[list, dict[str, int]]:
    """The nodes of attention, and the last dimension of every value by its name."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    sizes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    return nodes, {name: dims[-1].dim_value for name, dims in sizes.items() if dims}


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def small():
    """Ranks that differ between q/k and v, and between layers."""
    model = tiny_vit()
    return comcat.compress(model, calibration=pictures(), reduce=0.4)


@pytest.fixture(scope="module")
def shallow():
    """One block: most of the time of an export goes with the number of operations."""
    return comcat.compress(tiny_vit(depth=1), calibration=pictures(), reduce=0.3)


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    return comcat.export(small, out=tmp_path_factory.mktemp("onnx") / "small.onnx", data=pictures(9))


def test_the_file_computes_what_the_model_does(small, exported):
    run = session(exported.path)
    assert [i.shape for i in run.get_inputs()] == [["batch", 3, 32, 32]]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        (got,) = run.run(None, {"images": images.numpy()})
        expected = small(images).detach().numpy()
        assert got.shape == (count, 5) and np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_comparison_counts_every_picture_once(exported):
    found = exported.comparison
    assert (found.count, found.real, found.agreement) == (9, True, 100.0)
    assert 0 < found.max_error < 1e-4 and not exported.notes


def test_attention_is_one_operator_with_one_output_and_its_own_widths(small, exported):
    thin = [m for m in small.modules() if isinstance(m, LowRankAttention)]
    assert any(m.rank_qk != m.rank_vo for m in thin), "the case shows nothing"
    nodes, widths = attentions(exported.path)
    assert [len(node.output) for node in nodes] == [1, 1]
    assert [[widths[n] for n in node.input[:3]] for node in nodes] == [[m.rank_qk, m.rank_qk, m.rank_vo] for m in thin]


def test_for_tensorrt_heads_have_one_width_that_is_a_multiple_of_8(shallow, tmp_path):
    thin = [m for m in shallow.modules() if isinstance(m, LowRankAttention)]
    assert [m.rank_qk == m.rank_vo for m in thin] == [False], "the case shows nothing"
    done = comcat.export(shallow, out=tmp_path / "small.onnx", data=pictures(4), target="tensorrt")
    nodes, widths = attentions(done.path)
    (node,) = nodes
    assert len({widths[n] for n in node.input[:3]}) == 1 and widths[node.input[0]] % 8 == 0


def test_an_older_opset_takes_attention_apart(shallow, tmp_path):
    done = comcat.export(shallow, out=tmp_path / "small.onnx", data=pictures(4), opset=18)
    assert operators(done.path)["Attention"] == 0 and operators(done.path)["Softmax"] == 1
    assert onnx.load(done.path).opset_import[0].version == 18


def test_a_fixed_batch_takes_no_other(shallow, tmp_path):
    done = comcat.export(shallow, out=tmp_path / "small.onnx", data=pictures(6), batch=3)
    assert done.comparison.count == 6
    opened = comcat.open_exported(done.path)
    assert opened(torch.randn(3, 3, 32, 32)).shape == (3, 5)
    with pytest.raises(
        comcat.ComcatError, match=r"small.onnx cannot run on pictures \(2, 3, 32, 32\).*expected \[3, 3"
    ):
        opened(torch.randn(2, 3, 32, 32))


def test_pixels_go_in_as_they_are_and_give_what_the_preprocessing_and_the_model_give(shallow, tmp_path):
    prepare = Preprocess(size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    done = comcat.export(shallow, out=tmp_path / "small.onnx", preprocess=prepare, pixels=True)
    photographs = generated(Preprocess(size=(48, 40), mean=(0,), std=(1,)), 3, seed=5)
    pixels = np.stack([np.asarray(prepare.fit(p)) for p in photographs])
    assert pixels.dtype == np.uint8
    (got,) = session(done.path).run(None, {"images": pixels})
    expected = shallow(torch.stack([prepare(p) for p in photographs])).detach().numpy()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert json.loads(done.description.read_text())["input"] == {
        "name": "images", "shape": ["batch", 32, 32, 3], "type": "uint8",
    }  # fmt: skip


def test_the_description_says_what_goes_in_and_what_comes_out(small, exported):
    said = json.loads(exported.description.read_text())
    assert said["input"] == {"name": "images", "shape": ["batch", 3, 32, 32], "type": "float32"}
    assert said["outputs"] == [{"name": "logits", "shape": ["batch", 5]}]
    assert Preprocess.from_dict(said["preprocess"]) == comcat.preprocess_of(small)
    assert said["comparison"]["count"] == 9
    inside = {p.key: json.loads(p.value) for p in onnx.load(exported.path).metadata_props}
    assert inside["comcat.preprocess"] == said["preprocess"]


def test_a_file_whose_description_is_lost_still_knows_its_preprocessing(small, exported, tmp_path):
    lost = tmp_path / "moved.onnx"
    lost.write_bytes(exported.path.read_bytes())
    assert comcat.open_exported(lost).preprocess == comcat.preprocess_of(small)


def test_float16_halves_the_weights_and_says_what_it_cost(shallow, tmp_path):
    done = comcat.export(shallow, out=tmp_path / "half.onnx", data=pictures(9), precision="float16")
    stored = [t.data_type for t in onnx.load(done.path).graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]
    assert stored and set(stored) == {onnx.TensorProto.FLOAT16}
    assert 1e-6 < done.comparison.relative_error < 3e-2
    assert session(done.path).get_inputs()[0].type == "tensor(float)"


def test_the_users_model_is_left_as_it_was(tmp_path):
    model = tiny_vit(depth=1).to(torch.bfloat16).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    comcat.export(model, out=tmp_path / "m.onnx")
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(t.dtype == torch.bfloat16 for t in model.state_dict().values())


def test_without_pictures_they_are_generated_and_it_says_so(tmp_path):
    done = comcat.export(tiny_vit(depth=1), out=tmp_path / "m.onnx", pictures=3)
    assert not done.comparison.real and "generated" in done.comparison.source and done.comparison.count == 3
    assert any("generated" in note for note in done.notes)


def test_an_exported_file_is_measured_like_a_model(small, exported):
    opened = comcat.open_exported(exported.path)
    images = torch.randn(6, 3, 32, 32)
    assert torch.allclose(model_output(opened, images), model_output(small, images), atol=1e-5)
    found = comcat.evaluate(opened, [images], against=small)
    assert found.agreement == 100.0 and found.count == 6
    assert set(comcat.benchmark({"model": small, "file": opened}, images, repeats=2, min_seconds=0)) == {
        "model",
        "file",
    }


def test_a_model_of_features_gives_all_its_outputs_by_name(tmp_path):
    case = CASES["hf-siglip"]
    done = comcat.export(case.model(), out=tmp_path / "m.onnx", data=[case.images(3)])
    said = json.loads(done.description.read_text())["outputs"]
    assert [o["name"] for o in said] == ["last_hidden_state", "pooler_output"]
    assert said[0]["shape"] == ["batch", 16, 24]
    assert done.comparison.agreement is None and done.comparison.cosine > 0.9999


def test_a_dense_model_is_compared_by_its_areas(tmp_path):
    model = Dense(CASES["timm-vit"].model()).eval()
    with pytest.raises(ExportError, match="nothing says how Dense wants its pictures"):
        comcat.export(model, out=tmp_path / "m.onnx")
    done = comcat.export(model, out=tmp_path / "m.onnx", data=[torch.randn(3, 3, 32, 32)])
    assert done.comparison.iou == 1.0 and done.comparison.agreement is None
    assert any("no preprocessing" in note for note in done.notes)


def test_a_picture_of_any_size_where_the_forward_allows_it(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    done = comcat.export(model, out=tmp_path / "m.onnx", data=[torch.randn(3, 3, 32, 32)], any_size=True)
    images = torch.randn(2, 3, 48, 64)
    assert torch.allclose(comcat.open_exported(done.path)(images), model(images), atol=1e-5)


def test_attention_with_a_mask_that_stays_dense(tmp_path):
    """Which kernel answers differs between recording and writing, and with it the strides."""
    case = CASES["timm-beit"]
    done = comcat.export(case.model(), out=tmp_path / "m.onnx", data=[case.images(3)])
    assert done.comparison.relative_error < 2e-6 and operators(done.path)["Attention"] == 2


def test_what_follows_from_weights_alone_is_in_the_file_and_what_tracing_wrote_down_is_not(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    done = comcat.export(
        Dinov2Model(Dinov2Config(**sizes)).eval(), out=tmp_path / "m.onnx", data=[pictures(3, 3, 56)[0]]
    )
    graph = onnx.load(done.path).graph
    assert done.comparison.relative_error < 1e-5 and not operators(done.path)["Resize"]
    assert (16 * 16 + 1) * 24 not in [np.prod(t.dims) for t in graph.initializer], "the embedding of 16 × 16 patches"
    assert not any(told.metadata_props or told.doc_string for told in (*graph.node, *graph.value_info))


def test_what_would_take_more_room_is_left_to_the_runtime(tmp_path):
    """A bias for every pair of tokens out of a table that is far smaller."""
    case = CASES["timm-beit"]
    model = case.model()
    done = comcat.export(model, out=tmp_path / "m.onnx", data=[case.images(3)])
    held = 4 * sum(p.numel() for p in model.parameters())
    index = sum(8 * b.numel() for b in model.buffers())
    assert sum(len(t.raw_data) for t in onnx.load(done.path).graph.initializer) < held + index + 4096


def test_blocks_on_fewer_tokens(tmp_path):
    """Their mask is one row for all queries, which ONNX Runtime's operator does not take as it is."""
    model, images = tiny_vit(), pictures(12)
    small = comcat.compress(model, calibration=images, forms="tokens", budget="macs", reduce=0.1)
    assert any(entry.form == "similar" for entry in small.comcat_record.plan.sites.values()), "the case shows nothing"
    done = comcat.export(small, out=tmp_path / "m.onnx", data=images)
    assert done.comparison.relative_error < 1e-5 and operators(done.path)["Attention"] == 2


@pytest.mark.parametrize(("name", "how"), [("hf-vit", "grid"), ("hf-dinov2", "similar"), ("hf-dinov2", "drop")])
def test_fewer_tokens_where_the_host_makes_a_mask_while_it_is_traced(name, how, tmp_path):
    case = CASES[name]
    model, images = case.model(), case.images(3)
    comcat.apply_(model, comcat.merge(model, example=images[:1], keep=0.6, how=how))
    done = comcat.export(model, out=tmp_path / "m.onnx", data=[images])
    assert done.comparison.relative_error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_compressed(name, tmp_path):
    small, data = compressed(name)
    done = comcat.export(small, out=tmp_path / "m.onnx", data=data)
    assert done.comparison.relative_error < 2e-6

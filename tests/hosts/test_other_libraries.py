"""Whole compressed models under other libraries: as the dense model does, so does the small one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.apply import apply_

from ..models import tiny_vit
from .conftest import subject_of
from .test_apply import low_plan
from .zoo import relative_error, run

TIMM = ["timm-vit", "timm-beit", "timm-swin", "timm-relpos", "timm-eva02", "timm-swinv2"]
HF = ["hf-vit", "hf-swin", "hf-swinv2"]


def compressed(name: str) -> nn.Module:
    model = subject_of(name).copy()
    apply_(model, low_plan(subject_of(name).sites))
    return model


def output(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return run(model, subject_of(name).images)


def test_lora_on_qkv_of_a_compressed_model() -> None:
    """It moved nothing, had no gradient, and changed the output by 0.5 when it was merged."""
    peft: Any = pytest.importorskip("peft")
    small, x = comcat.compress(tiny_vit(), reduce=0.3, statistic="weights"), torch.randn(2, 3, 32, 32)
    before = small(x).detach()
    model = peft.get_peft_model(small, peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False))
    moved = model(x)
    assert (moved - before).abs().max() > 0.1
    moved.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    assert (model.merge_and_unload()(x) - moved).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "targets"), [
    ("timm-vit", ["qkv", "attn.proj", "fc1.first", "fc1.last"]),
    ("timm-swin", ["qkv", "reduction.first", "reduction.last"]),
    ("timm-eva02", ["linear", "first"]),
    ("hf-vit", ["linear", "fc1.first"]),
    ("hf-swinv2", ["linear", "first", "last"]),
])  # fmt: skip
def test_factors_by_their_names(name: str, targets: list[str]) -> None:
    """The names that the documentation gives."""
    peft: Any = pytest.importorskip("peft")
    model = compressed(name)
    paths = {
        n for n, m in model.named_modules() if type(m) is nn.Linear and n.endswith(tuple(f".{t}" for t in targets))
    }
    before = output(model, name)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), model)
    found = {n.split(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_" in n}
    assert found == paths and paths
    assert relative_error(output(adapted, name), before) > 1e-2


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_factors_listed_by_what_they_are(name: str) -> None:
    """Some projections of transformers are thin and some padded, layer by layer: the documentation lists them by this
    line.
    """
    peft: Any = pytest.importorskip("peft")
    model = compressed(name)
    targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".att" in n]
    before = output(model, name)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), model)
    found = {n.split(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_" in n}
    assert found == set(targets) and len(found) == (4 if name == "timm-vit" else 8)
    assert relative_error(output(adapted, name), before) > 1e-2


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "timm-swin", "timm-eva02", "hf-vit", "hf-swin"])
def test_offloading(name: str, where: str, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model = compressed(name)
    before = output(model, name)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with torch.no_grad():
        got = model(subject_of(name).images)
    assert getattr(got, "logits", got).equal(before)


@pytest.mark.parametrize("name", TIMM + HF)
def test_shapes_on_the_meta_device(name: str) -> None:
    """Swin raised: it read a table beside meta tensors."""
    model = compressed(name)
    shape = output(model, name).shape
    got = model.to("meta")(subject_of(name).images.to("meta"))
    assert getattr(got, "logits", got).shape == shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", TIMM + HF)
def test_dynamic_quantisation(name: str) -> None:
    model = compressed(name)
    before = output(model, name)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    with torch.no_grad():
        got = quantised(subject_of(name).images)
    assert relative_error(getattr(got, "logits", got), before) < 0.2


@pytest.mark.filterwarnings("ignore:.*NOTE")
@pytest.mark.parametrize("name", TIMM)
def test_feature_extraction_of_torchvision(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = compressed(name)
    last = get_graph_node_names(model)[1][-1]
    extracted = create_feature_extractor(model, {last: "end"})
    with torch.no_grad():
        assert extracted(subject_of(name).images)["end"].equal(output(model, name))


@pytest.mark.filterwarnings("ignore:.*NOTE")
@pytest.mark.parametrize("name", TIMM)
def test_feature_extraction_of_timm(name: str) -> None:
    from timm.models._features_fx import FeatureGraphNet

    model, images = compressed(name), subject_of(name).images
    paths = [info["module"] for info in model.feature_info[:2]]
    seen: list[torch.Tensor] = []
    handles = [model.get_submodule(p).register_forward_hook(lambda m, i, o: seen.append(o)) for p in paths]
    output(model, name)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        got = FeatureGraphNet(model, (0, 1))(images)
    assert len(got) == len(seen) == 2
    assert all(mine.equal(theirs) for mine, theirs in zip(got, seen, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TIMM)
def test_torchscript(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    again = torch.jit.load(str(tmp_path / "model.pt"))
    with torch.no_grad():
        assert relative_error(again(subject_of(name).images), output(model, name)) < 1e-5

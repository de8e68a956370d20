"""What a file cannot hold is refused when it is saved, by the layer's name and with the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import comcat
from comcat.errors import ModelError, StoreError

from ..models import tiny_vit

QKV = "blocks.1.attn.qkv"
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

Change = Callable[[Any], Any]


@pytest.fixture
def small() -> Any:
    return comcat.compress(tiny_vit(), reduce=0.3, statistic="weights")


def on(path: str, change: Callable[..., Any], *arguments: Any) -> Change:
    """A change of one layer."""

    def changed(model: nn.Module) -> nn.Module:
        change(model.get_submodule(path), *arguments)
        return model

    return changed


def adapted(model: nn.Module) -> nn.Module:
    peft: Any = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))


def adapted_inside(model: nn.Module) -> nn.Module:
    adapted(model)
    return model


def quantised(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def in_int8(model: nn.Module) -> nn.Module:
    quantization: Any = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def offloaded(model: nn.Module) -> nn.Module:
    accelerate: Any = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


def brought_back(model: nn.Module) -> nn.Module:
    accelerate: Any = pytest.importorskip("accelerate")
    accelerate.hooks.remove_hook_from_submodules(model)
    return model


def ordinary(model: nn.Module) -> nn.Module:
    parametrize.remove_parametrizations(model.get_submodule(QKV), "weight")
    return model


REFUSED: dict[str, tuple[Change, str, Change | None]] = {
    "PEFT": (adapted, r"blocks\.0\.attn\.qkv carries an adapter of PEFT: merge it first",
        lambda m: m.merge_and_unload()),
    "inside PEFT": (adapted_inside, r"blocks\.0\.attn\.qkv carries an adapter of PEFT: merge it first", None),
    "quantised": (quantised, r"blocks\.0\.attn\.qkv is quantised: save the model before that", None),
    "int8 of torchao": (in_int8, r"blocks\.0\.attn\.qkv has a Int8Tensor.*save first, then quantise", None),
    "offloaded": (offloaded, r"is placed by accelerate's hooks: call accelerate\.hooks", brought_back),
    "meta": (lambda m: m.to("meta"), r"cls_token on the meta device, without values", None),
    "pruned": (on(QKV, prune.l1_unstructured, "weight", 0.3), rf"{QKV} is pruned: .*prune\.remove",
        on(QKV, prune.remove, "weight")),
    "weight norm": (on(QKV, parametrizations.weight_norm),
        rf"{QKV} has a weight that is computed from others.*remove_parametrizations",
        ordinary),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_a_file_cannot_hold(name: str, small: Any, tmp_path: Path) -> None:
    """Before: raw errors of other libraries, or a folder that nothing could load."""
    change, said, way_out = REFUSED[name]
    model = change(copy.deepcopy(small))
    with pytest.raises(ModelError, match=said):
        comcat.save(model, tmp_path / "small", record=small.comcat_record)
    assert not list(tmp_path.iterdir())
    if way_out is not None:
        model = way_out(model)
        loaded = comcat.load(comcat.save(model, tmp_path / "small", record=small.comcat_record))
        with torch.no_grad():
            assert loaded(PICTURES).equal(model(PICTURES))


def test_a_norm_from_before_the_plan_comes_back_into_a_model_made_alike(small: Any, tmp_path: Path) -> None:
    change = on("head", parametrizations.weight_norm)
    with pytest.raises(ModelError, match=r"head has a weight that is computed"):  # the plan's fingerprint names it
        comcat.save(change(small), tmp_path / "small")
    model = comcat.compress(change(tiny_vit()), reduce=0.3, statistic="weights")
    loaded = comcat.load(comcat.save(model, tmp_path / "small"), into=change(tiny_vit()))
    with torch.no_grad():
        assert loaded(PICTURES).equal(model(PICTURES))


def test_an_average_of_weights_is_saved_without_its_wrapper(small: Any, tmp_path: Path) -> None:
    average = AveragedModel(small)
    average.update_parameters(small)
    for p in small.parameters():
        p.data.add_(0.1)
    average.update_parameters(small)
    loaded = comcat.load(comcat.save(average, tmp_path / "small"))
    with torch.no_grad():
        assert loaded(PICTURES).equal(average(PICTURES)) and not loaded(PICTURES).equal(small(PICTURES))


class Averaging(nn.Module):
    """As timm's ``ModelEmaV3``: a model beside what else it does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_of_an_unknown_wrapper_the_part_to_save_is_named(small: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"its module was: save that, comcat\.save\(model\.module, folder\)"):
        comcat.save(Averaging(small), tmp_path / "small")

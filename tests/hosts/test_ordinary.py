"""Models whose weights another library wrapped, moved, quantised or computes: told with the layer and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import comcat
from comcat.errors import ModelError
from comcat.hosts import find_sites

from ..models import tiny_vit

Way = Callable[[nn.Module], nn.Module]


def same(model: nn.Module) -> nn.Module:
    return model


def on(path: str, do: Callable[[nn.Module], Any]) -> Way:
    def change(model: nn.Module) -> nn.Module:
        do(model.get_submodule(path))
        return model

    return change


def offloaded(model: nn.Module) -> nn.Module:
    import accelerate

    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def brought_back(model: nn.Module) -> nn.Module:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    return model


def dispatched(model: nn.Module) -> nn.Module:
    import accelerate

    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def adapted(*targets: str) -> Way:
    def adapt(model: nn.Module) -> nn.Module:
        peft: Any = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))

    return adapt


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def qat(model: nn.Module) -> nn.Module:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    return torch.ao.quantization.prepare_qat(model.train())


class Foreign(Tensor):
    """A tensor of another library, as torchao's are."""


def foreign(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign))  # type: ignore[assignment]


def sparse(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())  # type: ignore[assignment]


def dense(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to_dense())  # type: ignore[assignment]


def integers(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)  # type: ignore[assignment]


def lazy(model: nn.Module) -> nn.Module:
    model.head = nn.LazyLinear(5)
    return model


def called(model: nn.Module) -> nn.Module:
    model(torch.randn(1, 3, 32, 32))
    return model


def keeps_a_map(model: nn.Module) -> nn.Module:
    model.blocks[0].attn.map = model.blocks[0].attn.qkv.weight * 2
    return model


FC1, QKV = "blocks.0.mlp.fc1", "blocks.1.attn.qkv"
NAMED: dict[str, tuple[Way, str, Way | None]] = {  # what was done, what is said, the way out that it names
    "weight norm": (on(QKV, nn.utils.weight_norm), f"{QKV} is weight-normed.*remove_weight_norm",
        on(QKV, nn.utils.remove_weight_norm)),
    "spectral norm": (on(FC1, nn.utils.spectral_norm), f"{FC1} is spectral-normed.*remove_spectral_norm",
        on(FC1, nn.utils.remove_spectral_norm)),
    "pruned": (on(FC1, lambda m: prune.l1_unstructured(m, "weight", 0.3)),
        rf"{FC1} is pruned.*prune\.remove\(layer, 'weight'\)", on(FC1, lambda m: prune.remove(m, "weight"))),
    "pruned bias": (on(QKV, lambda m: prune.l1_unstructured(m, "bias", 0.3)),
        rf"{QKV} is pruned.*prune\.remove\(layer, 'bias'\)", on(QKV, lambda m: prune.remove(m, "bias"))),
    "offloaded": (offloaded, "accelerate.*remove_hook_from_submodules", brought_back),
    "dispatched": (dispatched, "accelerate.*remove_hook_from_submodules", brought_back),
    "adapter": (adapted("qkv", "fc1"), r"blocks\.0\.attn\.qkv carries an adapter.*merge_and_unload",
        lambda m: m.merge_and_unload()),
    "adapter of the head": (adapted("head"), r"head carries an adapter.*merge_and_unload",
        lambda m: m.merge_and_unload()),
    "quantised": (quantised, r"blocks\.0\.attn\.qkv is quantised: compress the model first", None),
    "quantisation-aware": (qat, r"patch_embed\.proj is quantised: compress the model first", None),
    "tensors of another library": (on(FC1, foreign), f"{FC1} has a Foreign for its weight", None),
    "sparse": (on(FC1, sparse), f"{FC1} has a sparse weight.*to_dense", on(FC1, dense)),
    "meta": (lambda m: m.to("meta"), "cls_token on the meta device.*load the weights first", None),
    "one layer on meta": (on(FC1, lambda m: m.to("meta")), f"{FC1} has its weight on the meta device", None),
    "lazy": (lazy, "head is lazy and has no weight yet: call the model once", called),
    "TorchScript": (torch.jit.script, "compiled by TorchScript: take the model that it was made from", None),
    "a kept map": (keeps_a_map, r"blocks\.0\.attn keeps 'map', a tensor with a gradient history",
        on("blocks.0.attn", lambda m: setattr(m, "map", None))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", list(NAMED))
def test_the_layer_and_the_way_out_are_named(name: str) -> None:
    """Raw errors of other libraries before: deepcopy's, ``item() on meta``, missing attributes, unimplemented
    operators.
    """
    change, said, way_out = NAMED[name]
    model = change(tiny_vit())
    pictures = [torch.randn(2, 3, 32, 32)]
    for attempt in (
        lambda: find_sites(model),
        lambda: comcat.compress(model, reduce=0.2, statistic="weights"),
        lambda: comcat.compress(model, pictures, reduce=0.2),
    ):
        with pytest.raises(ModelError, match=said):
            attempt()
    if way_out is not None:
        model = way_out(model)
        before, small = model(pictures[0]), comcat.compress(model, pictures, reduce=0.2)
        assert 0 < (small(pictures[0]) - before).abs().max() < before.abs().max()


LAYERS: dict[str, tuple[Way, str]] = {
    "parametrized": (on(FC1, parametrizations.weight_norm), "its weight is computed from others at every "
        "call.*remove_parametrizations"),
    "another dtype": (on(FC1, integers), "its weight is torch.int8, expected floating point"),
    "no parameter": (on(FC1, lambda m: setattr(m, "weight", None)), "its weight is no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_that_must_stay_is_refused_alone(name: str) -> None:
    change, reason = LAYERS[name]
    sites = find_sites(change(tiny_vit()))
    assert set(find_sites(tiny_vit())) - set(sites) == {FC1, "blocks.0.mlp:units"}
    with pytest.raises(comcat.errors.UnsupportedSite, match=f"{FC1}.*{reason}"):
        sites[FC1]


def test_attention_with_such_a_layer_is_refused_and_the_rest_shrinks() -> None:
    model = on(QKV, parametrizations.weight_norm)(tiny_vit())
    before = model(torch.ones(1, 3, 32, 32))
    small = comcat.compress(model, reduce=0.1, statistic="weights")
    assert not any("blocks.1.attn" in name for name in small.comcat_record.plan.sites)
    reasons = {r.name: r.reason for r in find_sites(model).refused}
    assert reasons["blocks.1.attn"].startswith("qkv: its weight is computed from others")
    assert 0 < (small(torch.ones(1, 3, 32, 32)) - before).abs().max() < before.abs().max()
    parametrize.remove_parametrizations(model.get_submodule(QKV), "weight")
    assert "blocks.1.attn:qk" in find_sites(model)


@pytest.mark.parametrize("statistic", ["weights", "activation", "loss"])
@pytest.mark.parametrize("inside", ["everything", "pictures", "model"])
def test_inference_mode(statistic: str, inside: str) -> None:
    """All of it under ``torch.inference_mode``, or only what comes from there: the outcome is the same and can be
    trained.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {"reduce": 0.3, "statistic": statistic, "forms": "ranks"}
    expected = comcat.compress(tiny_vit(), [torch.ones(2, 3, 32, 32)], **settings)
    with torch.inference_mode(inside in ("everything", "model")):
        model = tiny_vit()
    with torch.inference_mode(inside in ("everything", "pictures")):
        pictures = torch.ones(2, 3, 32, 32)
    with torch.inference_mode(inside == "everything"):
        small = comcat.compress(model, [pictures], **settings)
        applied = comcat.apply_(tiny_vit(), small.comcat_record.plan).model
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value)
    small(torch.ones(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    ours = [m for m in applied.modules() if getattr(m, "comcat_module", False)]
    assert ours and not any(p.is_inference() for m in ours for p in m.parameters())


def test_pictures_are_left_as_they_are() -> None:
    """Calibration asked the caller's own tensors for gradients."""
    pictures = torch.randn(2, 3, 32, 32)
    comcat.compress(tiny_vit(), [pictures], reduce=0.2)
    assert not pictures.requires_grad and pictures.grad is None


def test_a_model_loaded_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    comcat.save(
        comcat.compress(comcat.load_model("timm:test_vit", pretrained=False), reduce=0.2, statistic="weights"),
        tmp_path / "small",
    )
    with torch.inference_mode():
        small = comcat.load(tmp_path / "small")
    small(torch.ones(1, 3, 160, 160)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())

"""Hosts that read the weight of a layer that has been replaced: they get the product, or their layer is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan

from ..models import ranked
from . import zoo
from .test_apply import full_plan, low_plan
from .zoo import relative_error

Model = tuple[nn.Module, dict[str, Any]]


def torchvision_swin(version: int) -> Model:
    """Its attention passes ``self.qkv.weight`` to a function."""
    from torchvision.models import swin_transformer as swin

    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    model = swin.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5,
        **(second if version == 2 else {}),
    )  # fmt: skip
    return model, {"x": torch.randn(2, 3, 32, 32)}


def siglip2() -> Model:
    """It asks ``patch_embedding.weight`` for its dtype."""
    import transformers

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    text = {
        **size,
        "vocab_size": 50,
        "max_position_embeddings": 8,
        "projection_size": 24,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.Siglip2Config(text_config=text, vision_config={**size, "num_patches": 16, "patch_size": 4})
    inputs = {
        "input_ids": torch.randint(0, 50, (2, 8)), "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }  # fmt: skip
    return transformers.Siglip2Model(config), inputs


def layoutlmv3() -> Model:
    """It looks its position biases up in the weights of linear layers, which it never calls."""
    import transformers

    config = transformers.LayoutLMv3Config(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        coordinate_size=4,
        shape_size=4, input_size=16, patch_size=4, max_position_embeddings=40, max_2d_position_embeddings=64,
    )  # fmt: skip
    boxes = torch.tensor([[1, 2, 30, 40], [5, 6, 7, 8]]).repeat(2, 4, 1)
    inputs = {"input_ids": torch.randint(2, 50, (2, 8)), "bbox": boxes, "pixel_values": torch.randn(2, 3, 16, 16)}
    return transformers.LayoutLMv3Model(config), inputs


def gemma4() -> Model:
    """It asks ``input_proj.weight`` for its dtype."""
    import timm

    settings = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    return timm.create_model("gemma4_vit_167m", pretrained=False, **settings), {"x": torch.randn(2, 3, 32, 32)}


class OpenClip(nn.Module):
    """What open_clip's text tower does: the MLP's first layer says the dtype of all that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = zoo.HandBlock(nn.Identity(), 16, 48)
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 24)

    def get_cast_dtype(self) -> torch.dtype:
        return self.block.mlp[0].weight.dtype

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(text).to(self.get_cast_dtype())))


MODELS: dict[str, Callable[[], Model]] = {
    "torchvision-swin": lambda: torchvision_swin(1),
    "torchvision-swin-v2": lambda: torchvision_swin(2),
    "siglip2": siglip2,
    "layoutlmv3": layoutlmv3,
    "timm-gemma4": gemma4,
    "open-clip": lambda: (OpenClip(), {"text": torch.randint(0, 20, (2, 5))}),
}


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    if isinstance(found, Tensor):
        return found
    return found.image_embeds if hasattr(found, "image_embeds") else found.last_hidden_state


@pytest.mark.parametrize("name", list(MODELS))
def test_models_that_read_weights_run_compressed(name: str) -> None:
    model, inputs = MODELS[name]()
    model.eval()
    before = output(model, inputs)
    sites = ranked(find_sites(model))
    handle = apply_(model, full_plan(sites))
    assert relative_error(output(model, inputs), before) < 1e-4
    handle.revert()
    apply_(model, low_plan(sites))
    assert output(model, inputs).isfinite().all()
    assert not output(model, inputs).equal(before)


@pytest.mark.parametrize("version", [1, 2])
def test_attention_that_computes_with_what_it_reads_is_refused(version: int) -> None:
    """Thin weights would be put together at every call: nothing saved. The other layers shrink."""
    model, _ = torchvision_swin(version)
    sites = ranked(find_sites(model))
    assert {s.kind for s in sites.values()} == {"linear"} and len(sites) == 10
    reasons = {r.name: r.reason for r in sites.refused}
    for path in ("features.1.0.attn", "features.3.1.attn"):
        assert reasons[path] == "its forward computes with the weights of qkv and does not call the layer"


class ReadingAttention(nn.Module):
    """Separate projections, of which one is read: as some libraries call torch's functional attention."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaling, self.read = 2, 8, 8**-0.5, read
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        def apply(name: str, x: Tensor) -> Tensor:
            layer = getattr(self, name)
            return F.linear(x, layer.weight, layer.bias) if name == self.read else layer(x)

        q, k, v = (
            apply(n, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(2)
        return apply("out_proj", o)


@pytest.mark.parametrize("read", ["q_proj", "k_proj", "v_proj", "out_proj", "none"])
def test_one_projection_that_is_read_is_enough(read: str) -> None:
    sites = ranked(find_sites(zoo.HandModel(ReadingAttention(read))))
    attention = {n for n in sites if "attend" in n}
    if read == "none":
        assert attention == {"blocks.0.attend:qk", "blocks.0.attend:vo"}
    else:
        assert not attention
        reason = {r.name: r.reason for r in sites.refused}["blocks.0.attend"]
        assert reason == f"its forward computes with the weights of {read} and does not call the layer"


@pytest.mark.parametrize("name", ["timm-eva02", "timm-swinv2", "timm-beit", "hf-vit", "hf-swinv2"])
def test_the_weight_of_what_was_replaced_is_the_one_that_was_there(name: str) -> None:
    """At full rank every layer answers with the weight, bias and widths of its predecessor, up to the basis of its
    heads.
    """
    case = zoo.CASES[name]
    model = case.model()
    sites = ranked(find_sites(model))
    dense = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    apply_(model, full_plan(sites))
    compared = 0
    for path, layer in dense.items():
        stand_in = dict(model.named_modules()).get(path)
        if stand_in is None or stand_in is layer or isinstance(stand_in, nn.Linear):
            continue
        assert (stand_in.in_features, stand_in.out_features) == (layer.in_features, layer.out_features)
        assert stand_in.weight.shape == layer.weight.shape and stand_in.weight.dtype == layer.weight.dtype
        assert "weight" not in dict(stand_in.named_parameters()) and "weight" not in stand_in.state_dict()
        if path in sites:
            assert relative_error(stand_in.weight, layer.weight) < 1e-5
            if layer.bias is not None:
                assert relative_error(stand_in.bias, layer.bias) < 1e-5
            compared += 1
    assert compared


def test_a_weight_that_is_read_keeps_its_dtype_under_autocast_and_gives_gradients() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
    apply_(model, Plan(sites={"0": SitePlan(keep=3, full=24)}))
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[0].weight
    assert weight.dtype == torch.float32 and torch.linalg.matrix_rank(weight) == 3
    weight.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n != "0.last.bias")
    with pytest.raises((KeyError, AttributeError), match="weight"):
        model[0].weight = nn.Parameter(torch.zeros(24, 24))


def test_a_host_that_reads_is_compiled_and_traced() -> None:
    model, inputs = MODELS["open-clip"]()
    apply_(model.eval(), low_plan(ranked(find_sites(model))))
    before = output(model, inputs)
    torch._dynamo.reset()
    assert relative_error(output(torch.compile(model, backend="aot_eager", fullgraph=True), inputs), before) < 1e-5
    assert relative_error(output(torch.fx.symbolic_trace(model), inputs), before) < 1e-5
    exported = torch.export.export(model, (), inputs).module()
    assert relative_error(output(exported, inputs), before) < 1e-5

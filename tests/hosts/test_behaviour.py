"""What stands in for a host's attention does what the host's did: masks, dropout, checkpointing, compilation, attention
maps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan

from ..models import ranked
from . import zoo
from .conftest import subject_of
from .test_apply import full_plan, low_plan
from .zoo import relative_error, run


def compressed(name: str) -> nn.Module:
    subject = subject_of(name)
    model = subject.copy()
    apply_(model, low_plan(subject.sites))
    return model


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin"])
def test_torch_compile(name: str) -> None:
    model, images = compressed(name), subject_of(name).images
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative_error(whole(images), model(images)) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["timm-vit", "timm-beit", "timm-swin", "timm-relpos", "timm-eva02", "timm-swinv2", "hf-vit", "hf-swin", "hf-sam"],
)
def test_autocast_and_half_precision(name: str) -> None:
    subject = subject_of(name)
    model = subject.copy()
    with torch.no_grad():
        apply_(model, full_plan(subject.sites))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = run(model, subject.images)
        whole = run(model.bfloat16(), subject.images)
        expected = run(subject.copy().bfloat16(), subject.images)
    for got in (mixed, whole):  # as near to the original as the original itself is in this precision
        own_error = relative_error(expected.float(), subject.output)
        assert relative_error(got.float(), subject.output) < max(0.05, 4 * own_error)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "timm-swin", "hf-vit", "hf-swin"])
def test_gradients_in_half_precision(name: str, mixed: bool) -> None:
    """As near to float32's as its own rounding: attention with and without a mask, with all weights or the arithmetic
    alone in bfloat16.
    """
    exact, rounded, images = compressed(name), compressed(name), subject_of(name).images
    run(exact, images).square().mean().backward()
    if not mixed:
        rounded, images = rounded.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = run(rounded, images)
    output.float().square().mean().backward()
    got = torch.cat([p.grad.float().flatten() for p in rounded.parameters() if p.grad is not None])
    expected = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    assert torch.cosine_similarity(got, expected, dim=0) > 0.99


@pytest.mark.parametrize("name", ["timm-vit", "timm-beit", "timm-swin", "timm-eva02", "hf-vit", "hf-dinov2", "hf-swin"])
def test_gradient_checkpointing(name: str) -> None:
    images = subject_of(name).images
    gradients = []
    for checkpointing in (False, True):
        model = compressed(name).train()
        for m in model.modules():
            if "Drop" in type(m).__name__:
                m.eval()
        calls: list[int] = []
        next(m for n, m in model.named_modules() if type(m).__name__ == "LowRankLinear").register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        if checkpointing and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        elif checkpointing:
            model.gradient_checkpointing_enable()
        run(model, images).square().mean().backward()
        assert (len(calls) > 1) == checkpointing  # computed again on the way back
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def attention_of(settings: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    """timm's attention alone in a model, the same at full rank, and tokens."""
    from timm.layers import Attention

    torch.manual_seed(0)
    model = nn.Sequential(Attention(16, num_heads=2, qkv_bias=True, **settings), nn.Linear(16, 16))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    same = nn.Sequential(
        *(
            type(m)(16, num_heads=2, qkv_bias=True, **settings) if i == 0 else nn.Linear(16, 16)
            for i, m in enumerate(model)
        )
    )
    same.load_state_dict(model.state_dict())
    apply_(same, full_plan(ranked(find_sites(same))))
    return model.eval()[0], same.eval()[0], torch.randn(3, 6, 16)


@pytest.mark.parametrize("settings", [{}, {"attn_head_dim": 5, "dim_out": 12}], ids=["square", "narrow"])
def test_masks_pass_through(settings: dict[str, Any]) -> None:
    attention, stand_in, x = attention_of(settings)
    keep = torch.rand(3, 1, 6, 6) > 0.4
    keep |= torch.eye(6, dtype=torch.bool)
    for mask in (
        {"attn_mask": keep},
        {"attn_mask": torch.randn(3, 2, 6, 6)},
        {"attn_mask": torch.randn(6, 6)},
        {"is_causal": True},
    ):
        expected = attention(x, **mask)
        assert relative_error(stand_in(x, **mask), expected) < 1e-5
        assert relative_error(attention(x), expected) > 1e-2


def test_attention_dropout_passes_through() -> None:
    """With dropout on the attention weights rows no longer sum to one, so the value bias stays with the values."""
    attention, stand_in, x = attention_of({"attn_drop": 0.5, "proj_drop": 0.25})
    assert relative_error(stand_in(x), attention(x)) < 1e-5
    assert stand_in.qkv.bias.split(stand_in.widths)[2].any()
    outputs = []
    for module in (attention.train(), stand_in.train()):
        torch.manual_seed(5)
        outputs.append(module(x))
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert relative_error(outputs[0], attention.eval()(x)) > 0.05


def test_attention_dropout_in_parts_keeps_the_value_bias() -> None:
    subject = subject_of("hf-vit")
    model = zoo.hf_model(
        "ViTForImageClassification", "ViTConfig", **zoo.HF, num_labels=7, attention_probs_dropout_prob=0.5
    )()
    model.load_state_dict(subject.original.state_dict())
    outputs = []
    for compress in (False, True):
        if compress:
            apply_(model, full_plan(ranked(find_sites(model))))
        torch.manual_seed(5)
        outputs.append(run(model.train(), subject.images))
    assert relative_error(outputs[1], outputs[0]) < 1e-4
    assert relative_error(outputs[0], subject.output) > 0.05


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("timm-swin", {"img_size": (96, 64), "window_size": (6, 4)}),
        ("timm-beit", {"img_size": (64, 32)}),
        ("timm-relpos", {"img_size": (64, 32)}),
    ],
)
def test_position_tables_can_be_resized_while_compressed(name: str, sizes: dict[str, Any]) -> None:
    """timm resizes them through its attention modules, some by a method, some through their ``rel_pos``."""
    subject = subject_of(name)
    outputs = []
    for compress in (False, True):
        model = subject.copy()
        if compress:
            apply_(model, full_plan(subject.sites))
        model.set_input_size(**sizes)
        images = torch.randn(2, 3, *sizes["img_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(model(images))
    assert relative_error(outputs[1], outputs[0]) < 1e-5


HF_MAPS = ["hf-vit", "hf-dinov2", "hf-clip", "hf-beit", "hf-swin", "hf-swinv2", "hf-dinov3"]


@pytest.mark.parametrize("name", HF_MAPS)
def test_attention_maps_and_implementations(name: str) -> None:
    """transformers' ``output_attentions`` records what it did, and eager and fused attention agree."""
    subject = subject_of(name)
    original, same, low = subject.copy(), subject.copy(), subject.copy()
    with torch.no_grad():
        apply_(same, full_plan(subject.sites))
        apply_(low, low_plan(subject.sites))
        fused = run(low, subject.images)
        if name != "hf-swinv2":
            for model in (original, same, low):
                model.set_attn_implementation("eager")
        assert relative_error(run(low, subject.images), fused) < 1e-5
        expected, maps = (m(subject.images, output_attentions=True).attentions for m in (original, same))
        assert len(expected) == len(maps) > 0
        for a, b in zip(expected, maps, strict=True):
            assert b.shape[1] in (2, 3, 4) and relative_error(b, a) < 1e-4
        changed = low(subject.images, output_attentions=True).attentions
        assert len(changed) == len(maps) and all(m.isfinite().all() for m in changed)


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin"])
def test_sites_are_found_in_a_model_loaded_for_eager_attention(name: str) -> None:
    """Its softmax is taken in float32 whatever the dtype, which must not pass for a broken symmetry."""
    subject = subject_of(name)
    model = subject.copy()
    model.set_attn_implementation("eager")
    assert list(ranked(find_sites(model))) == list(subject.sites)


def test_hooks_on_a_host_module_see_the_same_call() -> None:
    """The attention's place in the model stays: a forward hook on its parent sees tokens in and tokens out."""
    subject = subject_of("timm-vit")
    model = subject.copy()
    apply_(model, Plan(sites={n: SitePlan(keep=2, full=s.full_rank) for n, s in subject.sites.items()}))
    seen: list[torch.Size] = []
    model.blocks[0].attn.register_forward_hook(lambda m, i, o: seen.extend([i[0].shape, o.shape]))
    run(model, subject.images)
    assert seen == [(2, 17, 24)] * 2

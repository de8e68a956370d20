"""What other libraries do to a pipeline takes no adapter away in silence."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.errors import ModelError, UnsupportedSite

from .. import tiny
from ..denoisers import CASES

UNET = CASES["sd1"]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def adapted(name: str = "sd1", where: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    model = CASES[name].model(dtype)
    diffusion.attach(model, name="dog", where=where or CASES[name].where[0], init="random", dtype=dtype)
    return model


def draw(pipe: Any, **more: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a photo of a dog", generator=generator, **how, **more).images


def test_enable_attention_slicing_after_load_keeps_the_adapter(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    plain = draw(pipe)
    diffusion.attach(pipe, name="dog", where="all", init="random")
    with_dog = draw(pipe)
    pipe.enable_attention_slicing()
    assert np.allclose(draw(pipe), with_dog, atol=1e-4) and not np.allclose(with_dog, plain, atol=1e-3)
    pipe.disable_attention_slicing()
    pipe.enable_attention_slicing()
    assert diffusion.adapters(pipe)["dog"].scale == 1.0
    diffusion.unload(pipe)
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert np.allclose(draw(pipe), plain, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sd3", "sd35", "flux"])
@torch.no_grad()
def test_fuse_qkv_projections_after_load_keeps_the_adapter(name: str) -> None:
    case, model = CASES[name], adapted(name, "all")
    with_dog = case.run(model)
    model.fuse_qkv_projections()
    assert relative(case.run(model), with_dog) < 1e-12
    model.unfuse_qkv_projections()
    assert relative(case.run(model), with_dog) < 1e-12
    diffusion.unload(model)
    assert relative(case.run(model), case.run(case.model(torch.float64))) < 1e-12


@torch.no_grad()
def test_an_adapter_comes_to_a_model_with_fused_projections() -> None:
    with_dog = UNET.run(adapted())
    model = UNET.model(torch.float64)
    model.fuse_qkv_projections()
    diffusion.attach(model, name="dog", init="random", dtype=torch.float64)
    assert relative(UNET.run(model), with_dog) < 1e-12
    diffusion.unload(model)
    assert {type(p).__name__ for p in model.attn_processors.values()} == {"FusedAttnProcessor2_0"}


@torch.no_grad()
def test_a_text_encoder_whose_projection_was_exchanged_says_so(tmp_path: Path) -> None:
    """A second case of the kind, of the other host."""
    pipe = tiny.stable_diffusion(tmp_path)
    diffusion.attach(pipe, name="dog", text_encoder=True)
    attention = pipe.text_encoder.encoder.layers[0].self_attn
    attention.q_proj = nn.Linear(16, 16)
    with pytest.raises(
        ModelError, match=r"'dog' cannot act at text_encoder.*a Linear has taken the place of its q_proj"
    ):
        draw(pipe)
    diffusion.unload(pipe)
    draw(pipe)


def test_cross_attention_kwargs_with_scale_0_is_said_to_have_no_effect(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    diffusion.attach(pipe, name="dog", init="random")
    with_dog = draw(pipe)
    with pytest.warns(UserWarning, match=r"cross_attention_kwargs=\{'scale': 0\} acts on LoRAs alone.*set_scale"):
        assert np.array_equal(draw(pipe, cross_attention_kwargs={"scale": 0}), with_dog)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(pipe, cross_attention_kwargs={"scale": 1.0})
        diffusion.unload(pipe)
        draw(pipe, cross_attention_kwargs={"scale": 0})


def test_joint_attention_kwargs_with_a_scale_is_said_to_have_no_effect() -> None:
    model = adapted("flux", dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"joint_attention_kwargs=\{'scale': 0.5\} acts on LoRAs alone"):
        CASES["flux"].run(model, joint_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("state", ["attached", "fused"])
def test_save_pretrained_while_attached_or_fused_is_refused(state: str, tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    diffusion.attach(pipe, name="dog", text_encoder=True)
    if state == "fused":
        diffusion.fuse(pipe)
    for saved in (pipe, pipe.unet, pipe.text_encoder, copy.deepcopy(pipe.unet)):
        with pytest.raises(ModelError, match=r"save_pretrained\(\) would lose the adapters.*unload\(\).*save\(\)"):
            saved.save_pretrained(tmp_path / "saved")
    if state == "fused":
        diffusion.unfuse(pipe)
    diffusion.unload(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe.unet).from_pretrained(tmp_path / "saved" / "unet")
    assert all(a.equal(b) for a, b in zip(again.parameters(), pipe.unet.parameters(), strict=True))


def from_unet(model: Any) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8))


def from_transformer(model: Any) -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2
    )


@pytest.mark.parametrize("state", ["attached", "fused"])
def test_a_controlnet_from_an_adapted_unet_is_refused(state: str) -> None:
    """``ControlNetModel.from_unet`` failed with a raw error of keys or shapes."""
    model = adapted(dtype=torch.float32)
    if state == "fused":
        diffusion.fuse(model)
    whole = model.state_dict()
    with pytest.raises(ModelError, match=r"the state of unet.down_blocks alone cannot be copied.*unload\(\)"):
        from_unet(model)
    assert model.state_dict().keys() == whole.keys()
    if state == "fused":
        diffusion.unfuse(model)
    diffusion.unload(model)
    assert from_unet(model) is not None


def test_a_controlnet_from_an_adapted_transformer_is_refused() -> None:
    """A second case of the kind: ``from_transformer`` copied without the adapter and said nothing."""
    model = adapted("flux", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"the state of transformer\.transformer_blocks alone cannot be copied"):
        from_transformer(model)
    diffusion.unload(model)
    assert from_transformer(model) is not None


@torch.no_grad()
def test_copies_and_pickles_are_watched_and_released_on_their_own() -> None:
    model = adapted(dtype=torch.float32)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        diffusion.unload(copied)
        assert UNET.run(copied).equal(UNET.run(UNET.model()))
        assert not copied._forward_pre_hooks and not copied.down_blocks._state_dict_pre_hooks
        assert from_unet(copied) is not None
    with pytest.raises(ModelError, match="save_pretrained"):
        model.save_pretrained("nowhere")
    assert model._forward_pre_hooks
    model.set_attention_slice(1)
    assert relative(UNET.run(model), UNET.run(adapted(dtype=torch.float32))) < 1e-5


@pytest.mark.parametrize("verb", ["fuse", "merge"])
def test_weights_of_which_the_model_computes_with_copies_are_not_written_to(verb: str) -> None:
    """``fuse_qkv_projections`` copies q, k and v: what is then written to them would have no effect."""
    model = adapted()
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedSite, match=rf"cannot {verb}.*fuse_qkv_projections\(\) has copied its q, k and v"):
        diffusion.fuse(model) if verb == "fuse" else diffusion.merge(model, "dog")
    model.unfuse_qkv_projections()
    diffusion.fuse(model)
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedSite, match=r"cannot unfuse.*fuse_qkv_projections\(\) has copied its q, k and v"):
        diffusion.unfuse(model)
    model.unfuse_qkv_projections()
    diffusion.unfuse(model)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


@torch.no_grad()
def test_unfuse_does_not_throw_away_a_lora_that_was_added_while_fused() -> None:
    model = adapted()
    attached = UNET.run(model)
    diffusion.fuse(model)
    model.add_adapter(lora())
    with_lora = UNET.run(model)
    assert relative(with_lora, attached) > 1e-4
    with pytest.raises(UnsupportedSite, match=r"cannot unfuse.*to_q has become a Linear.*LoRA.*unload that first"):
        diffusion.unfuse(model)
    assert UNET.run(model).equal(with_lora)
    model.unload_lora()
    diffusion.unfuse(model)
    assert UNET.run(model).equal(attached)


@torch.no_grad()
def test_unfuse_does_not_throw_away_a_lora_that_was_merged_while_fused() -> None:
    model = adapted()
    diffusion.fuse(model)
    model.add_adapter(lora())
    model.fuse_lora()
    model.unload_lora()
    with pytest.raises(UnsupportedSite, match=r"cannot unfuse.*to_q has changed, as by fuse_lora\(\)"):
        diffusion.unfuse(model)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_unfuse_after_a_trip_through_16_bit(kind: torch.dtype) -> None:
    model = adapted(dtype=torch.float32)
    attached = UNET.run(model)
    diffusion.fuse(model)
    model.to(kind).to(torch.float32)
    diffusion.unfuse(model)
    assert relative(UNET.run(model), attached) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["graph-may-break", "whole-graph"])
def test_an_adapter_displaced_in_a_compiled_model_acts_or_says_so(whole: bool) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from torch._dynamo.exc import Unsupported

    torch.compiler.reset()  # what another test has compiled of the same code
    case = CASES["sd1"]
    model = case.model()
    plain = case.run(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=whole)
    diffusion.attach(model, init="random")
    expected = case.run(model)
    assert relative(case.run(compiled), expected) < 1e-6 and relative(expected, plain) > 1e-4
    model.set_attn_processor(AttnProcessor2_0())  # as enable_attention_slicing and others do
    if whole:
        with pytest.raises(Unsupported):
            case.run(compiled)
    else:
        assert relative(case.run(compiled), expected) < 1e-6
    model.set_attn_processor(type("Foreign", (AttnProcessor2_0,), {})())
    with pytest.raises(Unsupported if whole else ModelError):
        case.run(compiled)
    diffusion.unload(model)
    model.set_attn_processor(AttnProcessor2_0())
    assert case.run(compiled).equal(plain)

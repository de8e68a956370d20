"""What every family can carry, what is refused and why, and how large an adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import comcat.diffusion as diffusion
from comcat.errors import ModelError, SettingsError, UnsupportedSite

from .. import tiny
from ..denoisers import CASES, Case, unet


def test_every_attention_is_found_or_refused(case: Case) -> None:
    model = case.model()
    found = diffusion.find_adaptable(model)
    assert not found.refused
    processors = {f"{p}.processor" for p in found.attention}
    prefix = "transformer" if hasattr(model, "transformer_blocks") else "unet"
    assert processors == {f"{prefix}.{name}" for name in model.attn_processors}
    assert {a.where for a in found.attention.values()} == set(case.where) - {"all"}
    for where in case.where:
        adapter = diffusion.attach(model, where=where, rank=3)
        assert adapter.modules == {p: a.products for p, a in found.only(where).items()}
        assert sum(p.numel() for p in adapter.parameters()) == found.parameters(3, where) == adapter.bytes() // 2
        assert diffusion.find_adaptable(model) == found  # what is there already does not hide anything
        diffusion.unload(model)


def test_what_each_stream_carries() -> None:
    def widths(name: str, path: str) -> dict[str, int]:
        return diffusion.find_adaptable(CASES[name].model()).attention[path].widths

    both = {"q_up": 16, "k_down": 16, "v_down": 16, "out_up": 16}
    text = {"add_k_down": 16, "add_v_down": 16}
    assert widths("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2") == {
        **both,
        "k_down": 12,
        "v_down": 12,
    }
    assert widths("sd3", "transformer.transformer_blocks.0.attn") == {**both, **text, "add_q_up": 16, "add_out_up": 16}
    assert widths("sd3", "transformer.transformer_blocks.1.attn") == {**both, **text}  # context_pre_only
    assert widths("sd35", "transformer.transformer_blocks.0.attn2") == both
    single = diffusion.find_adaptable(CASES["flux"].model()).attention["transformer.single_transformer_blocks.0.attn"]
    assert single.widths == {"q_up": 16, "k_down": 16} and single.products == ("qk",)
    assert single.missing == {"vo": "its output projection is fused with the MLP's, outside the attention"}


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("sd1", "joint", "UNet2DConditionModel has no joint attention; its attention is cross and self: where='cross'"),
        ("sd3", "cross", "SD3Transformer2DModel has no cross attention; its attention is joint: where='joint'"),
        ("sd3", "self", "SD3Transformer2DModel has no self attention"),
        ("flux", "cross", "FluxTransformer2DModel has no cross attention; its attention is joint: where='joint'"),
    ],
)
def test_the_wrong_kind_of_attention(name: str, where: Any, message: str) -> None:
    model = CASES[name].model()
    before = dict(model.attn_processors)
    with pytest.raises(UnsupportedSite, match=message):
        diffusion.attach(model, where=where)
    assert model.attn_processors == before


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["vo"], {"0.attn": ("vo",), "1.attn": ("vo",)}),
        (["transformer_blocks.1"], {"1.attn": ("qk", "vo")}),
        (["transformer.transformer_blocks.1.attn:qk"], {"1.attn": ("qk",)}),
        (["transformer_blocks.0:qk", "transformer_blocks:vo"], {"0.attn": ("qk", "vo"), "1.attn": ("vo",)}),
    ],
)
@torch.no_grad()
def test_an_adapter_of_chosen_blocks_and_products(only: list[str], expected: Any, tmp_path: Path) -> None:
    case = CASES["sd3"]
    model, found = case.model(), diffusion.find_adaptable(case.model())
    plain = case.run(model)
    adapter = diffusion.attach(model, rank=2, only=only, init="random")
    assert adapter.modules == {
        f"transformer.transformer_blocks.{path}": products for path, products in expected.items()
    }
    assert sum(p.numel() for p in adapter.parameters()) == found.parameters(2, "joint", only)
    acting = case.run(model)
    assert not torch.allclose(acting, plain)
    diffusion.save(model, tmp_path / "a.safetensors", dtype=torch.float32)
    diffusion.fuse(model)
    torch.testing.assert_close(case.run(model), acting, rtol=1e-4, atol=1e-5)
    diffusion.unfuse(model)
    diffusion.unload(model)
    assert torch.equal(case.run(model), plain)
    diffusion.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(case.run(model), acting)


@pytest.mark.parametrize(
    ("only", "said"),
    [
        (["transformer_block.0"], r"chooses no attention; .*did you mean 'transformer_blocks\.0'"),
        (["vo", "kv"], "only='kv' chooses no attention; expected qk, vo, a path such as transformer"),
        (["transformer_blocks.1:kq"], "chooses no attention"),
        (["vo", ""], "got an empty text"),
        ("kv", "only='kv' chooses no attention"),
    ],
)
def test_a_choice_of_nothing_is_told(only: str | list[str], said: str) -> None:
    model = CASES["sd3"].model()
    with pytest.raises(SettingsError, match=said):
        diffusion.attach(model, only=only)
    assert diffusion.adapters(model) == {}


def custom_diffusion(model: Any) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    model.set_attn_processor(
        {n: CustomDiffusionAttnProcessor2_0(hidden_size=8, cross_attention_dim=12) for n in model.attn_processors}
    )


def unknown(model: Any) -> None:
    class Strange:
        def __call__(self, attn: Any, hidden_states: Any) -> Any:
            return hidden_states

    model.set_attn_processor(Strange())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (custom_diffusion, "Custom Diffusion's own weights compute this attention"),
        (unknown, "its processor is a Strange, of which it is not known where it calls softmax attention"),
    ],
)
def test_what_else_computes_attention_is_refused_with_its_reason(change: Any, reason: str) -> None:
    model = CASES["sd1"].model()
    change(model)
    before = dict(model.attn_processors)
    with pytest.raises(UnsupportedSite, match=r"(?s)cannot be adapted: .*attn2 \(.*" + reason):
        diffusion.attach(model)
    assert model.attn_processors == before
    refused = {r.name for r in diffusion.find_adaptable(model).refused}
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2" in refused


def test_added_keys_are_refused() -> None:
    model = unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedSite, match="keys and values of the text are added to those of the picture"):
        diffusion.attach(model)


def test_text_encoders_of_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_3(tmp_path)
    found = diffusion.find_adaptable(pipe)
    assert {p.partition(".")[0] for p in found.only("text")} == {"text_encoder", "text_encoder_2"}
    assert [(r.name, r.reason) for r in found.refused] == [
        (
            "text_encoder_3",
            "T5EncoderModel is no UNet or transformer of diffusers or CLIP text encoder, whose attention alone is "
            "known",
        )
    ]
    assert not set(found.only("text")) & set(found.only("all"))
    adapter = diffusion.attach(pipe, where="joint", text_encoder=True)
    assert set(adapter.modules) == set(found.only("text")) | set(found.only("joint"))
    diffusion.unload(pipe)
    with pytest.raises(ModelError, match="without a text encoder"):
        diffusion.attach(pipe.transformer, where="joint", text_encoder=True)
    pipe.text_encoder = pipe.text_encoder_2 = None
    with pytest.raises(UnsupportedSite, match="T5EncoderModel is no UNet or transformer"):
        diffusion.attach(pipe, where="joint", text_encoder=True)


SD14: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "cross_attention_dim": 768,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "norm_num_groups": 32,
}  # fmt: skip
"""The shapes of Stable Diffusion 1.4's UNet."""


@pytest.mark.parametrize(("where", "megabytes"), [("cross", 1.7), ("all", 3.3)])
def test_the_size_of_a_file_for_stable_diffusion_1_4(tmp_path: Path, where: Any, megabytes: float) -> None:
    with torch.device("meta"):
        model: Any = unet(**SD14)
    adapter = diffusion.attach(model, rank=2, where=where)
    for path, terms in adapter.terms.items():
        attn = model.get_submodule(path.removeprefix("unet."))
        attn.comcat_channels.to_empty(device="cpu")  # the factors alone become real
        for factor in terms.parameters():
            torch.nn.init.normal_(factor)
    file = diffusion.save(model, tmp_path / "dog.safetensors", identifier="V*", prompt="a photo of V* dog")
    assert len(adapter.modules) == (16 if where == "cross" else 32)
    assert adapter.bytes() < file.stat().st_size <= megabytes * 1e6

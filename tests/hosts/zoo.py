"""Tiny models of every family that comcat speaks to, and what is expected of each.

Every parameter is random, those that start at zero included (biases, position tables, LayerScale), so that nothing that
a replacement forgets can hide behind a zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.measure import model_output


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the registry.

    Attributes:
        attentions: how many attention modules have sites. mount: how they are replaced, in one word or several.
        qk, vo: words of the reason why the product does not exist, or None where it does.
        qk_of: attention that has a QK product although others have not.
        refused: words of the reason by the path of each module that is refused as a whole.
    """

    name: str
    build: Callable[[], nn.Module]
    image: int = 32
    attentions: int = 2
    mount: str = "whole"
    qk: str | None = None
    qk_of: tuple[str, ...] = ()
    vo: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model with random weights, the same at every call, in evaluation mode."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.build().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5 if p.shape[0] > 1 else torch.randn(p.shape))
                else:
                    p.add_(0.3 * torch.randn(p.shape))
        return model

    def images(self, count: int = 2, seed: int = 0) -> Tensor:
        return torch.randn(count, 3, self.image, self.image, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output; a masked autoencoder shuffles its patches, so the seed is set."""
    torch.manual_seed(0)
    return model_output(model, images.to(next(model.parameters()).dtype))


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------- by hand


class HandAttention(nn.Module):
    """Heads narrower than the model, no bias anywhere, a plain softmax."""

    def __init__(self, dim: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, 0.7
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, num_heads * width, bias=False) for _ in range(3))
        self.proj = nn.Linear(num_heads * width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (self.scale * q @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class HandBlock(nn.Module):
    def __init__(self, attention: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = attention
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.norm1(x))
        x = x + (y[0] if isinstance(y, tuple) else y)
        return x + self.mlp(self.norm2(x))


class HandModel(nn.Module):
    """A small vision transformer around attention modules of the test's choice."""

    def __init__(self, *attentions: nn.Module, dim: int = 16, hidden: int = 40, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, dim))
        self.blocks = nn.ModuleList([HandBlock(a, dim, hidden) for a in attentions])
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class TorchBlock(nn.Module):
    """A block around ``torch.nn.MultiheadAttention``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class ChannelFirst(nn.Module):
    """Projections fused head by head, (heads, 3, width), not matrix by matrix: looks like timm's, is none."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- timm

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "num_classes": 7,
}


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **settings)

    return build


def gated_vit() -> nn.Module:
    from timm.layers import Attention

    model = timm_model("vit_tiny_patch16_224", **VIT, num_classes=7)()
    for block in model.blocks:
        block.attn = Attention(24, num_heads=3, qkv_bias=True, gated=True)
    return model


def mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1), img_size=32, num_classes=7)


TIMM = [
    Case(name="timm-vit", build=timm_model("vit_tiny_patch16_224", **VIT, num_classes=7)),
    Case(name="timm-vit-no-bias", build=timm_model("vit_tiny_patch16_224", **VIT, num_classes=7, qkv_bias=False,
        proj_bias=False)),
    Case(name="timm-deit", build=timm_model("deit_tiny_patch16_224", **VIT, num_classes=7)),
    Case(name="timm-deit-distilled", build=timm_model("deit_tiny_distilled_patch16_224", **VIT, num_classes=7)),
    Case(name="timm-deit3", build=timm_model("deit3_small_patch16_224", **VIT, num_classes=7)),
    Case(name="timm-dinov2", build=timm_model("vit_small_patch14_dinov2", **VIT)),
    Case(name="timm-dinov2-registers", build=timm_model("vit_small_patch14_reg4_dinov2", **VIT)),
    Case(name="timm-dinov2-swiglu", build=timm_model("vit_giant_patch14_dinov2", **VIT)),
    Case(name="timm-clip", build=timm_model("vit_base_patch32_clip_224", **VIT, num_classes=7)),
    Case(name="timm-siglip", build=timm_model("vit_base_patch16_siglip_224", **VIT), attentions=3,
        mount="whole padded"),
    Case(name="timm-vit-scale-norm", build=timm_model("vit_tiny_patch16_224", **VIT, num_classes=7,
        scale_attn_norm=True), vo="a norm sits between"),
    Case(name="timm-vit-gated", build=gated_vit, vo="a gate sits between"),
    Case(name="timm-vit-qk-norm", build=timm_model("vit_tiny_patch16_224", **VIT, num_classes=7, qk_norm=True),
        mount="padded", qk="q_norm sits between"),
    Case(name="timm-beit", build=timm_model("beit_base_patch16_224", **VIT, num_classes=7)),
    Case(name="timm-beitv2", build=timm_model("beitv2_base_patch16_224", **VIT, num_classes=7,
        use_shared_rel_pos_bias=True, use_rel_pos_bias=False)),
    Case(name="timm-swin", build=timm_model("swin_tiny_patch4_window7_224", **SWIN), image=64, attentions=4),
    Case(name="timm-relpos", build=timm_model("vit_relpos_base_patch16_clsgap_224", **VIT, num_classes=7)),
    Case(name="timm-relpos-bias", build=timm_model("vit_relpos_base_patch16_clsgap_224", **VIT, num_classes=7,
        rel_pos_type="bias")),
    Case(name="timm-relpos-shared", build=timm_model("vit_srelpos_small_patch16_224", **VIT, num_classes=7),
        refused={"shared_rel_pos": "a position bias"}),
    Case(name="timm-eva02", build=timm_model("eva02_tiny_patch14_224", **VIT, num_classes=7), mount="padded",
        qk="rotary"),
    Case(name="timm-eva02-unfused", build=timm_model("eva02_base_patch14_224", **VIT, num_classes=7,
        scale_attn_inner=False), mount="padded", qk="rotary"),
    Case(name="timm-eva-scale-norm", build=timm_model("eva02_base_patch14_224", **VIT, num_classes=7,
        scale_attn_inner=True), attentions=0,
         refused={f"blocks.{i}.attn": "a norm sits between" for i in range(2)}),
    Case(name="timm-dinov3", build=timm_model("vit_small_patch16_dinov3", **VIT), mount="padded", qk="rotary"),
    Case(name="timm-swinv2", build=timm_model("swinv2_tiny_window8_256", **SWIN), image=64, attentions=4,
        mount="padded", qk="cosine"),
    Case(name="timm-sam", build=timm_model("samvit_base_patch16", **VIT, window_size=3, global_attn_indexes=(1,),
        neck_chans=8), mount="padded", qk="computed from q"),
    Case(name="timm-davit", build=timm_model("davit_tiny", depths=(1, 1), embed_dims=(12, 24), num_heads=(1, 2),
        window_size=4, num_classes=7),
         refused={f"stages.{i}.blocks.0.1.attn": "no softmax over keys" for i in range(2)}),
    Case(name="timm-xcit", build=timm_model("xcit_nano_12_p16_224", img_size=32, embed_dim=16, depth=2, num_heads=2,
        num_classes=7), mount="padded", refused={f"blocks.{i}.attn": "no softmax over keys" for i in range(2)}),
    Case(name="timm-mvitv2", build=mvit, attentions=0,
        refused={f"stages.{i}.blocks.0.attn": "no known shape" for i in range(2)}),
    Case(name="timm-hiera", build=timm_model("hiera_tiny_224", img_size=64, embed_dim=8, num_heads=1,
        stages=(1, 1, 1, 1), num_classes=7), image=64, attentions=4, mount="padded", qk_of=("blocks.0.attn",),
        qk="more of W_Q"),
    Case(name="timm-differential", build=timm_model("vit_dlittle_patch16_reg1_gap_256", img_size=32, patch_size=8,
        embed_dim=16, depth=2, num_heads=2, num_classes=7),
         attentions=0, refused={f"blocks.{i}.attn": "more of W_Q" for i in range(2)}),
]  # fmt: skip

# ---------------------------------------------------------------- transformers

HF: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
HF_SWIN = {**SWIN, "image_size": 64, "num_labels": 7}
del HF_SWIN["img_size"], HF_SWIN["num_classes"]
HF_SAM = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "mlp_dim": 48,
    "output_channels": 8,
}


def hf_model(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


TRANSFORMERS = [
    Case(name="hf-vit", build=hf_model("ViTForImageClassification", "ViTConfig", **HF, num_labels=7), mount="parts"),
    Case(name="hf-vit-no-bias", build=hf_model("ViTModel", "ViTConfig", **HF, qkv_bias=False), mount="parts"),
    Case(name="hf-deit", build=hf_model("DeiTForImageClassification", "DeiTConfig", **HF, num_labels=7), mount="parts"),
    Case(name="hf-deit-distilled", build=hf_model("DeiTForImageClassificationWithTeacher", "DeiTConfig", **HF,
        num_labels=7), mount="parts"),
    Case(name="hf-dinov2", build=hf_model("Dinov2ForImageClassification", "Dinov2Config", **HF, num_labels=7),
        mount="parts"),
    Case(name="hf-dinov2-swiglu", build=hf_model("Dinov2Model", "Dinov2Config", **HF, use_swiglu_ffn=True),
        mount="parts"),
    Case(name="hf-dinov2-registers", build=hf_model("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **HF),
        mount="parts"),
    Case(name="hf-clip", build=hf_model("CLIPVisionModelWithProjection", "CLIPVisionConfig", **HF, projection_dim=16),
        mount="parts"),
    Case(name="hf-siglip", build=hf_model("SiglipVisionModel", "SiglipVisionConfig", **HF), attentions=3,
        mount="parts crossed"),
    Case(name="hf-beit", build=hf_model("BeitForImageClassification", "BeitConfig", **HF, num_labels=7,
        use_relative_position_bias=True), mount="parts"),
    Case(name="hf-beit-shared", build=hf_model("BeitModel", "BeitConfig", **HF, use_shared_relative_position_bias=True),
        mount="parts"),
    Case(name="hf-swin", build=hf_model("SwinForImageClassification", "SwinConfig", **HF_SWIN), image=64, attentions=4,
        mount="parts"),
    Case(name="hf-swinv2", build=hf_model("Swinv2ForImageClassification", "Swinv2Config", **HF_SWIN), image=64,
        attentions=4, mount="padded", qk="cosine"),
    Case(name="hf-dinov3", build=hf_model("DINOv3ViTModel", "DINOv3ViTConfig", **HF), mount="padded", qk="rotary"),
    Case(name="hf-dinov3-gated", build=hf_model("DINOv3ViTModel", "DINOv3ViTConfig", **HF, use_gated_mlp=True),
        mount="padded", qk="rotary"),
    Case(name="hf-sam", build=hf_model("SamVisionModel", "SamVisionConfig", **HF_SAM, window_size=3,
        global_attn_indexes=[1]), mount="padded", qk="computed from q"),
    Case(name="hf-mae", build=hf_model("ViTMAEModel", "ViTMAEConfig", **HF), mount="parts"),
]  # fmt: skip

HAND = [
    Case(name="hand-plain", build=lambda: HandModel(HandAttention(16, 2, 6), HandAttention(16, 2, 6))),
    Case(name="hand-torch", build=lambda: HandModel(TorchBlock(16, 2), TorchBlock(16, 2)), mount="crossed"),
    Case(name="hand-head-by-head", build=lambda: HandModel(ChannelFirst(16, 2)), attentions=1,
        mount="padded"),
]  # fmt: skip

CASES = {case.name: case for case in TIMM + TRANSFORMERS + HAND}

"""Models whose tokens know their places, or whose trunk is no list of tokens, are refused with the true reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import ModelError
from comcat.statistics.trunk import find_trunk


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **settings)

    return build


def dinov3() -> nn.Module:
    import transformers as tf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return tf.DINOv3ViTModel(tf.DINOv3ViTConfig(image_size=32, patch_size=8, **sizes))


def swin_of_transformers() -> nn.Module:
    import transformers as tf

    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
    return tf.SwinModel(tf.SwinConfig(image_size=32, patch_size=4, **sizes))


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2}
HIERA_SIZES = {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
HIERA = "fewer tokens|does not pass|another number"
ROTARY = "rotary positions"
REFUSED = {
    "eva02": (timm_model("eva02_tiny_patch14_224", **SMALL), 32, ROTARY),
    "dinov3-timm": (timm_model("vit_small_patch16_dinov3", **SMALL), 32, ROTARY),
    "dinov3": (dinov3, 32, ROTARY),
    "relative": (timm_model("vit_relpos_small_patch16_224", **SMALL), 32, "fewer tokens"),
    "beit": (timm_model("beit_base_patch16_224", **SMALL), 32, "fewer tokens"),
    "hiera": (timm_model("hiera_tiny_224", **HIERA_SIZES), 64, HIERA),
    "swin": (timm_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN), 32, "8 × 8 × 16"),
    "swin-transformers": (swin_of_transformers, 32, "fewer tokens|more than its tokens|windows"),
    "resnet": (timm_model("resnet10t"), 32, "no block|no trunk|no list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_true(name: str) -> None:
    build, size, reason = REFUSED[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(1, 3, size, size)
    with pytest.raises(ModelError, match=reason):
        comcat.merge(model, [torch.randn(2, 3, size, size)], keep=0.7)
    try:
        trunk = find_trunk(model, x)
    except ModelError:
        return
    assert not trunk.sites and {r.name.rpartition(":")[2] for r in trunk.refused} == {"tokens"}

"""Tiny models and pictures that several tests share."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comcat.sites import Sites


def tiny_vit(**arguments) -> nn.Module:
    import timm

    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
        **arguments,
    }
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings).eval()
    shake(model)
    return model


def timm_folder(place: Path) -> Path:
    """The tiny model with ten classes in a folder of timm's, as ``timm:`` models look on disk."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    save_file(tiny_vit(num_classes=10).state_dict(), place / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 10,
        "model_args": {**sizes, "num_heads": 3, "num_classes": 10}, "pretrained_cfg": {**cfg, "num_classes": 10},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    return place


def shake(model: nn.Module, scale: float = 0.4) -> None:
    """Random values everywhere, biases and zero initialisations included, so that nothing is trivially right."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * scale * p.shape[-1] ** -0.5 * 2)


def ranked(sites: Sites) -> Sites:
    """The sites that have ranks: all but hidden units."""
    return sites.only("qk", "vo", "linear")


def pictures(count: int = 12, batch: int = 4, size: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(min(batch, count - i), 3, size, size, generator=generator) for i in range(0, count, batch)]

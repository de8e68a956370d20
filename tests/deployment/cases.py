"""Models to export, and what a file of theirs is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import comcat

from ..hosts.zoo import CASES

FAMILIES = (
    "timm-vit timm-deit timm-dinov2 timm-clip timm-beit timm-swin hf-vit hf-dinov2 hf-siglip hf-swin hand-torch"
).split()
"""One of each family that must export."""


def compressed(name: str, reduce: float = 0.3) -> tuple[nn.Module, list[Tensor]]:
    """A tiny model with ranks of its own in every layer and fewer units, and pictures."""
    case = CASES[name]
    images = case.images(8)
    small = comcat.compress(case.model(), calibration=[images], reduce=reduce)
    return small, [images]


class Dense(nn.Module):
    """Pictures to a map of logits, as a segmentation model's head gives it."""

    num_classes = 0

    def __init__(self, backbone: nn.Module, classes: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ConvTranspose2d(24, classes, 4, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone.forward_features(images)[:, 1:]  # type: ignore[operator]
        return self.head(features.mT.unflatten(2, (4, 4)))


class Broken(nn.Module):
    """A forward that no graph can hold, or that no file can match."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.calls = kind, nn.Linear(12, 5), 0

    def forward(self, images: Tensor) -> Tensor:
        y = self.layer(images.unfold(2, 16, 16).mean((2, 3)).flatten(1)[:, :12])
        if self.kind == "values" and y.sum() > 0:
            return y + 1
        if self.kind == "random":
            return y + torch.randn(())
        if self.kind == "batch":
            return y + torch.zeros(2, 5)
        if self.kind == "operator":
            return torch.special.bessel_j0(y)
        if self.kind == "text":
            return {"answer": "none"}  # type: ignore[return-value]
        return y

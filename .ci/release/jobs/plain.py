"""A model of plain torch, and pictures: what every job works on."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn


class Plain(nn.Module):
    """A small vision transformer that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


torch.manual_seed(0)
model = Plain().eval()
batches = [torch.randn(8, 3, 32, 32) for _ in range(4)]


def picture_folder() -> Path:
    """A folder of ten classes of pictures."""
    folder = Path("classes")
    for number in range(40):
        place = folder / f"class{number % 10}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 20 + number).convert("RGB").save(place)
    return folder

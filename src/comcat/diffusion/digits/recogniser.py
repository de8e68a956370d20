"""A classifier of digits, trained apart from every pipeline: says what a generated picture shows, and gives features
for KID and FID.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...errors import DataError
from ...runs.seeding import seeded
from .scans import scans_from, scans_of

FEATURES = 64
_EPOCHS, _BATCH, _RATE = 20, 64, 2e-3


class Recogniser(nn.Module):
    """Tells the ten digits apart. Takes scans (n, 1, 8, 8) in 0…1, gives logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, scans: Tensor) -> Tensor:
        return self.head(self.body(scans))

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What the last layer sees of pictures of any size and ink, (n, 64) float32."""
        return self.body(scans_from(list(_some(pictures))))

    @torch.no_grad()
    def recognise(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The digit that each picture shows, (n,)."""
        return self(scans_from(list(_some(pictures)))).argmax(1)

    def rate(self, pictures: Sequence[Image.Image], digit: int) -> float:
        """The share of pictures that show a digit, 0 to 1."""
        return float((self.recognise(pictures) == digit).float().mean())


def train_recogniser(seed: int = 0) -> Recogniser:
    """A recogniser trained on the training part of all ten digits, in seconds; in eval mode."""
    scans, digits = scans_of("train")
    with seeded(seed), torch.enable_grad():
        model = Recogniser()
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
        steps = _EPOCHS * -(-len(scans) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(_EPOCHS):
            for index in torch.randperm(len(scans)).split(_BATCH):
                # Generated digits lie a little elsewhere, and are of another brightness, than scans.
                batch = scans[index].roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
                batch = batch * (0.7 + 0.3 * torch.rand(len(index), 1, 1, 1)) + 0.05 * torch.randn_like(batch)
                loss = F.cross_entropy(model(batch), digits[index], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _some(pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
    if not pictures:
        raise DataError("got no pictures to recognise, expected at least one")
    return pictures

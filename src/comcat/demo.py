"""A model and data that need no download: a small vision transformer trained on the built-in digits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, open_pictures
from .errors import ModelError
from .files import read_tensors, write_tensors

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
}
DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "mean": (0.3,) * 3,
    "std": (0.38,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def digits_model(cache: Path, *, epochs: int = 40, seed: int = 0, progress: bool = True) -> nn.Module:
    """The small model, trained on ``digits:train`` or read from ``cache`` (a safetensors file), in eval mode."""
    try:
        import timm
    except ImportError:
        raise ModelError("the demo needs timm: install comcat[timm]") from None

    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, pretrained=False, pretrained_cfg_overlay=DATA_CONFIG, **ARGUMENTS)
    if cache.is_file():
        model.load_state_dict(read_tensors(cache))
        return model.eval()
    from .models import preprocess_of

    loader = batches(open_pictures("digits:train"), preprocess_of(model), batch_size=256)
    images, labels = (torch.cat(t) for t in zip(*loader, strict=True))
    train(model, images, labels, epochs=epochs, seed=seed, progress=progress)
    write_tensors(cache, model.state_dict())
    return model


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    progress: bool,
    batch_size: int = 64,
    rate: float = 1e-3,
) -> None:
    """AdamW with a cosine, shifts by up to one pixel as augmentation; images (n, 3, height, width) all in memory."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(epochs), desc="training a small ViT on digits", unit="epoch", disable=not progress)
    for _ in bar:
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            batch = images[index].roll(shift, dims=(2, 3))
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()

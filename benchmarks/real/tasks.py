"""The three tasks: a model, what to calibrate it on, what it is judged on and by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.measure import model_output

from . import data, models
from .measure import Table
from .photographs import photographs


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the benchmark.

    ``only`` names the parts that may shrink: the trunk, never a head or a decoder. ``tables`` turns outputs, labels
    and the dense model's outputs into tables by name; the first is the score.
    """

    name: str
    about: str
    build: Callable[[], nn.Module]
    pixels: Callable[..., data.Pixels]
    tables: Callable[[Tensor, Tensor, Tensor], dict[str, Table]]
    only: tuple[str, ...]
    calibration: int
    batch: int

    def calibration_batches(self, seed: int, count: int | None = None) -> list[Tensor]:
        """Normalised pictures drawn by seed, in batches."""
        pixels = self.pixels("calibration", count or self.calibration, seed)
        return [images for images, _ in pixels.batches(self.batch)]


@torch.no_grad()
def outputs(model: nn.Module, pixels: data.Pixels, batch: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """What a model says of all pictures: logits (pictures, classes), or (pictures, height · width)."""
    said = [model_output(model, images.to(device, dtype)).float().cpu() for images, _ in pixels.batches(batch)]
    return torch.cat(said)


def classes(said: Tensor, labels: Tensor, dense: Tensor) -> dict[str, Table]:
    """Top-1, agreement with the dense model, and KL(dense ‖ model) in hundredths of a nat."""
    right, same = said.argmax(1) == labels, said.argmax(1) == dense.argmax(1)
    ours, theirs = said.float().log_softmax(1), dense.float().log_softmax(1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    values = {"top1": right, "agreement": same, "divergence": divergence}
    return {name: Table.of_means(v.numpy()) for name, v in values.items()}


def against_dense(said: Tensor, labels: Tensor, dense: Tensor) -> dict[str, Table]:
    """IoU of the mask (logit above 0) with the dense model's own: mean over pictures, and over all pixels.

    Two empty masks are alike. The mean gives small masks the weight of large ones, so it is the stricter of the two.
    """
    both, either = _overlap(said > 0, dense > 0)
    iou = torch.where(either > 0, both / either.clamp_min(1), 1.0)
    pooled = Table(*(a[:, None].numpy().astype(np.uint32) for a in (both, either)))
    return {"iou": Table.of_means(iou.numpy()), "pooled_iou": pooled}


def against_truth(said: Tensor, labels: Tensor, dense: Tensor) -> dict[str, Table]:
    """IoU over all pixels: with the true masks, mean of nuclei and background, and each alone; with the dense mask."""
    mask, true = said > 0, labels.flatten(1).bool()
    nuclei, background, kept = _overlap(mask, true), _overlap(~mask, ~true), _overlap(mask, dense > 0)
    tables = {
        "mean_iou": tuple(torch.stack(pair, 1) for pair in zip(nuclei, background, strict=True)),
        **{
            name: tuple(a[:, None] for a in pair)
            for name, pair in (("nuclei", nuclei), ("background", background), ("agreement", kept))
        },
    }
    return {name: Table(*(a.numpy().astype(np.uint32) for a in pair)) for name, pair in tables.items()}


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (pictures,) in both masks and in either."""
    return (a & b).sum(1), (a | b).sum(1)


CLASSIFIER = Task(
    name="classifier",
    about="DINOv2-small with a linear CIFAR-10 head, 112 pixels",
    build=models.classifier,
    pixels=data.cifar10,
    tables=classes,
    only=("blocks",),
    calibration=512,
    batch=64,
)
SALIENCY = Task(
    name="saliency",
    about="DINOv2-small (transformers) with a decoder of saliency, 224 pixels; IoU with the dense model's mask",
    build=models.saliency,
    pixels=photographs,
    tables=against_dense,
    only=("backbone.encoder",),
    calibration=256,
    batch=16,
)
NUCLEI = Task(
    name="nuclei",
    about="DINOv2-small (transformers) with a linear mask head, 392 pixels; mean IoU of nuclei and background",
    build=models.nuclei,
    pixels=data.nuclei,
    tables=against_truth,
    only=("backbone.encoder",),
    calibration=64,
    batch=8,
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CLASSIFIER,
        SALIENCY,
        replace(SALIENCY, name="saliency-timm", build=lambda: models.saliency("timm"), only=("backbone.blocks",)),
        NUCLEI,
    )
}

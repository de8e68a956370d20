"""A short tuning of a small model on what the dense one says, for classes and for maps alike."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.measure import model_output

from .data import Pixels


def distil(
    student: nn.Module,
    teacher: nn.Module,
    pixels: Pixels,
    *,
    steps: int,
    batch: int,
    seed: int,
    rate: float = 5e-5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Train a model in place for some steps to say what the teacher says. No labels; half of the batches are mirrored.

    Classes by KL divergence, maps by cross-entropy of every pixel with the teacher's probability. AdamW, the rate up
    over a tenth of the steps and then down by a cosine; batch norms of a decoder keep their statistics. Products are
    computed in ``dtype``, by autocast. Returns the loss of the first and the last tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(student.parameters()).device
    wanted = [p for p in student.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in wanted]
    for p in wanted:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    losses: list[float] = []
    for _ in range(steps):
        images = _drawn(pixels, batch, generator).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):  # anew each step: it keeps casts
            with torch.no_grad():
                aim = model_output(teacher, images)
            loss = distance(model_output(student, images), aim)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for p, flag in zip(wanted, flags, strict=True):
        p.grad = None
        p.requires_grad_(flag)
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "loss": [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])],
    }


def distance(ours: Tensor, aim: Tensor) -> Tensor:
    """KL(teacher ‖ student) of logits (batch, classes), or the cross-entropy of maps (batch, pixels) of many logits."""
    if aim.shape[1] <= 1000:
        return F.kl_div(ours.log_softmax(1), aim.log_softmax(1), log_target=True, reduction="batchmean")
    return F.binary_cross_entropy_with_logits(ours, aim.sigmoid())


def pace(step: int, steps: int) -> float:
    """The share of the peak rate at a step."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _drawn(pixels: Pixels, batch: int, generator: torch.Generator) -> Tensor:
    order = torch.randint(len(pixels), (batch,), generator=generator)
    images = next(Pixels(pixels=pixels.pixels[order], labels=order, origins=order).batches(batch))[0]
    return images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images

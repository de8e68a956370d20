"""What tuning minimises: losses a picture, of labels, of a teacher's logits and of a teacher's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.maps import Kind, divergences
from ..measure.running import call, unwrap
from .settings import TuneSettings
from .teachers import rows_or_maps


@dataclass(frozen=True)
class Heads:
    """What a model in training says: logits (batch, classes), and those of a distillation token's head if any; or maps
    (batch, channels, height, width).
    """

    label: Tensor
    distilled: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """What the model says in evaluation: the heads' average."""
        return self.label if self.distilled is None else (self.label + self.distilled) / 2


def heads_of(model: nn.Module, images: Tensor) -> Heads:
    """One forward.

    Distilled DeiT of timm (once :func:`train_both_heads`) and of transformers have two heads, others one.
    """
    if _has_two_heads(model):
        output = call(model, images)
        if isinstance(output, Mapping):
            output = output["cls_logits"], output["distillation_logits"]
        label, distilled = output
        return Heads(label.float(), distilled.float())
    return Heads(rows_or_maps(model, images).float())


def train_both_heads(model: nn.Module) -> None:
    """Have a distilled model of timm say both of its heads' logits while it trains."""
    if callable(switch := getattr(model, "set_distilled_training", None)):
        switch(True)


def _has_two_heads(model: nn.Module) -> bool:
    inner: Any = unwrap(model)
    return bool(getattr(inner, "distilled_training", False)) or hasattr(inner, "distillation_classifier")


def label_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, (batch,).

    ``target``: classes (batch,), or distributions (batch, classes), which mixup has smoothed already.
    """
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=0.0 if target.ndim == 2 else smoothing)


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's likeliest class, (batch,) (Touvron et al. 2021, Eq. 3)."""
    return F.cross_entropy(logits, teacher.argmax(1), reduction="none")


def soft_distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² KL(softmax(teacher/τ) ‖ softmax(logits/τ)), (batch,) (Hinton et al. 2015)."""
    ours, theirs = (x.div(temperature).log_softmax(1) for x in (logits, teacher))
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1) * temperature**2


def map_distillation(ours: Tensor, theirs: Tensor, kind: Kind, *, hard: bool, temperature: float) -> Tensor:
    """How far maps (batch, channels, height, width) are from a teacher's, mean over pixels: (batch,).

    Of class scores, soft or hard distillation at every pixel; of the logits of a mask, the same with two classes; of
    values without a distribution, as depths, ‖y − y*‖² / ‖y*‖².
    """
    if kind == "values":
        return feature_loss([ours], [theirs])
    if hard and kind == "map of scores":
        return hard_distillation(ours, theirs).flatten(1).mean(1)
    if hard:
        return F.binary_cross_entropy_with_logits(ours, (theirs > 0).float(), reduction="none").flatten(1).mean(1)
    places = ours[0, 0].numel()
    return divergences(theirs / temperature, ours / temperature, kind).float() * temperature**2 / places


def feature_loss(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """‖f − f*‖² / ‖f*‖² a picture, averaged over blocks: (batch,).

    Features are (batch, …), the teacher's marked with a star.
    """
    ratios = []
    for mine, aim in zip(ours, theirs, strict=True):
        mine, aim = mine.float().flatten(1), aim.float().flatten(1)
        ratios.append((mine - aim).square().sum(1) / aim.square().sum(1).clamp_min(1e-12))
    return torch.stack(ratios).mean(0)


@dataclass(frozen=True)
class Objective:
    """The loss of a picture: (1 − α) labels + α distillation + λ features.

    A model of two heads learns labels with the one and distillation with the other, as DeiT does (its Eq. 3); where
    there is but one of these, both heads learn it. ``maps``: what the model's maps say, where it gives maps.
    """

    settings: TuneSettings
    labelled: bool
    distillation: str
    maps: Kind | None = None

    @property
    def alpha(self) -> float:
        """Share of distillation."""
        if self.distillation == "none":
            return 0.0
        return self.settings.alpha if self.labelled else 1.0

    def parts(self, heads: Heads, target: Tensor | None, teacher: Tensor | None) -> dict[str, Tensor]:
        """The losses (batch,) of labels and of distillation, as far as they are part of the objective."""
        s = self.settings
        teacher = None if self.distillation == "none" else teacher  # which may be there for its features alone
        found: dict[str, list[Tensor]] = {}
        both = [heads.label] if heads.distilled is None else [heads.label, heads.distilled]
        if target is not None and self.alpha < 1:
            learn = both if teacher is None else both[:1]
            found["label_loss"] = [label_loss(logits, target, s.smoothing) for logits in learn]
        if teacher is not None:
            learn = both[-1:] if found else both
            if self.maps is not None:
                hard = self.distillation == "hard"
                found["distillation_loss"] = [
                    map_distillation(maps, teacher, self.maps, hard=hard, temperature=s.temperature) for maps in learn
                ]
            elif self.distillation == "hard":
                found["distillation_loss"] = [hard_distillation(logits, teacher) for logits in learn]
            else:
                found["distillation_loss"] = [soft_distillation(logits, teacher, s.temperature) for logits in learn]
        return {name: torch.stack(losses).mean(0) for name, losses in found.items()}

    def total(self, parts: Mapping[str, Tensor], feature_weight: float) -> Tensor:
        """The loss (batch,) of its parts."""
        weights = {
            "label_loss": 1 - self.alpha,
            "distillation_loss": self.alpha,
            "feature_loss": feature_weight,
        }
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)

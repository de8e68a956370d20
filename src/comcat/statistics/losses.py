"""Losses on labels that a model draws itself: what makes gradients where there are no labels.

The second moment of their gradient is the Fisher information of the model's own distribution. Class scores take drawn
classes, a map of class scores a class for every pixel, a map of one channel with scores of either sign a Bernoulli
label for every pixel. Values without a distribution (features, depths, boxes) take Gaussian noise on the values brought
to length one, so that each direction counts as much as it turns the output; one number a picture is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ModelError, NumericsError
from ..measure.maps import divergences, feature, kind_of

_SAID = (
    ("logits", "pred_boxes", "pred_masks"),
    ("class_queries_logits", "masks_queries_logits"),
    ("predicted_depth",),
    ("pred_masks", "iou_scores"),
    ("image_embeds",),
    ("pooler_output",),
    ("feature_maps",),
    ("last_hidden_state",),
)
"""What models of transformers are for, by the names of their outputs; the first group of which one is there counts."""


def sampled_loss(output: Any, classes: frozenset[int], generator: torch.Generator) -> Tensor:
    """The loss, summed over pictures and pixels, of whatever a model gives: a tensor or a structure of tensors, ().

    Args:
        classes: numbers of classes that scores may be over (:func:`comcat.hosts.classes.classes_of`).

    Raises:
        NumericsError: if an output holds NaN or infinity. ModelError: if no output depends on the pictures.
    """
    said = [t for t in told(output) if t.is_floating_point() and t.requires_grad]
    if not said:
        raise ModelError(
            "the model's output does not depend on the pictures by anything that can be differentiated; "
            "statistic 'activation' needs no gradient"
        )
    losses = [_of_tensor(t.float(), classes, generator) for t in said]
    return torch.stack(losses).sum()


def told(output: Any) -> list[Tensor]:
    """The tensors that count, in order; depths (batch, height, width) as a map of one channel."""
    if isinstance(output, Mapping):
        named = next((names for names in _SAID if output.get(names[0]) is not None), tuple(output))
        output = {name: output[name] for name in named if output.get(name) is not None}
        if "predicted_depth" in output:
            output["predicted_depth"] = output["predicted_depth"].unsqueeze(1)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _of_tensor(output: Tensor, classes: frozenset[int], generator: torch.Generator) -> Tensor:
    """The loss of one tensor (batch, …)."""
    if not output.ndim:
        raise ModelError("the model gives one number for all pictures together, as a loss is; expected a row a picture")
    values = output.detach()
    if not torch.isfinite(values).all():
        raise NumericsError("the model's output holds NaN or infinite values on the calibration pictures")
    kind = kind_of(values, classes)
    if kind == "scores":
        return F.cross_entropy(output, _drawn(values, generator), reduction="sum")
    if kind == "map of scores":
        scores = output.movedim(1, -1).flatten(0, -2)  # (pixels, classes)
        return F.cross_entropy(scores, _drawn(scores.detach(), generator), reduction="sum")
    if kind == "map of one score":
        chances = values.sigmoid().cpu()
        labels = (torch.rand(chances.shape, generator=generator) < chances).to(output)
        return F.binary_cross_entropy_with_logits(output, labels, reduction="sum")
    said = output if kind == "one number" else feature(output)
    return (said * torch.randn(said.shape, generator=generator).to(said)).sum()


def divergence(before: Any, after: Any, classes: frozenset[int]) -> float:
    """How far an output has moved: nats, summed over pictures and pixels.

    It is the Kullback–Leibler divergence of the distributions whose labels :func:`sampled_loss` draws, so for small
    changes it is what that loss's second moments predict: of classes, of classes or a Bernoulli label at every pixel,
    of a Gaussian of variance one around values of length one.
    """
    pairs = zip(told(before), told(after), strict=True)
    return sum(
        float(divergences(b, a, kind_of(b, classes)).sum())
        for b, a in ((b.detach().float(), a.detach().float()) for b, a in pairs if b.is_floating_point())
    )


def _drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row of scores (rows, classes), drawn from what they say: (rows,)."""
    return torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(scores.device)

"""What an output says: scores of classes, maps, or values; and how far apart two are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Kind = Literal["scores", "map of scores", "map of one score", "one number", "values"]


def kind_of(values: Tensor, classes: Collection[int]) -> Kind:
    """What one output tensor (batch, …) says.

    A map of one channel with values of either sign is read as the logits of a mask. One number a picture, a binary
    classifier's logit or what a regression says, is taken as it is: brought to length one, its sign alone would stay.

    Args:
        classes: numbers of classes that scores may be over (:func:`comcat.hosts.classes.classes_of`).
    """
    if is_one_number(values):
        return "one number"
    if values.ndim == 2 and values.shape[1] in classes:
        return "scores"
    if values.ndim == 4 and values.shape[1] > 1 and values.shape[1] in classes:
        return "map of scores"
    if values.ndim == 4 and values.shape[1] == 1 and values.min() < 0 < values.max():
        return "map of one score"
    return "values"


def is_one_number(values: Tensor) -> bool:
    """Whether an output tensor says a single number of each picture, (batch,) or (batch, 1)."""
    return values.ndim in (1, 2) and values[:1].numel() == 1


def feature(output: Tensor) -> Tensor:
    """Values brought to length one, (batch, values)."""
    output = output.mean(1) if output.ndim == 3 else output  # tokens say together what they say in the mean
    return F.normalize(output.flatten(1), dim=-1)


def divergences(before: Tensor, after: Tensor, kind: Kind) -> Tensor:
    """How far an output has moved, in nats a picture, summed over pixels: (batch,).

    The Kullback–Leibler divergence of classes, of classes or a Bernoulli label at every pixel, or of a Gaussian of
    variance one around values of length one, or around one number.
    """
    if kind == "one number":
        return (before - after).double().square().flatten() / 2
    if kind in ("scores", "map of scores"):
        was, now = (t.double().log_softmax(1) for t in (before, after))
        return (was.exp() * (was - now)).flatten(1).sum(1)
    if kind == "map of one score":
        chance, odds = before.double().sigmoid(), before.double() - after.double()
        grown = F.softplus(after.double()) - F.softplus(before.double())
        return (chance * odds + grown).flatten(1).sum(1)
    return (feature(before) - feature(after)).double().square().sum(1) / 2


def agreements(before: Tensor, after: Tensor, kind: Kind) -> Tensor:
    """Whether the likeliest class is the same; of maps, at what share of the pixels: (batch,)."""
    if kind == "map of one score":
        same = (before > 0) == (after > 0)
    else:
        same = before.argmax(1) == after.argmax(1)
    return same.double().flatten(1).mean(1) if same.ndim > 1 else same.double()

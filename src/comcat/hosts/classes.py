"""How many classes a model tells apart, by what its modules say of themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

_HEADS = ("head", "heads", "fc", "classifier")


def classes_of(model: nn.Module) -> frozenset[int]:
    """The numbers of classes that a model's output may be over; none for a backbone, nor where there is one: a single
    number is no distribution, whatever it is of.

    Any module inside may say it, so that a wrapper around a classifier is one: ``num_classes`` (timm, torchvision), or
    a config with labels beside a classifier (transformers). Where nothing in the model says anything, it is the width
    of a head, by its usual names, or of the last layer, if that is linear.
    """
    said = [number for module in model.modules() if (number := _said(module)) is not None]
    if said:
        return frozenset(number for number in said if number > 1)
    heads = [child for name, child in model.named_children() if name in _HEADS] or [model]
    leaves = [[m for m in head.modules() if next(m.children(), None) is None][-1:] for head in heads]
    return frozenset(m.out_features for last in leaves for m in last if isinstance(m, nn.Linear) and m.out_features > 1)


def _said(module: nn.Module) -> int | None:
    """What a module says itself: 0 for none, None where it says nothing."""
    classes = getattr(module, "num_classes", None)
    if isinstance(classes, int) and not isinstance(classes, bool):
        return classes
    config: Any = getattr(module, "config", None)
    if not hasattr(module, "main_input_name") or config is None:
        return None
    heads = [child for name, child in module.named_children() if "classifier" in name or name == "decode_head"]
    labels = getattr(config, "num_labels", 0)
    return labels if any(not isinstance(head, nn.Identity) for head in heads) and isinstance(labels, int) else 0

"""Models of plain timm and transformers with narrower heads and feed-forwards, as far as their arguments can say it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, StoreError, counted
from ..models import Origin
from ..models.failures import first_line
from .uniform import Shape


def narrower_transformers(thin: Any, origin: Origin, shape: Shape) -> nn.Module:
    """A model of ``thin``'s class with random weights, whose config says its widths.

    Raises StoreError where no config does; the message says why.
    """
    cls, constructor = type(thin), origin.arguments.get("constructor", {})
    refused: list[str] = []
    for config in _configs(thin, shape, refused):
        if shape.rank is not None:
            config.head_dim = shape.rank
        try:
            with torch.random.fork_rng(devices=[]):
                made = cls(config, **constructor).eval()
        except Exception as error:  # classes that do not know a setting fail in ways of their own
            refused.append(f"{cls.__name__} cannot be built with {_in_words(shape)}: {first_line(error)}")
            continue
        if _fits(made, thin, shape):
            return made
    reason = refused[0] if refused else f"{cls.__name__} takes no width of its feed-forwards from its config"
    raise StoreError(f"no stock export: {reason}")


def narrower_timm(thin: nn.Module, origin: Origin, shape: Shape) -> tuple[nn.Module, Origin]:
    """A model of timm with random weights whose feed-forwards are as wide as ``thin``'s, and how to build it.

    Raises StoreError where ``mlp_ratio`` cannot say it.
    """
    reason = f"{origin.name} of timm takes no mlp_ratio that makes {_in_words(shape)}"
    for ratio in _ratios(shape):
        candidate = replace(origin, arguments={**origin.arguments, "mlp_ratio": ratio})
        try:
            with torch.random.fork_rng(devices=[]):
                made = candidate.build()
        except ModelError as error:
            reason = str(error)
            continue
        if _fits(made, thin, shape):
            return made, candidate
    raise StoreError(f"no stock export: {reason}")


def _configs(thin: Any, shape: Shape, refused: list[str]) -> Iterator[Any]:
    """Configs that may say how wide the feed-forwards are; what a config does not take is added to ``refused``."""
    if not shape.units:
        yield copy.deepcopy(thin.config)
        return
    units = next(iter(shape.units.values()))
    places = _places(thin.config)
    for place, name in places:
        for value in [units] if name == "intermediate_size" else _ratios(shape):
            config = copy.deepcopy(thin.config)
            part = config if place is None else getattr(config, place)
            try:
                setattr(part, name, value)
            except Exception:  # transformers checks the type; the ratio of some classes is a whole number
                width = next(iter(shape.feedforwards.values())).in_features
                refused.append(
                    f"the config of {type(thin).__name__} takes whole numbers for {name}, so multiples of {width} "
                    f"hidden units, got {units}: compress with multiple={width}"
                )
                continue
            yield config
    if not places:
        refused.append(f"the config of {type(thin).__name__} says no width of its feed-forwards")


def _places(config: Any) -> list[tuple[str | None, str]]:
    """Where a config says how wide its feed-forwards are: in itself, or in that of a part."""
    import transformers

    parts = {None: config} | {k: v for k, v in vars(config).items() if isinstance(v, transformers.PreTrainedConfig)}
    names = ("intermediate_size", "mlp_ratio")
    return [(place, name) for place, part in parts.items() for name in names if hasattr(part, name)]


def _ratios(shape: Shape) -> Iterator[float]:
    """Ratios of hidden units to channels that may give the width; a packed gated layer counts its units twice."""
    name, site = next(iter(shape.feedforwards.items()))
    for width in (shape.units[name], 2 * shape.units[name]):
        ratio = width / site.in_features
        yield int(ratio) if ratio.is_integer() else ratio
        yield (width + 0.5) / site.in_features  # a ratio that survives being cut to a whole number of units


def _fits(made: nn.Module, thin: nn.Module, shape: Shape) -> bool:
    """Whether the feed-forwards of both have one shape."""
    for site in shape.feedforwards.values():
        for path in site.modules:
            ours, theirs = (m.get_submodule(path).get_parameter("weight") for m in (thin, made))
            if ours.shape != theirs.shape:
                return False
    return True


def _in_words(shape: Shape) -> str:
    said = [] if shape.rank is None else [f"head_dim {shape.rank}"]
    said += [counted(next(iter(shape.units.values())), "hidden unit")] if shape.units else []
    return " and ".join(said)

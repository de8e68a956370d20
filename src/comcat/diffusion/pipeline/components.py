"""The parts of a pipeline that carry adapters, by the names that diffusers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ModelError
from ...hosts import clip, diffusers
from ...hosts.diffusers import AdaptableAttention, RefusedAttention

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


_FUSED = "comcat_fused"


@dataclass(frozen=True)
class Fused:
    """What stood where wider projections stand now: modules by path below the attention, attributes by name, and the extra channels."""

    modules: Mapping[str, nn.Module]
    attributes: Mapping[str, Any]
    channels: nn.Module


def fused(attention: Any) -> Fused | None:
    """What was fused into an attention's weights, or None."""
    return getattr(attention, _FUSED, (None,))[0]


def set_fused(attention: Any, state: Fused | None) -> None:
    if state is None:
        delattr(attention, _FUSED)
    else:
        setattr(attention, _FUSED, (state,))  # in a tuple: none of it is part of the model while it is fused


@dataclass(frozen=True)
class Component:
    """One model of a pipeline. ``name`` is the first part of its keys in a file."""

    name: str
    model: nn.Module

    @property
    def host(self) -> Any:
        """What knows the attention of this model's library: :mod:`comcat.hosts.diffusers` or :mod:`comcat.hosts.clip`."""
        return diffusers if self.name in DENOISERS else clip

    def find_attention(self) -> tuple[list[AdaptableAttention], list[RefusedAttention]]:
        """What can carry low-rank terms in this model, and what cannot and why; paths are the model's own."""
        return self.host.find_attention(self.model)

    def attention(self, path: str) -> Any:
        """The attention module at a path."""
        return self.model.get_submodule(path)

    def channels(self, attention: Any) -> Any:
        """The extra channels of an attention, whether it computes with them or they are fused into its weights; None if it has none."""
        state = fused(attention)
        return self.host.mounted(attention) if state is None else state.channels


def denoiser_of(target: Any) -> Component:
    """The UNet or transformer of a pipeline, or the one that ``target`` is itself.

    Raises:
        ModelError: if it is neither.
    """
    if isinstance(target, nn.Module):
        model = _plain(target)
        name = "unet" if hasattr(model, "down_blocks") and hasattr(model, "up_blocks") else "transformer"
        if not any(hasattr(m, "get_processor") for m in model.modules()):
            raise ModelError(f"got a {type(model).__name__}, expected a diffusers pipeline, or its unet or transformer")
        return Component(name, model)
    for name in DENOISERS:
        model = getattr(target, name, None)
        if isinstance(model, nn.Module):
            return Component(name, _plain(model))
    raise ModelError(
        f"got a {type(target).__name__} with neither unet nor transformer, expected a diffusers pipeline, or one of these"
    )


def text_encoders_of(target: Any) -> list[Component]:
    """The text encoders of a pipeline, of whatever kind; none where ``target`` is a model."""
    if isinstance(target, nn.Module):
        return []
    models = ((name, getattr(target, name, None)) for name in TEXT_ENCODERS)
    return [Component(name, _plain(model)) for name, model in models if isinstance(model, nn.Module)]


def components_of(target: Any) -> dict[str, Component]:
    """Everything in ``target`` that may carry an adapter, by name."""
    return {c.name: c for c in (denoiser_of(target), *text_encoders_of(target))}


def _plain(model: nn.Module) -> Any:
    """A model without what torch.compile wraps around it."""
    return getattr(model, "_orig_mod", model)

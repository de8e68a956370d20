"""The models that a pipeline is made of, by the names that diffusers gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ModelError
from ...wrappers import bare

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Component:
    """One model of a pipeline. ``name`` is the first part of the keys in an adapter's file."""

    name: str
    model: nn.Module


def denoiser_of(target: Any) -> Component:
    """The UNet or transformer of a pipeline, or the one that ``target`` is itself, in whatever runs it: torch.compile,
    data parallelism, or a module that holds it as its ``unet`` or ``transformer``.

    Raises:
        ModelError: if it is neither.
    """
    if isinstance(target, nn.Module):
        model = bare(target)
        if (held := _held_in(model)) is not None:
            return held
        name = "unet" if hasattr(model, "down_blocks") and hasattr(model, "up_blocks") else "transformer"
        if not any(is_attention(m) for m in model.modules()):
            raise ModelError(f"got a {type(model).__name__}, expected a diffusers pipeline, or its unet or transformer")
        return Component(name, model)
    for name in DENOISERS:
        model = getattr(target, name, None)
        if isinstance(model, nn.Module):
            return Component(name, bare(model))
    raise ModelError(
        f"got a {type(target).__name__} with neither unet nor transformer, expected a diffusers pipeline, "
        "or one of these"
    )


def is_attention(module: Any) -> bool:
    """Whether it is an attention of diffusers': a module that leaves its computing to a processor."""
    processor = getattr(module, "processor", None) if isinstance(module, nn.Module) else None
    return callable(processor) and (hasattr(module, "get_processor") or "Attn" in type(processor).__name__)


def text_encoders_of(target: Any) -> list[Component]:
    """The text encoders of a pipeline, of whatever kind; none where ``target`` is a model."""
    if isinstance(target, nn.Module):
        return []
    models = ((name, getattr(target, name, None)) for name in TEXT_ENCODERS)
    return [Component(name, bare(model)) for name, model in models if isinstance(model, nn.Module)]


def tokenizer_name(text_encoder: str) -> str:
    """What a pipeline calls the tokenizer of one of its text encoders."""
    return text_encoder.replace("text_encoder", "tokenizer")


def tokenizer_of(target: Any, text_encoder: str) -> Any:
    """The tokenizer of a text encoder by its name, or None."""
    return getattr(target, tokenizer_name(text_encoder), None)


def components_of(target: Any) -> dict[str, Component]:
    """Everything in ``target`` that may carry an adapter, by name."""
    return {c.name: c for c in (denoiser_of(target), *text_encoders_of(target))}


def _held_in(model: Any) -> Component | None:
    """The denoiser that somebody's own module holds, as one for training does, under the name that diffusers gives it;
    None where the module is none of that kind.
    """
    if hasattr(model, "save_pretrained"):  # a model of diffusers' own, with parts of whatever name
        return None
    held = ((name, getattr(model, name, None)) for name in DENOISERS)
    return next((Component(name, bare(inner)) for name, inner in held if isinstance(inner, nn.Module)), None)

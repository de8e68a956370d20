"""The family of a pipeline, by the structure of its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...errors import ModelError, SettingsError
from .packed_latents import Chroma, Flux, Flux2, QwenImage, ZImage
from .square_latents import AuraFlow, CogView4, HunyuanDiT, Lumina2, PixArt, Sana, StableDiffusion3, Wan
from .unets import Conditions, Family, StableDiffusionXL

__all__ = ["Conditions", "Family", "check_side", "drawn_as", "family_of"]


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by the structure of its denoiser.

    Raises:
        ModelError: if it is no text-to-image pipeline of a supported family, or lacks a part that training needs.
    """
    found = _recognise(pipe)
    for part in ("vae", "scheduler", "tokenizer", "text_encoder"):
        if getattr(pipe, part, None) is None:
            raise ModelError(f"{type(pipe).__name__} has no {part}, which customizing needs; load the pipeline with it")
    if "image" in inspect.signature(pipe.encode_prompt).parameters:
        raise ModelError(f"{type(pipe).__name__} makes pictures of pictures, expected a text-to-image pipeline")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ModelError(
            f"{type(pipe).__name__} has two transformers, one for much noise and one for little; a concept would be "
            "learned by one of them alone. Expected a pipeline with one, such as Wan 2.1 or Wan 2.2 TI2V-5B"
        )
    latents, takes = found.latent_channels()
    if takes != latents:
        raise ModelError(
            f"the {found.component} takes {takes} channels, the VAE's latents have {latents}: this is a pipeline for "
            "another task (inpainting, depth, editing), expected text-to-image"
        )
    return found


def drawn_as(pipe: Any) -> Family:
    """The family of a pipeline; one that cannot be taught is called as most of diffusers' are."""
    try:
        return family_of(pipe)
    except ModelError:
        return Family(pipe)


def check_side(name: str, side: int, family: Family, step: int | None = None) -> None:
    """Raises SettingsError unless a side, in pixels, is a multiple of a step, the family's own if not given, and no
    larger than is sensible.
    """
    step, most = step or family.multiple(), family.largest()
    if side > most:
        raise SettingsError(f"{name}: got {side}, expected at most {most}; the pipeline's own is {family.resolution()}")
    if side < step or side % step:
        near = max(step, round(side / step) * step)
        raise SettingsError(f"{name}: got {side}, expected a multiple of {step}, for example {near}")


TRANSFORMERS: tuple[tuple[tuple[str, ...], Callable[[Any], Family]], ...] = (
    (("timestep_guidance_channels", "axes_dims_rope"), Flux2),
    (("approximator_num_channels",), Chroma),
    (("guidance_embeds", "axes_dims_rope", "pooled_projection_dim"), Flux),
    (("guidance_embeds", "axes_dims_rope", "joint_attention_dim"), QwenImage),
    (("cap_feat_dim", "n_refiner_layers"), ZImage),
    (("cap_feat_dim", "num_refiner_layers"), Lumina2),
    (("num_mmdit_layers",), AuraFlow),
    (("condition_dim", "rope_axes_dim"), CogView4),
    (("caption_channels", "use_additional_conditions"), PixArt),
    (("caption_channels", "timestep_scale"), Sana),
    (("cross_attention_dim_t5",), HunyuanDiT),
    (("pos_embed_seq_len", "cross_attn_norm", "-vace_layers", "-num_frame_per_block", "-motion_dim"), Wan),
    (("pos_embed_max_size", "pooled_projection_dim"), StableDiffusion3),
)
"""What stands in the configuration of each family's transformer, and with a minus what does not. The first that fits
counts.
"""
KNOWN = (
    "Stable Diffusion 1.x, 2.x, XL, 3, 3.5, Flux, Flux 2, Qwen-Image, Z-Image, PixArt, Chroma, Sana, Lumina 2, "
    "AuraFlow, CogView 4, Hunyuan-DiT or Wan"
)


def _recognise(pipe: Any) -> Family:
    unet, transformer = getattr(pipe, "unet", None), getattr(pipe, "transformer", None)
    if unet is not None:
        config = getattr(unet, "config", {})
        kind = config.get("addition_embed_type")
        if config.get("cross_attention_dim") is not None and kind in (None, "text_time"):
            return StableDiffusionXL(pipe) if kind else Family(pipe)
        got = f"a UNet with addition_embed_type {kind!r}" if kind else "a UNet without cross-attention"
    elif transformer is not None:
        config = getattr(transformer, "config", {})
        for marks, family in TRANSFORMERS:
            if all((mark.lstrip("-") in config) != mark.startswith("-") for mark in marks):
                return family(pipe)
        got = f"a {type(transformer).__name__}"
    else:
        got = f"a {type(pipe).__name__}"
    raise ModelError(f"cannot customize {got}; expected a text-to-image pipeline of {KNOWN}")

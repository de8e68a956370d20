"""What differs between pipelines: how each encodes a prompt, what a picture's size adds, how its denoiser is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, SettingsError

Conditions = dict[str, Tensor]
"""What a prediction depends on beside the noisy latents and the time, by name; dim 0 is the batch."""


class Family:
    """Stable Diffusion 1.x and 2.x, and what all families share. Latents are (batch, channels, height, width) in
    all.
    """

    component = "unet"

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is; the pipeline's own ``device`` is that of whatever part comes first."""
        return next(self.denoiser.parameters()).device

    def text_encoders(self) -> dict[str, tuple[Any, Any]]:
        """Component name → (tokenizer, text encoder), of those that the pipeline has."""
        found = {}
        for suffix in ("", "_2", "_3"):
            encoder = getattr(self.pipe, f"text_encoder{suffix}", None)
            if encoder is not None:
                found[f"text_encoder{suffix}"] = (getattr(self.pipe, f"tokenizer{suffix}"), encoder)
        return found

    def prompt_lengths(self) -> dict[str, int]:
        """How many tokens each text encoder reads of a prompt, first and last mark included; the rest is cut off."""
        return {name: int(tokenizer.model_max_length) for name, (tokenizer, _) in self.text_encoders().items()}

    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the pipeline makes unless told otherwise."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    def multiple(self) -> int:
        """What the side of a picture must be a multiple of, in pixels."""
        return int(self.pipe.vae_scale_factor)

    def largest(self) -> int:
        """The largest side, in pixels, that is sensible to ask for: eight times the pipeline's own."""
        return 8 * self.resolution()

    def encode(self, prompts: list[str]) -> Conditions:
        """The prompts' conditions; the empty one's are those that guidance leads away from. Gradients flow where the
        text encoders' parameters ask for them.
        """
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return {"prompt": embeds}  # (prompts, tokens, width)

    def framing(self, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
        """What the denoiser is told of a picture's framing: ``size`` before resizing and the crop's ``corner``,
        (height, width).
        """
        return {}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output for noisy latents (batch, channels, height, width) at ``times`` (batch,); same
        shape.
        """
        return self.denoiser(noisy, times, encoder_hidden_states=conditions["prompt"]).sample


class StableDiffusionXL(Family):
    """Two text encoders, the second's pooled output, and six numbers on the framing."""

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        if self.pipe.config.get("force_zeros_for_empty_prompt"):
            said = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * said.view(-1, 1, 1), pooled * said.view(-1, 1)
        return {"prompt": embeds, "pooled": pooled}

    def framing(self, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
        return {"time_ids": torch.tensor([[*size, *corner, resolution, resolution]], dtype=torch.float32)}  # (1, 6)

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"].to(noisy.dtype)}
        output = self.denoiser(noisy, times, encoder_hidden_states=conditions["prompt"], added_cond_kwargs=added)
        return output.sample


class StableDiffusion3(Family):
    """A transformer over patches, with the pooled outputs of two text encoders."""

    component = "transformer"
    t5, t5_length = "text_encoder_3", 256
    """The third text encoder reads more of a prompt: what the pipeline's ``max_sequence_length`` is by default."""

    def prompt_lengths(self) -> dict[str, int]:
        lengths = super().prompt_lengths()
        return lengths | ({self.t5: self.t5_length} if self.t5 in lengths else {})

    def resolution(self) -> int:
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.denoiser.config.patch_size)  # type: ignore[union-attr]

    def largest(self) -> int:
        places = getattr(self.denoiser.config, "pos_embed_max_size", None)  # its table of positions ends there
        return super().largest() if places is None else min(super().largest(), places * self.multiple())

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, prompts, prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=conditions["prompt"],
            pooled_projections=conditions["pooled"],
        )
        return output.sample


class Flux(StableDiffusion3):
    """Latents packed by 2 × 2 into tokens with positions, time from 0 to 1, and a guidance scale as an input."""

    t5, t5_length = "text_encoder_2", 512
    GUIDANCE = 3.5  # what a guidance-distilled model is told while it is trained: the scale its pipeline samples with

    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, prompts, device=self.device)
        return {"prompt": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        batch, channels, height, width = noisy.shape
        about: Any = {"device": noisy.device, "dtype": noisy.dtype}
        packed = self.pipe._pack_latents(noisy, batch, channels, height, width)  # (batch, h/2 · w/2, 4 channels)
        output = self.denoiser(
            hidden_states=packed,
            timestep=times / 1000,
            guidance=torch.full((batch,), self.GUIDANCE, device=noisy.device)
            if self.denoiser.config.guidance_embeds  # type: ignore[union-attr]
            else None,
            encoder_hidden_states=conditions["prompt"],
            pooled_projections=conditions["pooled"],
            txt_ids=torch.zeros(conditions["prompt"].shape[1], 3, **about),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, height * scale, width * scale, scale)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by the structure of its denoiser.

    Raises:
        ModelError: if it is no text-to-image pipeline of a supported family, or lacks a part that training needs.
    """
    found = _recognise(pipe)
    for part in ("vae", "scheduler", "tokenizer", "text_encoder"):
        if getattr(pipe, part, None) is None:
            raise ModelError(f"{type(pipe).__name__} has no {part}, which customizing needs; load the pipeline with it")
    latents = int(pipe.vae.config.latent_channels)
    takes = int(found.denoiser.config.in_channels)  # type: ignore[union-attr]
    takes = takes // 4 if isinstance(found, Flux) else takes
    if takes != latents:
        raise ModelError(
            f"the {found.component} takes {takes} channels, the VAE's latents have {latents}: this is a pipeline for "
            "another task (inpainting, depth, editing), expected text-to-image"
        )
    return found


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
        if "guidance_embeds" in config and "axes_dims_rope" in config:
            return Flux(pipe)
        if "pos_embed_max_size" in config and "pooled_projection_dim" in config:
            return StableDiffusion3(pipe)
        got = f"a {type(transformer).__name__}"
    else:
        got = f"a {type(pipe).__name__}"
    raise ModelError(
        f"cannot customize {got}; expected a text-to-image pipeline of Stable Diffusion 1.x, 2.x, XL, 3, 3.5 or Flux"
    )

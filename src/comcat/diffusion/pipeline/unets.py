"""What differs between pipelines: how each encodes a prompt, what its VAE's latents become, what a picture's size adds,
how its denoiser is called. Here: what all families share, and those with a UNet.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .offloading import computing_device

Conditions = dict[str, Tensor]
"""What a prediction depends on beside the noisy latents and the time, by name; dim 0 is the batch."""


class Family:
    """Stable Diffusion 1.x and 2.x, and what all families share. Latents are (batch, channels, height, width) in
    all.
    """

    component = "unet"
    guidance_name = "guidance_scale"
    """What the pipeline's ``__call__`` calls the scale of classifier-free guidance."""
    unguided = 1.0
    """The largest scale at which the pipeline does not guide, so that it reads no negative prompt."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.component)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes; the pipeline's own ``device`` is that of whatever part comes first."""
        return computing_device(self.denoiser)

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

    def takes_negative(self) -> bool:
        """Whether a negative prompt changes what the pipeline makes."""
        return "negative_prompt" in inspect.signature(type(self.pipe).__call__).parameters

    def preamble(self) -> str:
        """What the text encoders read before a prompt: a template's beginning."""
        return ""

    def latent_channels(self) -> tuple[int, int]:
        """Of the VAE's latents, and of those that the denoiser takes."""
        return int(self.pipe.vae.config.latent_channels), int(self.denoiser.config.in_channels)  # type: ignore[union-attr]

    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the pipeline makes unless told otherwise."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    def multiple(self) -> int:
        """What the side of a picture must be a multiple of, in pixels."""
        return int(self.pipe.vae_scale_factor)

    def drawing(self) -> dict[str, Any]:
        """What else the pipeline's ``__call__`` has to be told to make pictures."""
        return {}

    def pictures(self, output: Any) -> list[Any]:
        """The pictures in what the pipeline's ``__call__`` gives, one for each prompt."""
        return output.images

    def largest(self) -> int:
        """The largest side, in pixels, that is sensible to ask for: eight times the pipeline's own."""
        return 8 * self.resolution()

    def encode(self, prompts: list[str]) -> Conditions:
        """The prompts' conditions; the empty one's are those that guidance leads away from. Gradients flow where the
        text encoders' parameters ask for them.
        """
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return {"prompt": embeds}  # (prompts, tokens, width)

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents as the denoiser sees them, (batch, channels, height,
        width).
        """
        config = self.pipe.vae.config
        scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        return (mean - shift) * scale, std * scale

    def to_vae(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) as the VAE takes them."""
        return pixels

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

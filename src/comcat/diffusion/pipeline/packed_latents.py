"""Families whose transformer takes latents packed by 2 × 2 into tokens: Flux, Chroma, Flux 2, Qwen-Image, Z-Image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .square_latents import OfVideos, Transformer, padded
from .unets import Conditions, Family


class Packed(Transformer):
    """What they share. ``_pack_latents`` and ``_unpack_latents`` are the pipeline's own."""

    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def latent_channels(self) -> tuple[int, int]:
        return int(self.pipe.vae.config.latent_channels), int(self.config.in_channels) // 4

    def pack(self, noisy: Tensor) -> Tensor:
        """(batch, channels, h, w) → (batch, h/2 · w/2, 4 channels)."""
        return self.pipe._pack_latents(noisy, *noisy.shape)

    def unpack(self, output: Tensor, noisy: Tensor) -> Tensor:
        """A prediction for packed latents, in the shape of ``noisy``."""
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(output, noisy.shape[2] * scale, noisy.shape[3] * scale, scale)

    def guidance(self, noisy: Tensor) -> Tensor | None:
        """What a guidance-distilled model is told while it is trained: the scale its pipeline samples with."""
        if not self.config.guidance_embeds:
            return None
        by_default = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        return torch.full((len(noisy),), by_default or 1.0, device=noisy.device)


class Flux(Packed):
    """Latents packed by 2 × 2 into tokens with positions, time from 0 to 1, and a guidance scale as an input."""

    t5, t5_length = "text_encoder_2", 512

    def takes_negative(self) -> bool:
        return False  # guidance is built into the model

    def prompt_lengths(self) -> dict[str, int]:
        lengths = Family.prompt_lengths(self)
        return lengths | ({self.t5: self.t5_length} if self.t5 in lengths else {})

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, prompts, device=self.device)
        return {"prompt": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        batch, _, height, width = noisy.shape
        about: Any = {"device": noisy.device, "dtype": noisy.dtype}
        output = self.denoiser(
            hidden_states=self.pack(noisy),
            timestep=times / 1000,
            guidance=self.guidance(noisy),
            encoder_hidden_states=conditions["prompt"],
            pooled_projections=conditions["pooled"],
            txt_ids=torch.zeros(conditions["prompt"].shape[1], 3, **about),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample
        return self.unpack(output, noisy)


class Chroma(Packed):
    """Flux without pooled outputs and guidance; padding is masked. The empty prompt is encoded like any other."""

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, **self.defaults()
        )
        return {"prompt": embeds, "prompt_mask": mask}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        batch, _, height, width = noisy.shape
        packed, text = self.pack(noisy), conditions["prompt"]
        mask = self.pipe._prepare_attention_mask(batch, packed.shape[1], noisy.dtype, conditions["prompt_mask"])
        output = self.denoiser(
            hidden_states=packed, timestep=times / 1000, encoder_hidden_states=text, attention_mask=mask,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample  # fmt: skip
        return self.unpack(output, noisy)


class Flux2(Packed):
    """Latents are patches of 2 × 2 from the beginning, normalised by the VAE's own statistics; places have four
    coordinates.
    """

    def preamble(self) -> str:
        return before_the_prompt(self.pipe.tokenizer, enable_thinking=False)

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        middle = vae.bn.running_mean.view(1, -1, 1, 1).to(mean)
        spread = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(mean)
        mean, std = (self.pipe._patchify_latents(x) for x in (mean, std))
        return (mean - middle) / spread, std / spread  # (batch, 4 channels, height / 2, width / 2)

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.device, **self.defaults())
        return {"prompt": embeds}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        text = conditions["prompt"]
        output = self.denoiser(
            hidden_states=self.pipe._pack_latents(noisy), timestep=(times / 1000).to(noisy.dtype),
            guidance=self.guidance(noisy), encoder_hidden_states=text,
            txt_ids=self.pipe._prepare_text_ids(text).to(noisy.device),
            img_ids=self.pipe._prepare_latent_ids(noisy).to(noisy.device),
        ).sample  # fmt: skip
        return output.mT.unflatten(2, noisy.shape[2:])  # (batch, channels, height, width)


class QwenImage(OfVideos, Packed):
    """A VAE for videos, of one frame here, with a mean and a deviation for each channel."""

    guidance_name = "true_cfg_scale"

    def preamble(self) -> str:
        return self.pipe.prompt_template_encode.partition("{}")[0]

    def prompt_lengths(self) -> dict[str, int]:
        return {name: n + self.pipe.prompt_template_encode_start_idx for name, n in super().prompt_lengths().items()}

    def latent_channels(self) -> tuple[int, int]:
        return int(self.pipe.vae.config.z_dim), int(self.config.in_channels) // 4

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, mask = self.pipe.encode_prompt(list(prompts), device=self.device, **self.defaults())
        ones = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"prompt": embeds, "prompt_mask": ones if mask is None else mask.bool()}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        batch, _, height, width = noisy.shape
        mask = conditions["prompt_mask"]
        output = self.denoiser(
            hidden_states=self.pack(noisy), timestep=(times / 1000).to(noisy.dtype), guidance=self.guidance(noisy),
            encoder_hidden_states=conditions["prompt"], encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample  # fmt: skip
        return self.unpack(output, noisy).squeeze(2)


class ZImage(Packed):
    """Takes lists, of pictures and of texts without padding. Time runs from noise to picture, and what is predicted
    points there. The patches are cut in the model.
    """

    unguided = 0.0

    def resolution(self) -> int:
        return 1024

    def preamble(self) -> str:
        return before_the_prompt(self.pipe.tokenizer, enable_thinking=True)

    def latent_channels(self) -> tuple[int, int]:
        return int(self.pipe.vae.config.latent_channels), int(self.config.in_channels)

    def encode(self, prompts: list[str]) -> Conditions:
        texts, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, **self.defaults()
        )
        return padded(list(texts))

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        texts = [x[mask.bool()] for x, mask in zip(conditions["prompt"], conditions["prompt_mask"], strict=True)]
        pictures = list(noisy.unsqueeze(2).unbind(0))  # (channels, 1, height, width) each
        output = self.denoiser(pictures, 1 - times / 1000, texts).sample
        return -torch.stack(list(output)).squeeze(2)


def before_the_prompt(tokenizer: Any, **options: Any) -> str:
    """What a chat template writes in front of what its user says."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "PROMPT"}], tokenize=False, add_generation_prompt=True, **options
    )
    return said.partition("PROMPT")[0]

"""Families whose transformer takes latents as they are: Stable Diffusion 3, PixArt, Sana, Lumina 2, AuraFlow, CogView
4, Hunyuan-DiT, and Wan, a model of videos.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .unets import Conditions, Family


class Transformer(Family):
    """What all families with a transformer share."""

    component = "transformer"

    @property
    def config(self) -> Any:
        return self.denoiser.config

    def resolution(self) -> int:
        side = getattr(self.pipe, "default_sample_size", None) or self.config.sample_size
        return int(side * self.pipe.vae_scale_factor)

    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * (getattr(self.config, "patch_size", None) or 1))

    def largest(self) -> int:
        places = getattr(self.config, "pos_embed_max_size", None)  # its table of positions ends there
        return super().largest() if places is None else min(super().largest(), places * self.multiple())

    def prompt_lengths(self) -> dict[str, int]:
        return {name: self.defaults().get("max_sequence_length", 512) for name in self.text_encoders()}

    def defaults(self) -> dict[str, Any]:
        """What the pipeline's ``__call__`` tells ``encode_prompt`` where it is told nothing itself."""
        takes, given = (inspect.signature(f).parameters for f in (self.pipe.encode_prompt, type(self.pipe).__call__))
        empty = (None, inspect.Parameter.empty)
        return {n: given[n].default for n in takes if n in given and given[n].default not in empty}


class StableDiffusion3(Transformer):
    """A transformer over patches, with the pooled outputs of two text encoders."""

    t5, t5_length = "text_encoder_3", 256
    """The third text encoder reads more of a prompt: what the pipeline's ``max_sequence_length`` is by default."""

    def prompt_lengths(self) -> dict[str, int]:
        lengths = Family.prompt_lengths(self)
        return lengths | ({self.t5: self.t5_length} if self.t5 in lengths else {})

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


class Masked(Transformer):
    """One text encoder, whose padding is masked. The empty prompt is what the pipeline takes as the negative one, which
    may have a template of its own.
    """

    def encode(self, prompts: list[str]) -> Conditions:
        empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=bool(empty.any()), device=self.device, **self.defaults()
        )
        if empty.any():
            embeds = torch.where(empty.view(-1, 1, 1), negative.to(embeds), embeds)
            mask = torch.where(empty.view(-1, 1), negative_mask.to(mask), mask)
        return {"prompt": embeds, "prompt_mask": mask}

    def first_channels(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The prediction without the variance that some models give beside it."""
        return output[:, : noisy.shape[1]]


class PixArt(Masked):
    """Its larger model is told the size of the picture and its proportions."""

    def framing(self, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
        if not self.config.use_additional_conditions:
            return {}
        return {"resolution": torch.tensor([[resolution, resolution]]).float(), "aspect_ratio": torch.ones(1, 1)}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        added = {name: conditions.get(name) for name in ("resolution", "aspect_ratio")}
        output = self.denoiser(
            noisy, encoder_hidden_states=conditions["prompt"], encoder_attention_mask=conditions["prompt_mask"],
            timestep=times, added_cond_kwargs=added,
        ).sample  # fmt: skip
        return self.first_channels(output, noisy)


class Sana(Masked):
    """Linear attention over the picture, softmax attention to the text."""

    def multiple(self) -> int:
        return max(32, super().multiple())  # which its pipeline asks for, whatever the VAE

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            noisy, encoder_hidden_states=conditions["prompt"], encoder_attention_mask=conditions["prompt_mask"],
            timestep=times * self.config.timestep_scale,
        ).sample  # fmt: skip
        return self.first_channels(output, noisy)


class Lumina2(Masked):
    """Time runs from noise to picture, and what is predicted points there."""

    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def preamble(self) -> str:
        return f"{self.pipe.system_prompt} <Prompt Start> "

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return -self.denoiser(
            hidden_states=noisy, timestep=1 - times / 1000, encoder_hidden_states=conditions["prompt"],
            encoder_attention_mask=conditions["prompt_mask"],
        ).sample  # fmt: skip


class AuraFlow(Masked):
    """Padding is zeroed, not masked; time is from 0 to 1."""

    def encode(self, prompts: list[str]) -> Conditions:
        return {"prompt": super().encode(prompts)["prompt"]}

    def largest(self) -> int:
        places = int(self.config.pos_embed_max_size**0.5)  # a table of places in the square
        return min(Family.largest(self), places * self.multiple())

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return self.denoiser(
            noisy, encoder_hidden_states=conditions["prompt"], timestep=(times / 1000).to(noisy.dtype)
        ).sample


class CogView4(Transformer):
    """Told the size of the picture, that before cropping, and the crop's corner. Nothing masks the padding of a prompt,
    so each is encoded alone, and those of one length are predicted together.
    """

    def encode(self, prompts: list[str]) -> Conditions:
        options = {"do_classifier_free_guidance": False, "device": self.device, **self.defaults()}
        return padded([self.pipe.encode_prompt([prompt], **options)[0][0] for prompt in prompts])

    def framing(self, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
        return {"time_ids": torch.tensor([[*size, resolution, resolution, *corner]], dtype=torch.float32)}  # (1, 6)

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        output, lengths = torch.empty_like(noisy), conditions["prompt_mask"].sum(dim=1)
        for length in lengths.unique().tolist():
            rows = lengths == length
            original, target, corner = conditions["time_ids"][rows].to(noisy.dtype).split(2, dim=1)
            output[rows] = self.denoiser(
                hidden_states=noisy[rows], encoder_hidden_states=conditions["prompt"][rows, :length],
                timestep=times[rows], original_size=original, target_size=target, crop_coords=corner,
            ).sample  # fmt: skip
        return output


class HunyuanDiT(Transformer):
    """Two text encoders side by side, rotary embeddings of the grid, and numbers on the framing."""

    LENGTHS = (77, 256)
    BASE = 512 // 8
    """Latents a side for which its rotary embeddings were made."""

    def prompt_lengths(self) -> dict[str, int]:
        return dict(zip(self.text_encoders(), self.LENGTHS, strict=False))

    def multiple(self) -> int:
        return 2 * int(self.pipe.vae_scale_factor)

    def encode(self, prompts: list[str]) -> Conditions:
        found = {}
        for number, (suffix, length) in enumerate(zip(("", "_t5"), self.LENGTHS, strict=True)):
            embeds, _, mask, _ = self.pipe.encode_prompt(
                list(prompts), device=self.device, dtype=self.denoiser.dtype, do_classifier_free_guidance=False,
                max_sequence_length=length, text_encoder_index=number,
            )  # fmt: skip
            found |= {f"prompt{suffix}": embeds, f"prompt{suffix}_mask": mask}
        return found

    def framing(self, size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Conditions:
        return {"time_ids": torch.tensor([[*size, resolution, resolution, *corner]], dtype=torch.float32)}  # (1, 6)

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        output = self.denoiser(
            noisy, times.to(noisy.dtype), encoder_hidden_states=conditions["prompt"],
            text_embedding_mask=conditions["prompt_mask"], encoder_hidden_states_t5=conditions["prompt_t5"],
            text_embedding_mask_t5=conditions["prompt_t5_mask"],
            image_meta_size=conditions["time_ids"].to(noisy.dtype),
            style=torch.zeros(len(noisy), dtype=torch.long, device=noisy.device), image_rotary_emb=self._places(noisy),
        ).sample  # fmt: skip
        return output.chunk(2, dim=1)[0] if self.config.learn_sigma else output

    def _places(self, noisy: Tensor) -> Any:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch = self.config.patch_size
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        region = get_resize_crop_region_for_grid(grid, self.BASE // patch)
        width = self.config.hidden_size // self.config.num_attention_heads
        return get_2d_rotary_pos_embed(width, region, grid, device=noisy.device, output_type="pt")


class OfVideos(Transformer):
    """Whose VAE is one of videos, with a mean and a deviation for each channel. Videos of one frame are pictures."""

    def to_vae(self, pixels: Tensor) -> Tensor:
        return pixels.unsqueeze(2)  # (batch, 3, 1, height, width)

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        middle, spread = (torch.tensor(x).view(1, -1, 1, 1).to(mean) for x in (config.latents_mean, config.latents_std))
        return (mean.squeeze(2) - middle) / spread, std.squeeze(2) / spread


class Wan(OfVideos):
    """A model of videos, asked for one frame."""

    def resolution(self) -> int:
        return int(inspect.signature(type(self.pipe).__call__).parameters["height"].default)

    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial * self.config.patch_size[1])

    def latent_channels(self) -> tuple[int, int]:
        return int(self.pipe.vae.config.z_dim), int(self.config.in_channels)

    def encode(self, prompts: list[str]) -> Conditions:
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, **self.defaults()
        )
        return {"prompt": embeds}

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        if self.pipe.config.expand_timesteps:  # a time for every token, since some may belong to a given picture
            _, high, wide = self.config.patch_size
            times = times.unsqueeze(1).expand(-1, noisy.shape[2] // high * (noisy.shape[3] // wide))
        return self.denoiser(
            hidden_states=noisy.unsqueeze(2), timestep=times, encoder_hidden_states=conditions["prompt"]
        ).sample.squeeze(2)

    def drawing(self) -> dict[str, Any]:
        return {"num_frames": 1}

    def pictures(self, output: Any) -> list[Any]:
        return [frames[0] for frames in output.frames]


def padded(texts: list[Tensor]) -> Conditions:
    """Texts (tokens, width) of several lengths as one, (prompts, longest, width), and which tokens are theirs."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"prompt": pad(texts), "prompt_mask": pad([x.new_ones(len(x), dtype=torch.bool) for x in texts])}

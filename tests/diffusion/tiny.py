"""Whole pipelines with random weights, each of every family, so small that a training step takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ALPHABET = "abcdefghijklmnopqrstuvwxyz*"
WORDS = ("a", "photo", "of", "dog", "cat", "red")


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows a few words; others fall apart into letters."""
    from transformers import CLIPTokenizer

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for letter in ALPHABET:
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(f"{letter}</w>", len(vocab))
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
            vocab.setdefault(parts[0], len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def t5_tokenizer(folder: Path) -> Any:
    """A word tokenizer in the place of T5's, whose real one is a downloaded file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", *WORDS, "V", "*"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )


def clip_text(vocab: int, width: int = 16, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=projection or width,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(config).eval()


def t5_text(vocab: int, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def vae(channels: int = 4, **more: Any) -> Any:
    """Halves the side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4, **more,
    ).eval()  # fmt: skip


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",
            "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**settings | more).eval()


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", **more: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokens")
    scheduler = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction_type,
        steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vae": vae(), "text_encoder": clip_text(len(tokenizer)), "tokenizer": tokenizer, "unet": unet(),
        "scheduler": scheduler,
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return _quiet(StableDiffusionPipeline(**parts | more))


def stable_diffusion_xl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder / "tokens"), 8
    denoiser = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=size,
        projection_class_embeddings_input_dim=6 * size + 16, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip_text(len(tokenizer)), text_encoder_2=clip_text(len(tokenizer), projection=16),
            tokenizer=tokenizer, tokenizer_2=clip_tokenizer(folder / "tokens_2"), unet=denoiser,
            scheduler=EulerDiscreteScheduler(num_train_timesteps=100, beta_schedule="scaled_linear"),
        )
    )  # fmt: skip


def stable_diffusion_3(folder: Path, qk_norm: str | None = None) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(folder / "tokens"), t5_tokenizer(folder / "tokens_3")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
        qk_norm=qk_norm,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=clip_text(len(tokenizer), projection=16),
            tokenizer=tokenizer, text_encoder_2=clip_text(len(tokenizer), projection=16),
            tokenizer_2=clip_tokenizer(folder / "tokens_2"), text_encoder_3=t5_text(len(t5), 40), tokenizer_3=t5,
        )
    )  # fmt: skip


def flux(folder: Path, guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(folder / "tokens"), t5_tokenizer(folder / "tokens_2")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_text(len(tokenizer)), tokenizer=tokenizer, text_encoder_2=t5_text(len(t5), 24),
        tokenizer_2=t5,
        transformer=transformer,
    )  # fmt: skip
    pipe.default_sample_size = 8
    return _quiet(pipe)


def pictures(count: int = 3, size: tuple[int, int] = (20, 16)) -> list[Image.Image]:
    """Smooth random pictures, (width, height)."""
    values = np.random.default_rng(0).integers(0, 255, (count, 3, 3, 3), dtype=np.uint8)
    return [Image.fromarray(v).resize(size, Image.Resampling.BICUBIC) for v in values]


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe

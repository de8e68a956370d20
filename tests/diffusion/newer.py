"""Whole pipelines of the families that came after Flux, with random weights, each so small that a step is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import tiny
from . import token_denoisers as denoisers

CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} </user> {% endfor %}"
    "{% if add_generation_prompt %}<reply>{% endif %}"
)


def tokenizer(folder: Path, length: int = 40) -> Any:
    """A tokenizer of words with a chat template."""
    found = tiny.t5_tokenizer(folder)
    found.chat_template, found.model_max_length = CHAT, length
    return found


def decoder(kind: str, vocab: int, width: int, layers: int = 2) -> Any:
    """A causal text model: of Qwen 3, Gemma 2 or GLM."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        max_position_embeddings=2048,
    )  # fmt: skip
    causal = kind == "Qwen3"
    return getattr(transformers, f"{kind}{'ForCausalLM' if causal else 'Model'}")(config).eval()


def flow(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def deep_vae(**more: Any) -> Any:
    """An eighth of the side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, sample_size=32,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, **more,
    ).eval()  # fmt: skip


def awake(model: nn.Module) -> Any:
    """With an output layer that is not zero, as some begin."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def flux2(folder: Path) -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    denoiser = denoisers.flux2().__class__(**denoisers.flux2().config | {"joint_attention_dim": 48,
        "guidance_embeds": False})  # fmt: skip
    pipe = Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=decoder("Qwen3", len(words), 16, 28),
        tokenizer=words, transformer=awake(denoiser),
    )  # fmt: skip
    pipe.default_sample_size = 8
    return tiny._quiet(pipe)


def qwen(folder: Path) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    words = tokenizer(folder)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2], latents_std=[1.5, 0.7],
    ).eval()  # fmt: skip
    text = {
        "vocab_size": len(words), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    pipe = QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=encoder, tokenizer=words,
        transformer=awake(denoisers.qwen()),
    )  # fmt: skip
    pipe.default_sample_size, pipe.prompt_template_encode_start_idx = 8, 8
    pipe.prompt_template_encode = "a a a a a a a a {} a a"
    return tiny._quiet(pipe)


def z_image(folder: Path) -> Any:
    from diffusers import ZImagePipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    pipe = ZImagePipeline(
        scheduler=flow(shift=3.0), vae=tiny.vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=decoder("Qwen3", len(words), 12).model, tokenizer=words, transformer=awake(denoisers.z_image()),
    )  # fmt: skip
    return tiny._quiet(pipe)


def chroma(folder: Path) -> Any:
    from diffusers import ChromaPipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    model = denoisers.chroma()
    model = type(model)(**model.config | {"in_channels": 16, "joint_attention_dim": 16})
    pipe = ChromaPipeline(
        scheduler=flow(), vae=tiny.vae(shift_factor=0.1, scaling_factor=0.4), tokenizer=words,
        text_encoder=tiny.t5_text(len(words), 16), transformer=awake(model),
    )  # fmt: skip
    pipe.default_sample_size = 8
    return tiny._quiet(pipe)


def pixart(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    model = denoisers.pixart()
    model = type(model)(**model.config | {"sample_size": 32, "caption_channels": 16})
    return tiny._quiet(
        PixArtAlphaPipeline(
            tokenizer=words, text_encoder=tiny.t5_text(len(words), 16), vae=tiny.vae(), transformer=awake(model),
            scheduler=DPMSolverMultistepScheduler(num_train_timesteps=100),
        )
    )  # fmt: skip


def sana(folder: Path) -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    ).eval()  # fmt: skip
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return tiny._quiet(
        SanaPipeline(
            tokenizer=words, text_encoder=decoder("Gemma2", len(words), 12), vae=vae,
            transformer=awake(denoisers.sana()), scheduler=solver,
        )
    )  # fmt: skip


def lumina2(folder: Path) -> Any:
    from diffusers import Lumina2Pipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    model = denoisers.lumina2()
    model = type(model)(**model.config | {"axes_lens": (300, 16, 16)})
    return tiny._quiet(
        Lumina2Pipeline(
            transformer=awake(model), scheduler=flow(shift=6.0),
            vae=deep_vae(shift_factor=0.1, scaling_factor=0.4), text_encoder=decoder("Gemma2", len(words), 12),
            tokenizer=words,
        )
    )  # fmt: skip


def aura_flow(folder: Path) -> Any:
    from diffusers import AuraFlowPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = tokenizer(folder)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=12, d_kv=8, d_ff=16, num_layers=1,
        num_heads=2)).eval()  # fmt: skip
    return tiny._quiet(
        AuraFlowPipeline(
            tokenizer=words, text_encoder=encoder, vae=tiny.vae(), transformer=awake(denoisers.aura_flow()),
            scheduler=flow(shift=1.73),
        )
    )  # fmt: skip


def cogview4(folder: Path) -> Any:
    from diffusers import CogView4Pipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    return tiny._quiet(
        CogView4Pipeline(
            tokenizer=words, text_encoder=decoder("Glm", len(words), 12), vae=tiny.vae(),
            transformer=awake(denoisers.cogview4()), scheduler=flow(use_dynamic_shifting=True, base_shift=0.25,
                max_shift=0.75, time_shift_type="linear"),
        )
    )  # fmt: skip


def hunyuan(folder: Path) -> Any:
    from diffusers import DDPMScheduler, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    words, more = tokenizer(folder / "one"), tokenizer(folder / "two")
    bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=77)).eval()  # fmt: skip
    model = denoisers.hunyuan()
    model = type(model)(**model.config | {"text_len": 77, "text_len_t5": 256, "sample_size": 4})
    return tiny._quiet(
        HunyuanDiTPipeline(
            vae=deep_vae(), text_encoder=bert, tokenizer=words, transformer=awake(model),
            scheduler=DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction"), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False, text_encoder_2=tiny.t5_text(len(more), 16),
            tokenizer_2=more,
        )
    )  # fmt: skip


def stable_diffusion_35(folder: Path) -> Any:
    return tiny.stable_diffusion_3(folder, qk_norm="rms_norm")


def wan(folder: Path, **more: Any) -> Any:
    """For pictures of 16 pixels; a video of one frame is a picture."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(0)
    words = tokenizer(folder)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], scale_factor_spatial=2,
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval()  # fmt: skip
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        scheduler=solver, vae=vae, text_encoder=tiny.t5_text(len(words), 12), tokenizer=words,
        transformer=awake(denoisers.wan()), **more,
    )  # fmt: skip
    return tiny._quiet(pipe)


NEWER = {
    "flux2": flux2, "qwen": qwen, "z_image": z_image, "pixart": pixart, "chroma": chroma, "sana": sana,
    "lumina2": lumina2, "aura_flow": aura_flow, "cogview4": cogview4, "hunyuan": hunyuan,
    "stable_diffusion_35": stable_diffusion_35, "wan": wan,
}  # fmt: skip

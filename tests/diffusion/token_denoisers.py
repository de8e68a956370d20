"""Denoisers of the families that see a picture as tokens throughout, from tiny configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .denoisers import Case, random


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[2, 2, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, axes_dim_rope=(2, 2, 4), axes_lens=(32, 16, 16), cap_feat_dim=12,
    )  # fmt: skip


def cogview4() -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=12,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip


def chroma() -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip


def aura_flow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip


def hunyuan() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, mlp_ratio=2.0, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=8,
        text_len=5, text_len_t5=3, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
        ffn_dim=16, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip


def grid(count: int = 3) -> Tensor:
    return torch.cartesian_prod(torch.arange(float(count)), torch.arange(float(count)))


def tokens() -> dict[str, Any]:
    """Nine tokens of a picture and five of a text."""
    return {"hidden_states": random(2, 9, 8), "encoder_hidden_states": random(2, 5, 12, seed=1)}


def squares() -> dict[str, Any]:
    """A picture of 4 × 8 × 8 and five tokens of a text."""
    picture = {"hidden_states": random(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    return {**picture, "encoder_hidden_states": random(2, 5, 12, seed=1)}


def flux2_arguments() -> dict[str, Any]:
    return {
        **tokens(),
        "timestep": torch.tensor([0.1, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.cat([torch.zeros(9, 1), grid(), torch.zeros(9, 1)], dim=1),
        "txt_ids": torch.cat([torch.zeros(5, 3), torch.arange(5.0)[:, None]], dim=1),
    }


def qwen_arguments() -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    shapes = [[(1, 3, 3)], [(1, 3, 3)]]
    return {
        **tokens(), "timestep": torch.tensor([0.1, 0.7]), "encoder_hidden_states_mask": mask, "img_shapes": shapes
    }  # fmt: skip


def chroma_arguments() -> dict[str, Any]:
    ids = {"img_ids": torch.cat([torch.zeros(9, 1), grid()], dim=1), "txt_ids": torch.zeros(5, 3)}
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 3:5] = False
    return {**tokens(), **ids, "timestep": torch.tensor([0.1, 0.7]), "attention_mask": mask}


def lumina2_arguments() -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {**squares(), "timestep": torch.tensor([0.1, 0.7]), "encoder_attention_mask": mask}


def cogview4_arguments() -> dict[str, Any]:
    sizes = dict.fromkeys(("original_size", "target_size"), torch.tensor([[64.0, 64.0]] * 2))
    return {**squares(), **sizes, "crop_coords": torch.zeros(2, 2)}


def pixart_arguments() -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {
        **squares(),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sana_arguments() -> dict[str, Any]:
    return {**squares(), "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}


def hunyuan_arguments() -> dict[str, Any]:
    angle = random(16, 4, seed=4).repeat_interleave(2, dim=1)
    return {
        **squares(),
        "timestep": torch.tensor([3.0, 700.0]),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": random(2, 3, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(2, 3),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


def wan_arguments() -> dict[str, Any]:
    return {**squares(), "hidden_states": random(2, 4, 1, 8, 8)}


class ZImageCase(Case):
    """Takes and gives lists of pictures."""

    def run(self, model: Any, **more: Any) -> Tensor:
        dtype = next(model.parameters()).dtype
        pictures = list(random(2, 4, 1, 8, 8).to(dtype))
        texts = [random(5, 12, seed=1).to(dtype), random(3, 12, seed=2).to(dtype)]
        return torch.stack(model(pictures, torch.tensor([0.1, 0.7]).to(dtype), texts, **more).sample)


TOKEN_CASES = {
    "flux2": Case(flux2, flux2_arguments, ("joint", "all")),
    "qwen": Case(qwen, qwen_arguments, ("joint", "all")),
    "z_image": ZImageCase(z_image, dict, ("joint", "self", "all")),
    "lumina2": Case(lumina2, lumina2_arguments, ("joint", "self", "all")),
    "cogview4": Case(cogview4, cogview4_arguments, ("joint", "all")),
    "chroma": Case(chroma, chroma_arguments, ("joint", "all")),
    "aura_flow": Case(aura_flow, squares, ("joint", "all")),
    "pixart": Case(pixart, pixart_arguments, ("cross", "self", "all")),
    "sana": Case(sana, sana_arguments, ("cross",)),
    "hunyuan": Case(hunyuan, hunyuan_arguments, ("cross", "self", "all")),
    "wan": Case(wan, wan_arguments, ("cross", "self", "all")),
}

"""Denoisers of every supported family from tiny configurations, with random weights, and what to feed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model and how to call it. ``where`` are the kinds of attention that it has."""

    build: Callable[[], nn.Module]
    arguments: Callable[[], dict[str, Any]]
    where: tuple[str, ...]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        model = self.build().eval()
        shake(model)
        return model.to(dtype)

    def run(self, model: Any, **more: Any) -> Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.arguments().items()
        }
        return model(**inputs, **more).sample


def shake(model: nn.Module) -> None:
    """Nothing is zero or one any more; what is random stays of its size, so that 16 bit can hold the activations."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:
                p.add_(0.2 * noise)
            elif not p.any():
                p.copy_(noise * p[0].numel() ** -0.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet(**more: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",
            "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**settings | more)


def sd1_shaped(**more: Any) -> nn.Module:
    """Four levels, three of them with attention, as the paper's format wants it."""
    return unet(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **more,
    )


def sd3(**more: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    settings: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10, "out_channels": 4,
        "pos_embed_max_size": 8,
    }  # fmt: skip
    return SD3Transformer2DModel(**settings | more)


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


def unet_arguments(text: int = 12) -> dict[str, Any]:
    return {
        "sample": random(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": random(2, 5, text, seed=1),
    }


def sdxl_arguments() -> dict[str, Any]:
    added = {"text_embeds": random(2, 10, seed=2), "time_ids": random(2, 6, seed=3)}
    return {**unet_arguments(), "added_cond_kwargs": added}


def sd3_arguments() -> dict[str, Any]:
    return {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 5, 12, seed=1),
        "pooled_projections": random(2, 10, seed=2),
        "timestep": torch.tensor([3, 700]),
    }


def flux_arguments() -> dict[str, Any]:
    return {
        "hidden_states": random(2, 9, 8),
        "encoder_hidden_states": random(2, 5, 12, seed=1),
        "pooled_projections": random(2, 10, seed=2),
        "timestep": torch.tensor([0.1, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.cat([torch.zeros(9, 1), torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }


CASES = {
    "sd1": Case(unet, unet_arguments, ("cross", "self", "all")),
    "sd2": Case(
        lambda: unet(use_linear_projection=True, upcast_attention=True, attention_head_dim=(1, 2)),
        unet_arguments,
        ("cross", "self", "all"),
    ),
    "sdxl": Case(
        lambda: unet(
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34, transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D",
                "UpBlock2D"),
        ),
        sdxl_arguments,
        ("cross", "self", "all"),
    ),
    "sd3": Case(sd3, sd3_arguments, ("joint", "all")),
    "sd35": Case(lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), sd3_arguments, ("joint", "self", "all")),
    "flux": Case(flux, flux_arguments, ("joint", "all")),
}  # fmt: skip

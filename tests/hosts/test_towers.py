"""Vision towers of models of pictures and text, the language side, and decoders that find objects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.apply import apply_
from comcat.errors import SettingsError
from comcat.hosts import find_sites
from comcat.statistics import packed_pictures

from ..models import shake
from .test_apply import full_plan, low_plan
from .test_hidden_units import units_plan
from .zoo import relative_error

transformers = pytest.importorskip("transformers")

GRID = torch.tensor([[1, 4, 4]])


def numbers(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.flatten().double()
    values = output.values() if isinstance(output, Mapping) else output
    return torch.cat([numbers(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list) and len(v)])


def made(model: str, config: str, **settings: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def qwen2() -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

    config = transformers.Qwen2VLConfig().vision_config.to_dict()
    small = {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Tower(type(transformers.Qwen2VLConfig().vision_config)(**{**config, **small}))


def qwen25() -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    kind = type(transformers.Qwen2_5_VLConfig().vision_config)
    return Tower(
        kind(depth=2, hidden_size=32, out_hidden_size=24, num_heads=2, patch_size=4, intermediate_size=48,
            window_size=16, fullatt_block_indexes=[1])
    )  # fmt: skip


def qwen3() -> nn.Module:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel as Tower

    kind = type(transformers.Qwen3VLConfig().vision_config)
    return Tower(
        kind(depth=2, hidden_size=32, out_hidden_size=24, num_heads=2, patch_size=4, intermediate_size=48,
            num_position_embeddings=16, deepstack_visual_indexes=[0])
    )  # fmt: skip


def patches() -> dict[str, Any]:
    return {"hidden_states": torch.randn(16, 3 * 2 * 4 * 4), "grid_thw": GRID}


VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip


def llava() -> nn.Module:
    t = transformers
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_index=40,
        vision_feature_layer=-1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config)


def internvl() -> nn.Module:
    t = transformers
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
        text_config=t.Qwen2Config(**TEXT), image_token_id=40, downsample_ratio=0.5,
    )  # fmt: skip
    return t.InternVLForConditionalGeneration(config)


def timesformer() -> nn.Module:
    return made("TimesformerModel", "TimesformerConfig", num_frames=2, **VISION)


def vjepa2() -> nn.Module:
    return made(
        "VJEPA2Model", "VJEPA2Config", crop_size=16, patch_size=8, frames_per_clip=4, hidden_size=32,
        num_attention_heads=2, num_hidden_layers=2, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=1, pred_num_mask_tokens=2,
    )  # fmt: skip


def words_and_picture(tokens: int = 4) -> dict[str, Any]:
    ids = torch.tensor([[40] * tokens + [3, 4, 5]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}


def detr() -> nn.Module:
    t = transformers
    backbone = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = t.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5,
    )  # fmt: skip
    return t.DetrModel(config)


def pixtral() -> nn.Module:
    return made("PixtralVisionModel", "PixtralVisionConfig", head_dim=16, **VISION)


def pictures(size: int = 16, count: int = 1) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(count, 3, size, size)}


def whole_qwen25() -> nn.Module:
    t = transformers
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_parameters": turns, "bos_token_id": 0, "eos_token_id": 1}
    config = t.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=40, vision_start_token_id=41, vision_end_token_id=42,
        video_token_id=43,
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config)


def words_and_patches() -> dict[str, Any]:
    """Two pictures of one size, their patches in one row."""
    ids = torch.tensor([[41, *[40] * 4, 42, 3], [41, *[40] * 4, 42, 4]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 40).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": GRID.repeat(2, 1),
    }  # fmt: skip


def film(name: str, frames: int) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(2, frames, 3, 16, 16)}


TOWERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], int, int, int]] = {
    "qwen2-vl": (qwen2, patches, 0, 2, 3),
    "qwen2.5-vl": (qwen25, patches, 0, 2, 3),
    "qwen3-vl": (qwen3, patches, 0, 2, 4),
    "timesformer": (timesformer, film("pixel_values", 2), 4, 4, 2),
    "vjepa2": (vjepa2, film("pixel_values_videos", 4), 0, 3, 3),
    "whole qwen2.5-vl": (whole_qwen25, words_and_patches, 0, 2, 5),
    "internvl": (internvl, lambda: words_and_picture(1), 2, 2, 5),
    "pixtral": (pixtral, pictures(), 0, 2, 2),
    "llava": (llava, words_and_picture, 2, 2, 5),
    "detr": (detr, pictures(64, 2), 5, 5, 3),
}
"""Model, inputs, and how many QK, VO and feed-forwards shrink."""


def tower(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    build, inputs, *_ = TOWERS[name]
    model = build().eval()
    shake(model)
    return model, inputs()


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_shrinks_and_changes_nothing_at_full_rank(name: str) -> None:
    model, inputs = tower(name)
    sites = find_sites(model)
    assert [len(sites.only(k)) for k in ("qk", "vo", "units")] == list(TOWERS[name][2:])
    with torch.no_grad():
        before = numbers(model(**inputs))
        for plan in (full_plan(sites.only("qk", "vo", "linear")), units_plan(sites.only("units"), 1.0)):
            handle = apply_(model, plan)
            assert relative_error(numbers(model(**inputs)), before) < 1e-5
            handle.revert()
        assert numbers(model(**inputs)).equal(before)
        other = copy.deepcopy(model)
        plan = low_plan(sites.only("qk", "vo"))
        apply_(model, plan)
        small = numbers(model(**inputs))
        assert small.isfinite().all() and relative_error(small, before) > 1e-4
        apply_(other, plan, weights=False)
        other.load_state_dict(model.state_dict())
        assert numbers(other(**inputs)).equal(small)


def test_reasons_of_a_language_model_are_true() -> None:
    reasons = {r.name: r.reason for r in find_sites(tower("llava")[0]).refused}
    spoken = {r for n, r in reasons.items() if n.endswith("self_attn") and "language_model" in n}
    assert spoken == {
        "attention of no known shape: queries, keys and values differ in width (grouped or multi-query attention)"
    }


def test_reasons_of_rotary_attention_that_turns_its_queries_itself() -> None:
    reasons = {r.reason for r in find_sites(tower("vjepa2")[0]).refused if r.name.endswith(":qk")}
    assert reasons == {"rotary position embeddings sit between W_Q and W_K; its vo and linear sites can still shrink"}


@pytest.mark.parametrize("name", ["llava", "internvl", "vjepa2", "qwen2.5-vl", "whole qwen2.5-vl"])
def test_a_whole_model_with_its_tower_comes_back(name: str, tmp_path: Path) -> None:
    model, inputs = tower(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = comcat.compress(model, [inputs], reduce=0.05, statistic="activation")
    comcat.save(small, tmp_path / "model")
    assert small.comcat_record.plan.sites
    with torch.no_grad():
        assert numbers(comcat.load(tmp_path / "model")(**inputs)).equal(numbers(small(**inputs)))


def test_the_language_side_shrinks_only_where_it_is_asked_for() -> None:
    model, inputs = tower("llava")

    def compressed(**settings: Any) -> set[str]:
        small = comcat.compress(model, [inputs], reduce=0.05, statistic="weights", **settings)
        return {("language" if "language_model" in n else "vision") for n in small.comcat_record.plan.sites}

    with pytest.warns(UserWarning, match="the language side stays as it is; only="):
        assert compressed() == {"vision"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compressed(only=("model.language_model",)) == {"language"}


def test_patches_of_several_pictures_in_one_row_are_counted_by_their_grids() -> None:
    patches, grid = torch.randn(32, 96), GRID.repeat(2, 1)
    assert packed_pictures({"pixel_values": patches, "image_grid_thw": grid}) == 2
    other = torch.tensor([[1, 4, 4], [1, 8, 2]])
    assert packed_pictures({"pixel_values": patches, "image_grid_thw": other}) == 1
    assert packed_pictures({"pixel_values": torch.randn(2, 3, 8, 8), "image_grid_thw": grid}) == 0
    assert packed_pictures({"pixel_values": patches}) == packed_pictures(patches) == 0
    model, inputs = tower("qwen2.5-vl")
    with pytest.raises(SettingsError, match="'macs' needs calibration pictures"):
        comcat.compress(model, [inputs], reduce=0.05, budget="macs")

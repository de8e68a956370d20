"""One small model a family of timm and transformers: what ``families.py`` looks at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family, the name of its small model, and how it is built and called."""

    library: str
    name: str
    model: str
    build: Callable[[], nn.Module]
    image: int = 32
    more: Callable[[nn.Module], dict[str, Any]] | None = None
    pictures: int = 2
    given: Callable[[torch.Generator], dict[str, Any]] | None = None

    def inputs(self, model: nn.Module, pictures: int | None = None, seed: int = 0) -> Any:
        """Random pictures, with what else the model takes; or whatever it takes, where that is no picture."""
        generator = torch.Generator().manual_seed(seed)
        if self.given is not None:
            return self.given(generator)
        count = self.pictures if pictures is None or self.more is not None else pictures
        pixels = torch.randn(count, 3, self.image, self.image, generator=generator)
        return pixels if self.more is None else {"pixel_values": pixels, **self.more(model)}


def _timm(name: str, model: str, image: int = 224, **settings: Any) -> Family:
    def build() -> nn.Module:
        import timm

        return timm.create_model(model, **{"num_classes": 7, **settings})

    return Family(library="timm", name=name, model=model, build=build, image=image)


_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_WINDOWS: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
TIMM = (
    _timm("vit", "vit_tiny_patch16_224", 32, **_VIT),
    _timm("vit, parallel scaling (xp)", "vit_medium_patch16_reg4_gap_256", 32, **_VIT),
    _timm("deit", "deit_tiny_distilled_patch16_224", 32, **_VIT),
    _timm("deit3", "deit3_small_patch16_224", 32, **_VIT),
    _timm("dinov2", "vit_small_patch14_dinov2", 32, **_VIT),
    _timm("dinov3", "vit_small_patch16_dinov3", 32, **_VIT),
    _timm("siglip", "vit_base_patch16_siglip_224", 32, **_VIT),
    _timm("clip", "vit_base_patch32_clip_224", 32, **_VIT),
    _timm("beit", "beit_base_patch16_224", 32, **_VIT),
    _timm("eva02", "eva02_tiny_patch14_224", 32, **_VIT),
    _timm("relpos", "vit_relpos_base_patch16_clsgap_224", 32, **_VIT),
    _timm("samvit", "samvit_base_patch16", 32, **_VIT, window_size=3, global_attn_indexes=(1,), neck_chans=8),
    _timm("swin", "swin_tiny_patch4_window7_224", 64, **_WINDOWS),
    _timm("swinv2", "swinv2_tiny_window8_256", 64, **_WINDOWS),
    _timm("swinv2_cr", "swinv2_cr_tiny_224", 64, **_WINDOWS),
    _timm("cait", "cait_xxs24_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4),
    _timm("coat", "coat_lite_tiny", 64, img_size=64, embed_dims=[16, 32, 40, 48], serial_depths=[1, 1, 1, 1]),
    _timm("convit", "convit_tiny", 32, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4,
        local_up_to_layer=1),
    _timm("crossvit", "crossvit_tiny_240", 120, img_size=120, embed_dim=(24, 48), depth=((1, 2, 0), (1, 1, 0))),
    _timm("davit", "davit_tiny", 64, depths=(1, 1), embed_dims=(24, 48), num_heads=(2, 4), window_size=4),
    _timm("edgenext", "edgenext_xx_small", 64, depths=(1, 1, 2, 2)),
    _timm("efficientformer", "efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 48)),
    _timm("efficientformerv2", "efficientformerv2_s0", 64, img_size=64, depths=(1, 1, 2, 2),
        embed_dims=(16, 24, 32, 48), num_vit=1, mlp_ratios=4),
    _timm("efficientvit_mit", "efficientvit_b0", 64, depths=(1, 1, 1, 1, 1), head_widths=(48, 48)),
    _timm("efficientvit_msra", "efficientvit_m0", 224, embed_dim=(32, 48, 64), depth=(1, 1, 1)),
    _timm("fastvit", "fastvit_sa12", 64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 64)),
    _timm("gcvit", "gcvit_xxtiny", 64, img_size=64, embed_dim=16),
    _timm("hiera", "hiera_tiny_224", 64, img_size=64, embed_dim=24, num_heads=1, stages=(1, 1, 1, 1)),
    _timm("sam2_hiera", "sam2_hiera_tiny", 64, embed_dim=24, stages=(1, 2, 1, 1), global_att_blocks=(2,)),
    _timm("iformer", "iformer_t", 64, dims=(16, 24, 32, 48), depths=(1, 1, 4, 4), attn_groups=(0, 0, 1, 1)),
    _timm("levit", "levit_128s", 64, img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1),
        key_dim=8),
    _timm("levit_conv", "levit_conv_128s", 64, img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4),
        depth=(1, 1, 1), key_dim=8),
    _timm("maxvit", "maxvit_tiny_tf_224", 64, img_size=64, stem_width=16, embed_dim=(32, 32), depths=(1, 1),
        block_type=("M", "M")),
    _timm("maxvit_rw", "maxvit_rmlp_pico_rw_256", 64, img_size=64, stem_width=16, embed_dim=(32, 32), depths=(1, 1),
        block_type=("M", "M")),
    _timm("maxxvit", "maxxvit_rmlp_nano_rw_256", 64, img_size=64, stem_width=16, embed_dim=(32, 32), depths=(1, 1),
        block_type=("M", "M")),
    _timm("coatnet", "coatnet_nano_rw_224", 64, img_size=64, stem_width=16, embed_dim=(32, 32, 64), depths=(1, 1, 1),
        block_type=("C", "C", "T")),
    _timm("caformer", "caformer_s18", 64),
    _timm("mobilevit", "mobilevit_xxs", 64),
    _timm("mobilevitv2", "mobilevitv2_050", 64),
    _timm("mvitv2", "mvitv2_tiny", 64, img_size=64),
    _timm("nest", "nest_tiny", 64, img_size=64),
    _timm("nextvit", "nextvit_small", 64, depths=(1, 2, 5, 2), stem_chs=(8, 8, 16)),
    _timm("pit", "pit_ti_224", 64, img_size=64, base_dims=(16, 16, 16), depth=(1, 1, 1)),
    _timm("pvt_v2", "pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 40, 64)),
    _timm("tiny_vit", "tiny_vit_5m_224", 64, embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4), window_sizes=(4, 4, 4, 2)),
    _timm("tnt", "tnt_s_legacy_patch16_224", 64, img_size=64, embed_dim=48, depth=2, num_heads_outer=3),
    _timm("twins", "twins_svt_small", 64, img_size=64, embed_dims=(16, 32, 40, 64), num_heads=(1, 2, 2, 4),
        depths=(2, 2, 2, 2), wss=(4, 4, 2, 2)),
    _timm("twins_pcpvt", "twins_pcpvt_small", 64, img_size=64, embed_dims=(16, 32, 40, 64), num_heads=(1, 2, 2, 4),
        depths=(1, 1, 1, 1)),
    _timm("visformer", "visformer_tiny", 64, img_size=64, embed_dim=48, depth=(1, 1, 1)),
    _timm("volo", "volo_d1_224", 64, img_size=64),
    _timm("xcit", "xcit_nano_12_p16_224", 32, img_size=32, embed_dim=32, depth=2, num_heads=2),
    _timm("vitamin", "vitamin_small_224", 64, img_size=64, depth=2),
    _timm("shvit", "shvit_s1", 64, embed_dim=(32, 48, 64), depth=(1, 1, 1), partial_dim=(16, 16, 16)),
    _timm("swiftformer", "swiftformer_xs", 64, layers=(1, 1, 1, 1), embed_dims=(16, 24, 32, 48)),
    _timm("mobilenetv4", "mobilenetv4_hybrid_medium", 64),
    _timm("botnet", "botnet26t_256", 64, img_size=64),
    _timm("halonet", "halonet26t", 256),
    _timm("resnet hybrid", "vit_tiny_r_s16_p8_224", 32, img_size=32, embed_dim=48, depth=2, num_heads=3),
    _timm("lowformer", "lowformer_b0", 64),
    _timm("cpubone", "cpubone_nano", 64),
    _timm("csatv2", "csatv2", 64),
    _timm("naflexvit", "naflexvit_base_patch16_gap", 32, embed_dim=48, depth=2, num_heads=3),
    _timm("qwen3_vit", "qwen3_vit_88m", 64, embed_dim=48, depth=2, num_heads=3),
    _timm("gemma4_vit", "gemma4_vit_167m", 96, embed_dim=48, depth=2, num_heads=3, head_dim=16),
    _timm("deepseek_vit", "deepseek_vit_412m", 84, embed_dim=48, depth=2, num_heads=3),
)  # fmt: skip


def _hf(
    name: str, model: str, config: str, image: int = 32, more: Any = None, pictures: int = 2, given: Any = None,
    **settings: Any,
) -> Family:  # fmt: skip
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings))

    return Family(
        library="transformers", name=name, model=model, build=build, image=image, more=more,
        pictures=pictures, given=given,
    )  # fmt: skip


_HF: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_HF_SWIN: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4),
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 99,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": (16, 32), "depths": (1, 2), "num_attention_heads": (1, 2)}


def _words(model: nn.Module) -> dict[str, Any]:
    tokens = torch.tensor([[5, 6, 7, 1], [8, 9, 3, 1]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _patches(generator: torch.Generator) -> dict[str, Any]:
    """Two pictures of 4 × 4 patches in one row, each patch of 4 × 4 pixels in two frames, with words."""
    ids = torch.tensor([[41, *[40] * 4, 42, 3], [41, *[40] * 4, 42, 4]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 40).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }  # fmt: skip


def _film(name: str, frames: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {name: torch.randn(2, frames, 3, 32, 32, generator=generator)}


def _prompt(tokens: int) -> Callable[[nn.Module], dict[str, Any]]:
    """A picture's tokens, then words."""
    ids = torch.tensor([[40] * tokens + [3, 4, 5]])
    return lambda model: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_LANGUAGE: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "text_config": {**_LANGUAGE, "head_dim": 12, "bos_token_id": 0, "eos_token_id": 1, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    "image_token_id": 40, "vision_start_token_id": 41, "vision_end_token_id": 42, "video_token_id": 43,
}  # fmt: skip
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 48, "out_hidden_size": 48, "num_heads": 3, "patch_size": 4, "intermediate_size": 96,
}  # fmt: skip
_CONV: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
_DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "num_queries": 5, "backbone_config": _CONV,
}  # fmt: skip
TRANSFORMERS = (
    _hf("vit", "ViTForImageClassification", "ViTConfig", **_HF),
    _hf("deit", "DeiTModel", "DeiTConfig", **_HF),
    _hf("dinov2", "Dinov2Model", "Dinov2Config", **_HF),
    _hf("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_HF),
    _hf("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **_HF),
    _hf("ijepa", "IJepaModel", "IJepaConfig", **_HF),
    _hf("vit_mae", "ViTMAEModel", "ViTMAEConfig", **_HF),
    _hf("vit_msn", "ViTMSNModel", "ViTMSNConfig", **_HF),
    _hf("beit", "BeitModel", "BeitConfig", **_HF, use_relative_position_bias=True),
    _hf("data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig", **_HF, use_relative_position_bias=True),
    _hf("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", **_HF),
    _hf("clip", "CLIPModel", "CLIPConfig", more=_words, vision_config=_HF, text_config=_TEXT, projection_dim=16),
    _hf("siglip", "SiglipVisionModel", "SiglipVisionConfig", **_HF),
    _hf("chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **_HF),
    _hf("blip", "BlipVisionModel", "BlipVisionConfig", **_HF),
    _hf("blip_2", "Blip2VisionModel", "Blip2VisionConfig", **_HF),
    _hf("instructblip", "InstructBlipVisionModel", "InstructBlipVisionConfig", **_HF),
    _hf("flava", "FlavaImageModel", "FlavaImageConfig", **_HF),
    _hf("groupvit", "GroupViTVisionModel", "GroupViTVisionConfig", **{**_HF, "hidden_size": 48, "depths": [1, 1, 1],
        "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}),
    _hf("internvl_vision", "InternVLVisionModel", "InternVLVisionConfig", **{**_HF, "image_size": [32, 32],
        "patch_size": [8, 8]}),
    _hf("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", **_HF),
    _hf("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig", **_HF),
    _hf("owlv2", "Owlv2VisionModel", "Owlv2VisionConfig", **_HF),
    _hf("altclip", "AltCLIPVisionModel", "AltCLIPVisionConfig", **_HF),
    _hf("clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig", **_HF),
    _hf("yolos", "YolosModel", "YolosConfig", **{**_HF, "image_size": (32, 32)}),
    _hf("swin", "SwinModel", "SwinConfig", 64, **_HF_SWIN),
    _hf("swinv2", "Swinv2Model", "Swinv2Config", 64, **_HF_SWIN),
    _hf("donut", "DonutSwinModel", "DonutSwinConfig", 64, **_HF_SWIN),
    _hf("segformer", "SegformerModel", "SegformerConfig", 64, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 1],
        hidden_sizes=[16, 32], num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[4, 4]),
    _hf("pvt", "PvtModel", "PvtConfig", 64, image_size=64, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2]),
    _hf("pvt_v2", "PvtV2Model", "PvtV2Config", 64, image_size=64, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2]),
    _hf("glpn", "GLPNModel", "GLPNConfig", 64, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2]),
    _hf("mobilevit", "MobileViTModel", "MobileViTConfig", 64, image_size=64, hidden_sizes=[24, 32, 48]),
    _hf("mobilevitv2", "MobileViTV2Model", "MobileViTV2Config", 64, image_size=64, width_multiplier=0.5),
    _hf("cvt", "CvtModel", "CvtConfig", 64, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0]),
    _hf("levit", "LevitModel", "LevitConfig", 64, image_size=64, hidden_sizes=[32, 48, 64], depths=[1, 1, 1],
        num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8]),
    _hf("dpt", "DPTModel", "DPTConfig", **_HF, is_hybrid=False),
    _hf("sam", "SamVisionModel", "SamVisionConfig", hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        image_size=32, patch_size=8, mlp_dim=96, output_channels=8, window_size=3, global_attn_indexes=[1]),
    _hf("hiera", "HieraModel", "HieraConfig", 64, image_size=[64, 64], embed_dim=24, depths=[1, 1], num_heads=[1, 2],
        query_stride=[2, 2], num_query_pool=1),
    _hf("vitdet", "VitDetModel", "VitDetConfig", hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        image_size=32, pretrain_image_size=32, patch_size=8, mlp_ratio=2),
    _hf("vilt", "ViltModel", "ViltConfig", more=_words, **{**_HF, "vocab_size": 99, "max_position_embeddings": 16}),
    _hf("pixtral", "PixtralVisionModel", "PixtralVisionConfig", pictures=1, hidden_size=48, num_hidden_layers=2,
        head_dim=16, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8),
    _hf("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", given=_patches, **_QWEN, vision_config={
        "depth": 2, "embed_dim": 48, "hidden_size": 48, "num_heads": 3, "patch_size": 4, "mlp_ratio": 2}),
    _hf("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", given=_patches, **_QWEN,
        vision_config={**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]}),
    _hf("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", given=_patches, **_QWEN, vision_config={
        **_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    _hf("timesformer", "TimesformerModel", "TimesformerConfig", given=_film("pixel_values", 2), num_frames=2, **_HF),
    _hf("vjepa2", "VJEPA2Model", "VJEPA2Config", given=_film("pixel_values_videos", 4), crop_size=32, patch_size=8,
        frames_per_clip=4, hidden_size=48, num_attention_heads=3, num_hidden_layers=2, pred_hidden_size=24,
        pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=2),
    _hf("videomae", "VideoMAEModel", "VideoMAEConfig", given=_film("pixel_values", 2), num_frames=2, **_HF),
    _hf("vivit", "VivitModel", "VivitConfig", given=_film("pixel_values", 2), num_frames=2, tubelet_size=[2, 8, 8],
        **_HF),
    _hf("llava", "LlavaForConditionalGeneration", "LlavaConfig", more=_prompt(16), pictures=1,
        vision_config={"model_type": "clip_vision_model", **_HF}, text_config={"model_type": "llama", **_LANGUAGE},
        image_token_index=40, vision_feature_layer=-1),
    _hf("internvl", "InternVLForConditionalGeneration", "InternVLConfig", more=_prompt(4), pictures=1,
        vision_config={**_HF, "image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=40,
        text_config={"model_type": "qwen2", **_LANGUAGE}),
    _hf("detr", "DetrModel", "DetrConfig", 64, **_DETR),
    _hf("conditional_detr", "ConditionalDetrModel", "ConditionalDetrConfig", 64, **_DETR),
    _hf("idefics3", "Idefics3VisionTransformer", "Idefics3VisionConfig", **_HF),
    _hf("siglip2", "SiglipModel", "SiglipConfig", more=_words, vision_config=_HF, text_config={**_TEXT,
        "projection_size": 48}),
)  # fmt: skip

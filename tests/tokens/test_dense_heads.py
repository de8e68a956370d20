"""Heads that read every token, on blocks that run on fewer: maps keep their size, and all goes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import comcat
from comcat.forms.tokens import grid_entry, token_entry
from comcat.measure.running import call
from comcat.plan import Plan
from comcat.sites import part
from comcat.statistics.trunk import Trunk, find_trunk

from ..models import pictures, shake, tiny_vit

SQUARE, WIDE = pictures(2, 2)[0], torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
STAGES = [f"stage{n}" for n in (1, 2, 3, 4)]


class SegformerStyle(nn.Module):
    """A head of linear layers, one a level, as SegFormer's (Xie et al. 2021, §3.2), on features of a timm backbone."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        import timm

        small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", features_only=True, out_indices=(0, 1, 2, 3), dynamic_img_size=True, **small
        )
        self.levels = nn.ModuleList(nn.Conv2d(48, 16, 1) for _ in range(4))
        self.fuse = nn.Sequential(nn.Conv2d(64, 16, 1), nn.GELU(), nn.Conv2d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = [level(f) for level, f in zip(self.levels, self.backbone(x), strict=True)]
        return F.interpolate(self.fuse(torch.cat(maps, 1)), x.shape[-2:], mode="bilinear")


def dinov2(**more: Any) -> Any:
    import transformers as tf

    return tf.Dinov2Config(**BLOCKS, mlp_ratio=2, out_features=STAGES, **more)


def dpt() -> nn.Module:
    import transformers as tf

    head = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    config = tf.DPTConfig(
        **BLOCKS, intermediate_size=64, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, num_labels=3, **head
    )
    return tf.DPTForSemanticSegmentation(config)


def depth_anything() -> nn.Module:
    import transformers as tf

    head = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "head_hidden_size": 8, "patch_size": 8}
    backbone = dinov2(reshape_hidden_states=False)
    return tf.DepthAnythingForDepthEstimation(
        tf.DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, **head)
    )


def upernet() -> nn.Module:
    import transformers as tf

    config = tf.UperNetConfig(
        backbone_config=dinov2(), hidden_size=16, pool_scales=[1, 2], num_labels=3, auxiliary_in_channels=32
    )
    return tf.UperNetForSemanticSegmentation(config)


def classifier() -> nn.Module:
    import transformers as tf

    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**BLOCKS, mlp_ratio=2, num_labels=3))


def detector() -> nn.Module:
    import transformers as tf

    sizes = {**BLOCKS, "image_size": [32, 32], "intermediate_size": 64}
    return tf.YolosForObjectDetection(tf.YolosConfig(**sizes, num_detection_tokens=5, num_labels=3))


HEADS = {
    "segformer": SegformerStyle, "dpt": dpt, "depth-anything": depth_anything, "upernet": upernet, "dinov2": classifier,
    "yolos": detector,
}  # fmt: skip


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = HEADS[request.param]().eval()
    shake(model)
    return model


def merged(trunk: Trunk, how: str, share: float = 0.5) -> Plan:
    """All blocks on this share of their tokens."""
    if how == "grid":
        return Plan(sites={s.name: grid_entry(s, (1, 1) if share == 1 else (1, 2)) for s in trunk.sites})
    return Plan(sites={s.name: token_entry(s, how, round(share * s.full)) for s in trunk.sites})


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The map that it puts out: (batch, …) without classes, or one of every class."""
    with torch.no_grad():
        said = call(model, x)
    if isinstance(said, Tensor):
        return said
    return said.predicted_depth if hasattr(said, "predicted_depth") else said.logits


@pytest.mark.parametrize("how", ["similar", "grid"])
def test_maps_keep_their_size_and_all_goes_back(model: nn.Module, how: str) -> None:
    trunk = find_trunk(model, SQUARE[:1])
    assert len(trunk.sites) == 4 and trunk.sites[0].grid == (4, 4), trunk.refused
    sizes = (SQUARE,) if "DPT" in type(model).__name__ else (SQUARE, WIDE)  # DPT itself knows squares alone
    before = {x: output(model, x) for x in sizes}
    for share in (1.0, 0.5):
        handle = comcat.apply_(model, merged(trunk, how, share))
        for x, dense in before.items():
            few = output(model, x)
            assert few.shape == dense.shape and few.isfinite().all()
            assert few.equal(dense) == (share == 1)
        handle.revert()
    assert all(output(model, x).equal(dense) for x, dense in before.items())


def test_a_schedule_is_chosen_for_every_head(model: nn.Module) -> None:
    plan = comcat.merge(model, [SQUARE], keep=0.6)
    before = output(model, SQUARE)
    handle = comcat.apply_(model, plan)
    assert output(model, SQUARE).shape == before.shape and not output(model, SQUARE).equal(before)
    handle.revert()


@pytest.mark.parametrize("how", ["similar", "grid"])
def test_features_of_timm_have_the_whole_grid(how: str) -> None:
    model = tiny_vit(dynamic_img_size=True)
    comcat.apply_(model, merged(find_trunk(model, SQUARE[:1]), how))
    for x, grid in ((SQUARE, (4, 4)), (WIDE, (4, 6))):
        with torch.no_grad():
            layers = model.get_intermediate_layers(x, n=2, reshape=True, return_prefix_tokens=True)
            last, maps = model.forward_intermediates(x)
        assert [f.shape for f, _ in layers] == [m.shape for m in maps] == [(2, 48, *grid)] * 2
        assert [p.shape for _, p in layers] == [(2, 1, 48)] * 2
        assert last.shape == (2, 1 + grid[0] * grid[1], 48)


def test_what_a_merge_leaves_alone_is_told_apart_by_place() -> None:
    """A token of its own gets its own update: merging moves the maps least where tokens were not merged."""
    model = tiny_vit()
    with torch.no_grad():
        x = model.patch_embed(SQUARE)
    assert x.shape[1] == 16
    comcat.apply_(model, merged(find_trunk(model, SQUARE[:1]), "similar", 0.75))
    with torch.no_grad():
        _, maps = model.forward_intermediates(SQUARE)
    assert all(len(m.flatten(2).unique(dim=2).unbind(2)) == 16 for m in maps)


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_detection_tokens_behind_the_grid_run_as_themselves(how: str) -> None:
    model = detector().eval()
    shake(model)
    plan = comcat.merge(model, [SQUARE], keep=0.6, how=how)
    told = next(iter(plan.sites.values()))
    assert (told.full, told.details["tokens"]["prefix"], told.details["tokens"]["suffix"]) == (16, 6, 5)
    block = part(model, next(iter(plan.sites)).removesuffix(":tokens"))
    x = torch.randn(2, 22, 32)
    comcat.apply_(model, Plan.from_json(plan.to_json()))
    x[:, -5:-1] = 1.0  # alike: the first to be merged, if they were the grid's
    few: list[Tensor] = []
    inside = next(m for n, m in block.named_modules() if "norm" in type(m).__name__.lower())
    inside.register_forward_hook(lambda m, i, o: few.append(i[0]))
    with torch.no_grad():
        after = block(x)
    after = after[0] if isinstance(after, tuple) else after
    assert after.shape == x.shape and few[-1].shape[1] == 6 + told.keep
    assert few[-1][:, 1:6].equal(x[:, -5:]) and few[-1][:, :1].equal(x[:, :1])


@pytest.mark.parametrize("name", ["upernet", "depth-anything"])
def test_a_dense_model_without_an_image_processor_is_merged_at_its_backbones_size(name: str, tmp_path: Path) -> None:
    HEADS[name]().save_pretrained(tmp_path / "model")
    few = comcat.open_pictures("digits:train").take(8, 0)
    way = {"bench": False, "batch_size": 4}
    done = comcat.merge_to(tmp_path / "merged", str(tmp_path / "model"), few, keep=0.7, pictures=2, way=way)
    assert done.record.plan.sites and tuple(done.record.preprocess["size"]) == (32, 32)  # type: ignore[index]
    again = comcat.load(tmp_path / "merged")
    torch.testing.assert_close(output(again, SQUARE), output(done.model.eval(), SQUARE), atol=1e-6, rtol=1e-5)

"""Models as people have them: changed by hand, wrapped, of other libraries. Saved and loaded they compute the same."""

import copy

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import BudgetError, ModelError, StoreError
from comcat.store import load, load_model, save

from ..models import tiny_vit
from ..test_store import front_matter, shaken, transformers_model


def small(model: nn.Module) -> nn.Module:
    return comcat.compress(model, reduce=0.3, statistic="weights")


def output(model: nn.Module, size: int = 32) -> torch.Tensor:
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y = model(pictures)
    return getattr(y, "logits", y)


def comes_back(model: nn.Module, folder, size: int = 32, **how) -> nn.Module:
    loaded = load(save(model, folder), **how)
    assert torch.equal(output(loaded, size), output(model, size))
    return loaded


# Heads and sizes


def by_timm(model):
    model.reset_classifier(7)


def by_hand(model):
    model.head = nn.Linear(48, 7)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [by_timm, by_hand])
@pytest.mark.parametrize("remembered", [False, True], ids=["made-by-timm", "made-by-load_model"])
def test_another_head_comes_back(change, when, remembered, tmp_path):
    model = tiny_vit()
    if remembered:
        model = shaken(comcat.models.origin_of(model).build())
    if when == "before":
        change(model)
    model = small(model)
    if when == "after":
        change(model)
    loaded = comes_back(model, tmp_path / "small")
    assert loaded.num_classes == 7 and loaded.comcat_record.class_names is None
    comes_back(loaded, tmp_path / "again")


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_picture_size_comes_back(when, tmp_path):
    model = tiny_vit()
    if when == "before":
        model.set_input_size((64, 64))
    model = small(model)
    if when == "after":
        model.set_input_size((64, 64))
    loaded = comes_back(model, tmp_path / "small", size=64)
    assert comcat.preprocess_of(loaded).size == (64, 64)
    assert tuple(loaded.comcat_record.preprocess["size"]) == (64, 64)


@pytest.mark.parametrize("when", ["before", "after"])
def test_other_labels_of_transformers_come_back(when, tmp_path):
    model = transformers_model("ViT")
    if when == "before":
        model.classifier = nn.Linear(24, 7)
    model = small(model)
    if when == "after":
        model.classifier = nn.Linear(24, 7)
    assert comes_back(model, tmp_path / "small", size=16).config.num_labels == 7


# Wrappers


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
def test_a_wrapped_model_is_compressed_without_its_wrapper(wrap, tmp_path):
    model = tiny_vit()
    plain = small(model)
    wrapped = comcat.compress(wrap(model), reduce=0.3, statistic="weights")
    assert type(wrapped) is type(model)
    assert wrapped.comcat_record.plan.sites == plain.comcat_record.plan.sites
    assert torch.equal(output(comes_back(wrapped, tmp_path / "small")), output(plain))
    assert set(comcat.find_sites(wrap(model))) == set(comcat.find_sites(model))


class WithLoss(nn.Module):
    """A model beside its criterion, as training code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss = tiny_vit(), nn.CrossEntropyLoss()

    def forward(self, x):
        return self.model(x)


def of_torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return shaken(
        VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5
        )
    )


def with_a_deep_head() -> nn.Module:
    model = tiny_vit()
    model.head = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
    return model


@pytest.mark.parametrize("make", [WithLoss, of_torchvision, with_a_deep_head])
def test_what_no_library_can_build_comes_back_into_a_model_of_ones_own(make, tmp_path, caplog):
    model = small(make())
    folder = save(model, tmp_path / "small")
    assert "into=model" in caplog.text
    with pytest.raises(ModelError, match=r"comcat cannot build a .*; load it by comcat\.load\(folder, into=model\)"):
        load(folder)
    with pytest.raises(ModelError, match=r"into=model"):
        load_model(folder)
    fresh = make()
    for p in fresh.parameters():
        p.data.zero_()
    loaded = load(folder, into=fresh)
    assert loaded is fresh and torch.equal(output(loaded), output(model)) and not loaded.training
    assert loaded.comcat_record.plan == model.comcat_record.plan
    comes_back(loaded, tmp_path / "again", into=make())
    assert "into=model" in front_matter(folder)["text"]
    with pytest.raises(StoreError, match=r"no stock export"):
        save(model, tmp_path / "stock", stock=True)


def test_a_model_of_another_kind_to_load_into_is_refused_and_stays_as_it_was(tmp_path):
    folder = save(small(of_torchvision()), tmp_path / "small")
    for other in (tiny_vit(), small(of_torchvision())):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(StoreError, match=r"the plan does not fit"):
            load(folder, into=other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    wider = of_torchvision()
    wider.conv_proj = nn.Conv2d(3, 48, 8, 8, bias=False)
    names = list(wider.state_dict())
    with pytest.raises(StoreError, match=r"do not fit.*conv_proj"):
        load(folder, into=wider)
    assert list(wider.state_dict()) == names  # what the plan had changed was taken back


def test_compression_taken_back_is_not_saved_as_compressed(tmp_path):
    model = of_torchvision()
    plan = small(model).comcat_record.plan
    handle = comcat.apply_(model, plan)
    save(model, tmp_path / "small", plan=plan)
    handle.revert()
    with pytest.raises(StoreError, match=r"stands as it was before"):
        save(model, tmp_path / "other", plan=plan)
    assert not (tmp_path / "other").exists()


# Of transformers


def detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=4, num_labels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config).eval()


def real_time(kind: str, backbone: str, **shape) -> nn.Module:
    """RT-DETR or D-FINE, with as little as they run on."""
    import transformers

    sides = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1] * 4}
    stages = ["stage2", "stage3", "stage4"]
    below = getattr(transformers, backbone)(**sides, **shape, out_features=stages)
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=below, use_pretrained_backbone=False, encoder_in_channels=[16, 32, 32],
        decoder_in_channels=[32] * 3, encoder_hidden_dim=32, encoder_ffn_dim=64, d_model=32, decoder_ffn_dim=64,
        encoder_layers=1, decoder_layers=2, num_queries=10, encoder_attention_heads=4, decoder_attention_heads=4,
        num_denoising=0, num_labels=5, anchor_image_size=None, hidden_expansion=0.5,
    )  # fmt: skip
    return shaken(getattr(transformers, f"{kind}ForObjectDetection")(config).eval())


HGNET = {
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 32], "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 16, 32, 32], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4,
}  # fmt: skip
DETECTORS = {
    "DETR": detr,
    "RT-DETR": lambda: real_time("RTDetr", "RTDetrResNetConfig"),
    "RT-DETR v2": lambda: real_time("RTDetrV2", "RTDetrResNetConfig"),
    "D-FINE": lambda: real_time("DFine", "HGNetV2Config", **HGNET),
}


@pytest.mark.parametrize("name", list(DETECTORS))
def test_a_detector_with_a_convolutional_backbone_comes_back(name, tmp_path):
    dense = DETECTORS[name]()
    model = comcat.compress(dense, reduce=0.05, statistic="weights")
    loaded = comes_back(model, tmp_path / "small", size=64)
    assert type(loaded) is type(model)
    with pytest.raises(BudgetError, match=r"the sites that can shrink allow at most 0\.\d+ of the model's parameters"):
        comcat.compress(dense, reduce=0.95, statistic="weights")


def test_save_pretrained_of_a_compressed_model_says_what_to_do_instead(tmp_path):
    model = small(transformers_model("ViT"))
    model.save_pretrained(tmp_path / "theirs")
    for way in (load, load_model):
        with pytest.raises((StoreError, ModelError), match=r"comcat\.save\(model, folder\).*leaves out its plan"):
            way(tmp_path / "theirs")

"""Models of other people: found, built, built again."""

import ast
import copy
import json
import logging
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import comcat.models
from comcat.errors import ComcatError, ModelError, SettingsError
from comcat.models import Origin, attach_origin, class_names_of, load_model, origin_of, preprocess_of

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**VIT, "num_classes": 0}),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {**VIT, "mlp_ratio": 3.3}),
    "beit": ("beit_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", {**VIT, "swiglu_mlp": True}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
}

HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
HF |= {"image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "ViTForImageClassification": HF,
    "DeiTForImageClassificationWithTeacher": HF,
    "Dinov2ForImageClassification": HF,
    "BeitForImageClassification": {**HF, "use_relative_position_bias": True},
    "CLIPVisionModel": HF,
    "CLIPVisionModelWithProjection": {**HF, "projection_dim": 16},
    "SiglipVisionModel": HF,
    "SwinForImageClassification": {
        "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name: str = "vit", **changes) -> nn.Module:
    architecture, arguments = TIMM[name]
    return randomised(timm.create_model(architecture, **{**arguments, **changes}).eval())


def tiny_hf(name: str, **changes) -> nn.Module:
    cls = getattr(transformers, name)
    return randomised(cls(cls.config_class(**{**TRANSFORMERS[name], **changes})).eval())


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter away from what it was initialised to, so that none can be forgotten unseen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def outputs(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        result = model(images)
    values = result.values() if hasattr(result, "values") and not torch.is_tensor(result) else [result]
    return [v for v in values if torch.is_tensor(v)]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    mine, others = outputs(a), outputs(b)
    assert len(mine) == len(others) > 0
    assert all(torch.equal(x, y) for x, y in zip(mine, others, strict=True))


def through_json(origin: Origin) -> Origin:
    again = Origin.from_dict(json.loads(json.dumps(origin.to_dict())))
    assert again == origin
    return again


def assert_builds(origin: Origin, model: nn.Module) -> None:
    built = through_json(origin).build()
    assert not built.training
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    built.load_state_dict(model.state_dict(), strict=True)
    assert_same(built, model)
    assert origin_of(built) == origin


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def config_only(folder: Path, **config) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def local_dir(folder: Path, model: nn.Module, **extra) -> str:
    """timm's own layout, by timm's own hand."""
    from timm.models import save_for_hf

    save_for_hf(model, folder, model_config=extra, safe_serialization=True)
    return str(folder)


# ------------------------------------------------------------------------------------------ building again


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_builds_again(name):
    model = tiny(name)
    origin = origin_of(model)
    assert_builds(origin, model)
    assert origin_of(model) == origin  # though it has been run since


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_without_a_record_of_its_arguments_builds_again(name):
    model = tiny(name)
    del model._model_args, model._traits
    origin = origin_of(model)
    assert origin.name == TIMM[name][0]
    built = origin.build()
    built.load_state_dict(model.state_dict(), strict=True)
    assert_same(built, model)


def test_timm_class_called_directly():
    from timm.models.vision_transformer import VisionTransformer

    model = randomised(
        VisionTransformer(**{**VIT, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}).eval()
    )
    assert_builds(origin_of(model), model)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_folder_loads_and_builds_again(name, tmp_path):
    model = tiny_hf(name)
    folder = saved(model, tmp_path / "model")
    loaded = load_model(folder)
    assert type(loaded) is type(model)
    assert_same(loaded, model)
    origin = origin_of(loaded)
    assert (origin.library, origin.name, origin.source) == ("transformers", name, folder)
    assert_builds(origin, model)
    handed_in = origin_of(model)
    assert (handed_in.source, handed_in.arguments) == ("", origin.arguments)


def test_constructor_arguments_beside_the_config_are_kept(tmp_path):
    model = randomised(transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False).eval())
    assert_builds(origin_of(model), model)
    loaded = load_model(saved(model, tmp_path / "m"), add_pooling_layer=False)
    assert_builds(origin_of(loaded), model)


def test_attention_implementation_is_kept():
    config = transformers.ViTConfig(**HF, attn_implementation="eager")
    built = origin_of(transformers.ViTForImageClassification(config)).build()
    assert built.config._attn_implementation == "eager"


def test_a_half_precision_config_does_not_make_a_half_precision_model(tmp_path):
    model = tiny_hf("ViTForImageClassification").half()
    folder = saved(model, tmp_path / "m")
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in origin_of(load_model(folder, dtype=torch.float16)).build().parameters()} == {torch.float32}


def test_origin_survives_copies_and_wrappers(tmp_path):
    model = load_model(local_dir(tmp_path / "m", tiny()))
    origin = origin_of(model)
    assert isinstance(model.comcat_origin, dict)
    assert origin_of(copy.deepcopy(model)) == origin
    assert origin_of(pickle.loads(pickle.dumps(model))) == origin
    assert origin_of(torch.compile(model)) == origin


def test_looking_for_an_origin_draws_no_random_numbers():
    model = tiny()
    before = torch.get_rng_state()
    origin_of(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_reset_after_loading_is_in_the_origin(tmp_path):
    model = load_model(local_dir(tmp_path / "m", tiny()))
    model.reset_classifier(7, "avg")
    origin = origin_of(model)
    assert (origin.arguments["num_classes"], origin.arguments["global_pool"]) == (7, "avg")
    assert origin.source == str(tmp_path / "m")
    origin.build().load_state_dict(model.state_dict(), strict=True)


def test_names_given_after_loading_are_in_the_origin(tmp_path):
    model = load_model(saved(tiny_hf("ViTForImageClassification"), tmp_path / "m"))
    model.config.id2label = {0: "cat", 1: "dog"}
    assert class_names_of(origin_of(model).build()) == ("cat", "dog")


def test_arguments_that_json_cannot_hold_are_left_out_where_they_do_not_matter():
    model = tiny(norm_layer=partial(nn.LayerNorm, eps=1e-6), proj_drop_rate=0.1)
    origin = origin_of(model)
    assert "norm_layer" not in origin.arguments
    assert origin.arguments["proj_drop_rate"] == 0.1


def test_arguments_that_json_cannot_hold_are_refused_where_they_matter():
    with pytest.raises(ModelError, match=r"norm_layer is not plain data; .*eps is 0\.001 here, 1e-06 built again"):
        origin_of(tiny(norm_layer=partial(nn.LayerNorm, eps=1e-3)))


def test_a_changed_head_count_is_seen():
    model = tiny()
    model.blocks[1].attn.num_heads = 1
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.num_heads is 1 here, 3 built again"):
        origin_of(model)
    model = tiny_hf("BeitForImageClassification")
    attention = model.beit.layers[1].attention
    attention.num_attention_heads = 1
    with pytest.raises(ModelError, match=r"num_attention_heads is 1 here, 3 built again"):
        origin_of(model)


def test_a_changed_activation_is_seen():
    model = tiny()
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ModelError, match=r"blocks\.0\.mlp\.act is a ReLU here, a GELU built again"):
        origin_of(model)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_head_exchanged_by_hand_is_told_or_named_with_the_way_out(library):
    model = tiny() if library == "timm" else tiny_hf("ViTForImageClassification")
    name = "head" if library == "timm" else "classifier"
    setattr(model, name, nn.Linear(48, 9))
    assert dict(origin_of(model).build().named_parameters())[f"{name}.weight"].shape == (9, 48)  # one layer is told
    setattr(model, name, nn.Sequential(nn.Linear(48, 9)))
    with pytest.raises(ModelError, match=rf"{name}\..*weight is only in.*origin=Origin"):
        origin_of(model)
    given = Origin(library=library, name="x")
    attach_origin(model, given)
    assert origin_of(model).name == "x"


class _Replacement(nn.Module):
    comcat_module = True

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(3, 3))


@pytest.mark.parametrize("path", ["blocks.0.attn", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "head"])
def test_modules_of_comcat_are_not_compared(path):
    model = tiny()
    expected = origin_of(model)
    model.set_submodule(path, _Replacement())
    assert origin_of(model) == expected


def test_attention_narrowed_in_a_transformers_model_is_not_compared():
    model = tiny_hf("ViTForImageClassification")
    expected = origin_of(model)
    attention = model.vit.layers[0].attention
    attention.k_proj, attention.head_dim = nn.Linear(48, 24, bias=False), 8
    model.vit.layers[1].mlp.fc1 = _Replacement()
    assert origin_of(model) == expected


def test_a_model_of_another_library_is_refused():
    with pytest.raises(ModelError, match=r"Sequential is a model of neither timm nor transformers.*origin=Origin"):
        origin_of(nn.Sequential(nn.Linear(2, 2)))


# ---------------------------------------------------------------------------------------- origins as data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"library": "timm"}, "lacks name"),
        ({"library": "timm", "name": "x", "argument": {}}, "no 'argument'.*did you mean 'arguments'"),
        ({"library": "tim", "name": "x"}, "'tim', expected 'timm', 'transformers' or 'own'"),
        ({"library": "timm", "name": 3}, "name is 3, expected text"),
        ({"library": "timm", "name": "x", "arguments": []}, "arguments is \\[\\]"),
        ({"library": "timm", "name": "x", "arguments": {"act": nn.GELU}}, "arguments.act is .*JSON"),
        ([], "names and values"),
    ],
)
def test_bad_origin_data(data, message):
    with pytest.raises(ModelError, match=message):
        Origin.from_dict(data)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin(library="timm", name="vit_tini_patch16_224"), "among its [0-9]+; did you mean 'vit_tiny_patch16_224'"),
        (Origin(library="timm", name="vit_tiny_patch16_224", arguments={"dept": 2}), "unexpected keyword.*'dept'"),
        (Origin(library="transformers", name="ViTForImage"), "no model class 'ViTForImage'"),
        (Origin(library="transformers", name="logging"), "no model class 'logging'"),
    ],
)
def test_origins_that_cannot_be_built(origin, message):
    with pytest.raises(ModelError, match=message):
        origin.build()


def test_origins_of_a_later_timm_still_build():
    model = tiny()
    origin = origin_of(model)
    later = Origin(**{**origin.to_dict(), "pretrained_cfg": {**origin.pretrained_cfg, "field_of_the_future": 1}})
    later.build().load_state_dict(model.state_dict(), strict=True)


# ------------------------------------------------------------------------------------------------ loading


def test_timm_folder_loads(tmp_path):
    model = tiny("vit", dynamic_img_size=True)
    folder = local_dir(tmp_path / "m", model, label_names=["a", "b", "c", "d", "e"])
    for spec in (folder, tmp_path / "m", f"timm:{folder}", f"timm:local-dir:{folder}", f"hf:{folder}"):
        loaded = load_model(spec)
        assert_same(loaded, model)
        assert not loaded.training
        assert origin_of(loaded).source == str(spec)
    assert class_names_of(loaded) == ("a", "b", "c", "d", "e")
    assert_builds(origin_of(loaded), model)
    assert class_names_of(load_model(folder, num_classes=3)) is None


def test_timm_architecture_with_random_weights_follows_the_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_model("timm:vit_tiny_patch16_224", pretrained=False, dtype=torch.bfloat16, **VIT))
    a, b, c = (m.blocks[0].attn.qkv.weight for m in models)
    assert a.dtype == torch.bfloat16
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert origin_of(models[0]).source == "timm:vit_tiny_patch16_224"


def test_transformers_folder_with_random_weights_needs_no_weights(tmp_path):
    model = tiny_hf("ViTForImageClassification")
    folder = saved(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    loaded = load_model(folder, pretrained=False, num_labels=4)
    assert loaded.classifier.weight.shape == (4, 48)
    assert origin_of(loaded).build().classifier.weight.shape == (4, 48)
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        load_model(folder)


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    local_dir(tmp_path / "m", tiny())
    assert load_model("~/m").num_classes == 5


def test_timm_weights_from_a_file(tmp_path):
    model = tiny()
    folder = local_dir(tmp_path / "m", model)
    overlay = {"file": f"{folder}/model.safetensors", "num_classes": 5}
    loaded = load_model("timm:vit_base_patch16_gap_224", pretrained_cfg_overlay=overlay, **VIT, global_pool="token",
                        class_token=True, fc_norm=False)  # fmt: skip
    assert_same(loaded, model)
    assert folder not in json.dumps(origin_of(loaded).to_dict())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_two_towers_the_one_that_sees(kind, tmp_path):
    text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=HF)
    both = randomised(getattr(transformers, f"{kind}Model")(config).eval())
    loaded = load_model(saved(both, tmp_path / "m"))
    assert type(loaded).__name__ == f"{kind}VisionModel"
    assert_same(loaded, both.vision_model)
    assert_builds(origin_of(loaded), loaded)


def test_a_new_head_leaves_the_rest_as_it_was(tmp_path):
    model = tiny_hf("ViTForImageClassification")
    loaded = load_model(saved(model, tmp_path / "m"), num_labels=7)
    old, new = model.state_dict(), loaded.state_dict()
    assert new["classifier.weight"].shape == (7, 48)
    assert all(torch.equal(old[k], new[k]) for k in old if not k.startswith("classifier"))
    assert_builds(origin_of(loaded), loaded)


def test_a_checkpoint_that_does_not_say_its_class(tmp_path):
    for name, cls in (("ViTForImageClassification", "ViTForImageClassification"), ("ViTModel", "ViTModel")):
        model = transformers.ViTModel(transformers.ViTConfig(**HF)) if name == "ViTModel" else tiny_hf(name)
        folder = tmp_path / name
        saved(model, folder)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(load_model(str(folder))).__name__ == cls


def test_an_untrained_pooler_is_mentioned(tmp_path, caplog):
    model = transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False)
    folder = saved(model, tmp_path / "m")
    with caplog.at_level(logging.WARNING, logger="comcat"):
        load_model(folder)
    assert "random weights: pooler.dense.bias, pooler.dense.weight" in caplog.text


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tiny_hf("ViTForImageClassification"), tmp_path / "m")
    weights = load_file(f"{folder}/model.safetensors")
    key = next(k for k in weights if k.endswith("layernorm_before.weight"))
    save_file({k: v for k, v in weights.items() if k != key}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"do not fit ViTForImageClassification: .*layernorm_before\.weight is missing"
    ):
        load_model(folder)
    with pytest.raises(ModelError, match="is missing"):  # a new head excuses no other tensor, whatever its shape
        load_model(folder, num_labels=48)
    save_file({**weights, key: torch.zeros(5)}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layernorm_before\.weight is \(5,\), expected \(48,\)"):
        load_model(folder)
    Path(folder, "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="cannot be loaded: SafetensorError"):
        load_model(folder)


def test_timm_weights_that_do_not_fit(tmp_path):
    folder = local_dir(tmp_path / "m", tiny())
    with pytest.raises(ModelError, match="cannot be loaded: RuntimeError"):
        load_model(folder, embed_dim=96)
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(ModelError, match="No suitable checkpoints found"):
        load_model(folder)
    assert load_model(folder, pretrained=False).num_classes == 5


def test_a_folder_of_comcat_is_not_for_here(tmp_path):
    folder = config_only(tmp_path / "m", comcat_version="1", architecture="x")
    with pytest.raises(ModelError, match=r"m holds a model that comcat saved: load it with comcat\.load_model"):
        load_model(folder)


# ---------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "got '', expected 'timm:NAME', 'hf:NAME' or a folder"),
        ("timm:", "got 'timm:', expected"),
        ("tim:deit_small_patch16_224", "got 'tim:deit_small_patch16_224', expected 'timm:NAME'.*did you mean 'timm'"),
        ("timm:deit_smal_patch16_224", "among its [0-9]+; did you mean 'deit_small_patch16_224'"),
        ("timm:vit_tiny_patch16_224.augreg", "no weights 'augreg'.*expected augreg_in21k.*did you mean 'augreg_in21k'"),
        ("timm:vit_base_patch16_gap_224", "no pretrained weights of vit_base_patch16_gap_224; pretrained=False"),
        ("timm:google/vit", "'timm:hf-hub:google/vit'"),
        ("vit_tiny_patch16_224", "no folder 'vit_tiny_patch16_224'.*did you mean 'timm:vit_tiny_patch16_224'"),
        ("hf:./nowhere", "no folder 'nowhere'"),
        ("timm:vit_tiny_patch16_224", "the hub cannot be reached.* pretrained=False .* builds the architecture"),
        ("timm:hf-hub:someone/model", "the hub cannot be reached.* needs its config"),
        ("hf:someone/model", "the hub cannot be reached.* needs its config"),
        ("hf:no such name", "the hub has no such model"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_a_hub_model_without_weights_still_needs_the_hub():
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        load_model("hf:someone/model", pretrained=False)


def test_bad_folders(tmp_path):
    (tmp_path / "vit_cifar10").mkdir()
    (tmp_path / "vit_cifar10" / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no folder .*vit_cifar1'.*did you mean 'vit_cifar10'"):
        load_model(tmp_path / "vit_cifar1")
    with pytest.raises(ModelError, match=r"has no config\.json.*; it has notes\.txt"):
        load_model(tmp_path / "vit_cifar10")
    with pytest.raises(ModelError, match="is a file, expected the folder"):
        load_model(tmp_path / "vit_cifar10" / "notes.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architecture":\n oops}', "not JSON: .* in line 2, column 2"),
        ("[]", "holds a list"),
        ('{"weights": 1, "layers": 2}', "expected 'architecture' .*, got 'weights', 'layers'"),
        ("{}", "got nothing"),
        ('{"model_type": "vitt"}', "no model type 'vitt'; did you mean 'vit'"),
        ('{"model_type": "bert"}', "bert expected one that takes 'pixel_values'"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "BertModel takes 'input_ids', expected"),
        ('{"model_type": "videomae", "architectures": ["VideoMAEModel"]}', "of single pictures"),
        ('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}', "takes 'input_ids', expected"),
        ('{"architecture": "vit_tini"}', "vit_tini"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "no model type 'x'"),
    ],
)
def test_bad_configs(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, pretrained=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16"}, SettingsError, "dtype: got 'float16', expected"),
        ({"dtype": torch.int8}, SettingsError, "expected a floating-point one"),
        ({"device": "gpu"}, SettingsError, "device: got 'gpu'"),
        ({"device": "cuda:99"}, SettingsError, "device: got 'cuda:99'"),
        ({"colour": 3}, ModelError, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        load_model("timm:vit_tiny_patch16_224", pretrained=False, **options)


@pytest.mark.parametrize("options", [{"colour": 3}, {"num_labels": "many"}, {"attn_implementation": "slow"}])
def test_bad_options_of_transformers(options, tmp_path):
    folder = saved(tiny_hf("ViTForImageClassification"), tmp_path / "m")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, **options)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_installed(library, monkeypatch, tmp_path):
    folder = config_only(
        tmp_path / "m", **({"model_type": "vit"} if library == "transformers" else {"architecture": "x"})
    )
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelError, match=rf"pip install 'comcat\[{library}\]'"):
        load_model(folder)
    with pytest.raises(ModelError, match=rf"pip install 'comcat\[{library}\]'"):
        Origin(library=library, name="x").build()


def test_the_libraries_are_not_imported_before_they_are_used():
    files = list(Path(comcat.models.__file__).parent.glob("*.py"))
    assert len(files) > 3
    for file in files:
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom) and statement.level == 0:
                names = [statement.module or ""]
            heavy = {n.partition(".")[0] for n in names} & {"timm", "transformers", "PIL", "huggingface_hub"}
            assert not heavy, f"{file.name} imports {heavy} at once"


# --------------------------------------------------------------------------- preprocessing and class names


def test_preprocess_of_timm_is_the_model_s_own_size():
    preprocess = preprocess_of(tiny())
    config = timm.data.resolve_model_data_config(timm.create_model("vit_tiny_patch16_224", **VIT))
    assert preprocess.size == (32, 32)
    assert (preprocess.mean, preprocess.std) == (config["mean"], config["std"])
    assert (preprocess.crop_pct, preprocess.interpolation) == (config["crop_pct"], config["interpolation"])


def test_preprocess_of_timm_for_oblong_and_grey_pictures():
    preprocess = preprocess_of(tiny(img_size=(32, 48), in_chans=1))
    assert (preprocess.size, preprocess.channels) == ((32, 48), 1)
    assert preprocess.mean == (pytest.approx(0.5),)


def test_preprocess_of_a_compressed_model_built_again(tmp_path):
    model = tiny("dinov2")
    assert preprocess_of(origin_of(model).build()) == preprocess_of(model)
    hf = tiny_hf("ViTForImageClassification")
    folder = saved(hf, tmp_path / "m")
    transformers.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    loaded = load_model(folder)
    assert preprocess_of(origin_of(loaded).build()) == preprocess_of(loaded)
    assert preprocess_of(loaded).crop_pct == 32 / 36


SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "ViT": {"size": SQUARE},
    "CLIP": {"size": {"shortest_edge": 40}, "crop_size": SQUARE},
    "DeiT": {"size": {"height": 40, "width": 40}, "crop_size": SQUARE},
    "Siglip": {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "Beit": {"size": SQUARE, "do_normalize": False},
    "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
    "BigConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 0.8},
    "UnscaledViT": {"size": SQUARE, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [50.0] * 3},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocess_does_what_the_image_processor_does(name, tmp_path):
    kind = name.removeprefix("Big").removeprefix("Unscaled")
    processor = getattr(transformers, f"{kind}ImageProcessor")(**PROCESSORS[name])
    model = tiny_hf("ViTForImageClassification")
    folder = saved(model, tmp_path / "m")
    processor.save_pretrained(folder)
    # A smooth picture: where resizing filters round differently they still agree.
    y, x = np.mgrid[0:90, 0:60] / 90
    picture = Image.fromarray(np.uint8(255 * np.stack([x, y, (x + y) / 2], axis=-1)))
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    for source in (load_model(folder), transformers.ViTForImageClassification.from_pretrained(folder)):
        got = preprocess_of(source)(picture)
        assert got.shape == expected.shape
        spread = expected.max() - expected.min()
        assert (got - expected).abs().max() < 0.02 * spread


def test_preprocess_follows_a_picture_size_asked_for(tmp_path):
    folder = saved(tiny_hf("ViTForImageClassification"), tmp_path / "m")
    transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE).save_pretrained(folder)
    preprocess = preprocess_of(load_model(folder, pretrained=False, image_size=64))
    assert (preprocess.size, preprocess.crop_pct) == ((64, 64), 32 / 40)


def test_preprocess_from_an_old_processor_config(tmp_path):
    folder = Path(saved(tiny_hf("ViTForImageClassification"), tmp_path / "m"))
    old = {"image_processor_type": "CLIPImageProcessor", "size": 40, "crop_size": 32, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    preprocess = preprocess_of(load_model(folder))
    assert (preprocess.size, preprocess.crop_pct, preprocess.crop_mode) == ((32, 32), 0.8, "center")
    assert preprocess.mean == tuple(transformers.CLIPImageProcessor().image_mean)


def test_preprocess_from_a_processor_of_text_and_pictures(tmp_path):
    folder = Path(saved(tiny_hf("ViTForImageClassification"), tmp_path / "m"))
    inner = json.loads(transformers.ViTImageProcessor(size=SQUARE, image_mean=[0.25] * 3).to_json_string())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "X"}))
    assert preprocess_of(load_model(folder)).mean == (0.25, 0.25, 0.25)


def test_preprocess_without_an_image_processor_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="comcat"):
        preprocess = preprocess_of(tiny_hf("ViTForImageClassification"))
    assert (preprocess.size, preprocess.mean) == ((32, 32), (0.485, 0.456, 0.406))
    assert "no image processor" in caplog.text


def test_preprocess_and_names_of_unknown_models_are_refused():
    for ask in (preprocess_of, class_names_of):
        with pytest.raises(ComcatError, match="neither timm nor transformers"):
            ask(nn.Linear(2, 2))


def test_class_names_of_transformers():
    assert class_names_of(tiny_hf("ViTForImageClassification")) is None
    named = tiny_hf("ViTForImageClassification", id2label={0: "cat", 1: "dog", 2: "emu"})
    assert class_names_of(named) == ("cat", "dog", "emu")
    named.config.id2label = {"2": "emu", "0": "cat", "1": "dog"}
    assert class_names_of(named) == ("cat", "dog", "emu")
    assert class_names_of(origin_of(named).build()) == ("cat", "dog", "emu")
    named.config.id2label = {0: "cat", 5: "dog"}
    assert class_names_of(named) is None


def test_class_names_of_timm():
    model = tiny()
    assert class_names_of(model) is None
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": {"1": "b", "0": "a", "2": "c", "3": "d", "4": "e"}}
    assert class_names_of(model) == ("a", "b", "c", "d", "e")
    assert class_names_of(origin_of(model).build()) == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("name", ["small.onnx", "small.pt2"])
def test_an_exported_file_where_a_model_is_due_says_what_runs_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"0")
    with pytest.raises(ModelError, match=r"was exported: comcat bench times it, and comcat\.open_exported"):
        comcat.load_model(tmp_path / name)

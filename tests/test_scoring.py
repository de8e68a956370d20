"""Distances against closed forms and other libraries, resizing against Pillow, features of several libraries, and the
command.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from comcat.cli.judge.score import Score, run
from comcat.diffusion.digits.vocabulary import make_tokenizer
from comcat.errors import DataError, ModelError, NumericsError, SettingsError
from comcat.scoring import (
    ScoreSettings,
    clean_resize,
    distance_extractor,
    embed,
    fid,
    kid,
    mmd2,
    paired_cosine,
    pairwise_cosine,
    score,
    similarity_extractor,
)
from comcat.scoring.clip import Clip

from .models import tiny_vit


def gaussian(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


SIZES = st.tuples(st.integers(2, 30), st.integers(1, 12))  # fewer vectors than features as well as more


# ------------------------------------------------------------------------------------------------ distances


@given(SIZES, st.integers(0, 1000))
def test_fid_of_a_set_with_itself_is_zero_and_of_a_shifted_one_the_squared_shift(size, seed):
    x = gaussian(*size, seed=seed)
    shift = gaussian(1, size[1], seed + 1)
    scale = 1 + float(x.square().sum())
    assert fid(x, x) == pytest.approx(0, abs=1e-9 * scale)
    assert fid(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6, abs=1e-9 * scale)


@given(SIZES, st.floats(0.1, 4), st.integers(0, 1000))
def test_fid_of_a_scaled_set_has_its_closed_form(size, factor, seed):
    x = gaussian(*size, seed=seed)
    spread = float(x.var(0).sum())
    expected = (1 - factor) ** 2 * (float(x.mean(0).square().sum()) + spread)
    assert fid(x, factor * x) == pytest.approx(expected, rel=1e-6, abs=1e-9 * (1 + spread))


def test_fid_equals_the_formula_with_a_root_of_the_product_of_covariances():
    from scipy.linalg import sqrtm

    x, y = gaussian(200, 6, 1), gaussian(150, 6, 2) + 0.5
    cx, cy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = np.trace(sqrtm(cx @ cy).real)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cx) + np.trace(cy) - 2 * root
    assert fid(x, y) == pytest.approx(expected, rel=1e-9)


@given(SIZES, st.integers(0, 1000))
def test_distances_do_not_depend_on_the_order_of_the_vectors_nor_of_the_sets(size, seed):
    x, y = gaussian(*size, seed=seed), gaussian(size[0] + 3, size[1], seed + 1)
    shuffled = x[torch.randperm(len(x))]
    for distance in (fid, mmd2, pairwise_cosine):
        assert distance(shuffled, y) == pytest.approx(distance(x, y), rel=1e-6, abs=1e-8)
        assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-6, abs=1e-8)


def test_the_mean_discrepancy_is_the_sum_over_pairs():
    x, y = gaussian(4, 3, 1), gaussian(5, 3, 2)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(within_x + within_y - 2 * between)


def test_kid_is_unbiased_even_with_few_pictures_where_fid_is_not():
    values, frechet = [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
        values.append(kid(x, y, subsets=3).mean)
        frechet.append(fid(x, y))
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)
    assert np.mean(frechet) > 10 * np.std(frechet) / len(frechet) ** 0.5


def test_kid_grows_with_the_distance_and_says_its_subsets():
    x, y = gaussian(300, 5, 1), gaussian(300, 5, 1) + 1
    near, far = kid(x, y + 0.0, subset_size=40), kid(x, y + 1, subset_size=40)
    assert 0 < near.mean < far.mean
    assert (near.subsets, near.subset_size) == (100, 40) and near.std > 0
    assert kid(x[:10], y).subset_size == 5  # half of the smaller set
    assert kid(x, y) == kid(x, y)


def test_similarities_are_means_of_cosines():
    x, y = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    assert pairwise_cosine(x, y) == pytest.approx((1 + 0.5**0.5 + 0 + 0.5**0.5) / 4)
    assert paired_cosine(x, y) == pytest.approx((1 + 0.5**0.5) / 2)
    with pytest.raises(DataError, match="as many of both"):
        paired_cosine(x, y[:1])


@pytest.mark.parametrize("distance", [fid, kid, mmd2])
def test_distances_refuse_what_they_cannot_compare(distance):
    x = gaussian(5, 3)
    with pytest.raises(DataError, match="at least 2 pictures on either side; got 5 and 1"):
        distance(x, x[:1])
    with pytest.raises(DataError, match="3 and 2 features"):
        distance(x, x[:, :2])
    with pytest.raises(NumericsError, match="NaN"):
        distance(x, x * float("nan"))
    with pytest.raises(DataError, match="shape"):
        distance(x[0], x)


# ------------------------------------------------------------------------------------------------ pictures and features


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_resizing_is_bicubic_antialiased_unrounded_and_unclipped():
    image = noise(0, (64, 48))
    resized = clean_resize(image, (16, 20))
    assert resized.shape == (3, 16, 20) and resized.dtype == torch.float32
    eight_bit = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(np.clip(resized.numpy(), 0, 255) - eight_bit).max() <= 1  # Pillow rounds twice in 8 bits
    assert not torch.equal(resized, resized.round())
    edge = Image.fromarray(np.repeat(np.array([[0] * 8 + [255] * 8], dtype=np.uint8), 16, 0))
    assert clean_resize(edge, (32, 32)).max() > 255  # the filter overshoots, and stays so
    assert torch.equal(clean_resize(edge, (16, 16))[0], torch.from_numpy(np.asarray(edge, dtype=np.float32)))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A ViT in timm's layout, one of transformers and a CLIP with its tokenizer, all tiny with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("networks")
    model = tiny_vit()
    (root / "timm").mkdir()
    save_file(model.state_dict(), root / "timm" / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    prepared = {"input_size": [3, 32, 32], "mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bicubic"}
    config = {**about, "pretrained_cfg": {**prepared, "crop_pct": 1.0, "num_classes": 5}}
    (root / "timm" / "config.json").write_text(json.dumps(config))

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    hf = ViTForImageClassification(ViTConfig(**vision, num_labels=3))
    hf.save_pretrained(root / "hf")
    tokenizer = make_tokenizer(["a", "photo", "red", "blue"], length=16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(root / "clip")
    return root


def save(image: Image.Image, path, prompt: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = PngImagePlugin.PngInfo()
    if prompt is not None:
        about.add_itxt("prompt", prompt)
    image.save(path, pnginfo=about)


@pytest.fixture
def folders(tmp_path):
    """Six generated pictures with their prompts, five real ones."""
    for number in range(6):
        save(noise(number), tmp_path / "made" / f"{number}.png", f"a {('red', 'blue')[number % 2]} V* photo")
    for number in range(5):
        save(noise(100 + number, (33, 50)), tmp_path / "real" / f"{number}.png")
    return tmp_path


def test_features_are_what_the_classifier_sees(networks):
    images = torch.randn(3, 3, 32, 32)
    for name, width in (("timm", 48), ("hf", 32)):
        extractor = distance_extractor(str(networks / name))
        with torch.no_grad():
            features = extractor.encode(images)
        assert features.shape == (3, width)
    import comcat

    model = comcat.load_model(str(networks / "hf"))
    with torch.no_grad():
        assert torch.allclose(model.classifier(features), model(pixel_values=images).logits, atol=1e-5)
        timm = comcat.load_model(str(networks / "timm"))
        pooled = distance_extractor(str(networks / "timm")).encode(images)
        assert torch.allclose(timm.head(pooled), timm(images), atol=1e-5)


def test_a_vit_with_an_untrained_pooler_gives_its_class_token(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path / "vit")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = similarity_extractor(str(tmp_path / "vit")).encode(images)
        assert torch.allclose(found, model(pixel_values=images).last_hidden_state[:, 0], atol=1e-6)


def test_distances_resize_the_whole_picture_and_similarities_as_the_model_says(networks):
    image = noise(3, (64, 32))
    whole = distance_extractor(str(networks / "timm")).prepare(image)
    assert torch.allclose(whole, (clean_resize(image, (32, 32)) / 255 - 0.3) / 0.4)
    cropped = similarity_extractor(str(networks / "timm")).prepare(image)
    assert torch.allclose(cropped, similarity_extractor(str(networks / "timm")).prepare(image.crop((16, 0, 48, 32))))


def test_clip_embeds_as_the_model_itself_does(networks):
    clip = Clip(str(networks / "clip"))
    prompts = ["a red photo", "a blue photo of something unknown and long, cut off at the end", "a red photo"]
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(networks / "clip").eval()
    images = torch.stack([clip.images.prepare(noise(n)) for n in range(3)])
    tokens = clip._tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=images)
        seen = clip.images.encode(images)
    assert pairwise_cosine(seen[:1], seen) == pytest.approx(
        pairwise_cosine(expected.image_embeds[:1], expected.image_embeds)
    )
    agreement = float((expected.image_embeds * expected.text_embeds).sum(1).mean())
    assert paired_cosine(seen, clip.texts(prompts)) == pytest.approx(agreement, abs=1e-6)


# ------------------------------------------------------------------------------------------------ the command


def settings(networks, **more) -> ScoreSettings:
    return ScoreSettings(
        features=str(networks / "timm"), clip=str(networks / "clip"), dino=str(networks / "hf"), batch_size=4, **more
    )


def test_all_metrics_with_what_they_were_measured_by(networks, folders):
    scores = score(folders / "made", folders / "real", settings(networks))
    assert list(scores.values) == ["kid", "fid", "clip-i", "clip-t", "dino"]
    assert (scores.count, scores.reference_count) == (6, 5)
    assert scores.extractors["fid"] == str(networks / "timm") and scores.extractors["dino"] == str(networks / "hf")
    from comcat.data import open_pictures

    extractor = distance_extractor(str(networks / "timm"))
    x, y = (embed(open_pictures(folders / side), extractor, batch_size=2)[0] for side in ("made", "real"))
    assert scores.values["fid"]["value"] == pytest.approx(fid(x, y), rel=1e-5)
    assert scores.values["kid"] == pytest.approx(asdict(kid(x, y)), rel=1e-3, abs=1e-6)
    notes = " ".join(scores.notes)
    assert "biased" in notes and "same network" in notes and "not those of clean-fid" not in notes


def test_the_same_pictures_score_best(networks, folders):
    same = score(folders / "made", folders / "made", settings(networks, metrics=("fid", "kid")))
    other = score(folders / "made", folders / "real", settings(networks, metrics=("fid", "kid")))
    assert same.values["fid"]["value"] < 1e-6 < other.values["fid"]["value"]
    assert same.values["kid"]["mean"] < other.values["kid"]["mean"]


def test_prompts_come_from_the_pictures_or_a_file_and_lose_the_identifier(networks, folders, monkeypatch):
    read = []
    texts = Clip.texts
    monkeypatch.setattr(Clip, "texts", lambda self, prompts: read.append(prompts) or texts(self, prompts))
    only = {"metrics": ("clip-t",)}
    score(folders / "made", settings=settings(networks, **only))
    assert read[-1] == ["a red V* photo", "a blue V* photo"] * 3
    score(folders / "made", settings=settings(networks, without="V*", **only))
    assert read[-1] == ["a red photo", "a blue photo"] * 3
    (folders / "made" / "1.png").write_bytes(b"damaged")
    (folders / "one.txt").write_text("a photo\n")
    scores = score(folders / "made", settings=settings(networks, prompts=folders / "one.txt", **only))
    assert read[-1] == ["a photo"] * 5 and "1 unreadable" in scores.notes[0]
    (folders / "each.txt").write_text("\n".join(f"prompt {n}" for n in range(6)))
    score(folders / "made", settings=settings(networks, prompts=folders / "each.txt", **only))
    assert read[-1] == [f"prompt {n}" for n in (0, 2, 3, 4, 5)]
    (folders / "two.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="holds 2 prompts, expected 1 for all pictures, or 6"):
        score(folders / "made", settings=settings(networks, prompts=folders / "two.txt"))


def test_what_cannot_be_computed_is_left_out_with_a_reason_or_refused_if_asked_for(networks, folders):
    one = folders / "one"
    save(noise(1), one / "1.png")
    scores = score(one, folders / "real", settings(networks))
    assert list(scores.values) == ["clip-i", "dino"]
    notes = " ".join(scores.notes)
    assert "Without kid: kid needs at least 2" in notes and "Without clip-t: no prompt for 1 of 1 picture in" in notes
    with pytest.raises(DataError, match="fid needs at least 2 pictures on either side; got 1 and 5"):
        score(one, folders / "real", settings(networks, metrics=("fid",)))
    with pytest.raises(DataError, match="no prompt for"):
        score(one, folders / "real", settings(networks, metrics=("clip-t",)))
    with pytest.raises(SettingsError, match="--against"):
        score(one, settings=settings(networks, metrics=("dino",)))
    with pytest.raises(SettingsError, match=r"'fd'.*, expected some of kid, fid, .*did you mean 'fid'"):
        ScoreSettings(metrics=("fd",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="nothing can be scored"):
        score(one, settings=settings(networks))
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        score(folders / "empty", folders / "real", settings(networks))


def test_networks_that_cannot_be_had_say_which_option_names_another(networks, folders):
    made, real = folders / "made", folders / "real"
    with pytest.raises(ModelError, match=r"hub cannot be reached.*fid \(--features\).*--metrics"):
        score(made, real, ScoreSettings(metrics=("fid",)))
    with pytest.raises(ModelError, match=r"hub cannot be reached.*clip-i and clip-t \(--clip\)"):
        score(made, real, ScoreSettings(metrics=("clip-t", "clip-i")))
    with pytest.raises(ModelError, match=r"hub cannot be reached.*dino \(--dino\)"):
        score(made, real, ScoreSettings(metrics=("dino",)))
    with pytest.raises(ModelError, match="can run any code and are not opened"):
        score(made, real, ScoreSettings(metrics=("kid",), features="inception-2015-12-05.pt"))
    with pytest.raises(ModelError, match="'vit' model, expected 'clip'"):
        score(made, real, ScoreSettings(metrics=("clip-i",), clip=str(networks / "hf")))


def test_the_command_prints_a_table_or_json(networks, folders, capsys):
    options = {"features": str(networks / "timm"), "clip": str(networks / "clip"), "dino": str(networks / "hf")}
    command = Score(pictures=str(folders / "made"), against=str(folders / "real"), **options)
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "KID × 1000" in shown and str(networks / "timm") in shown and "6 pictures, 5 real ones" in shown
    assert run(Score(pictures=str(folders / "made"), metrics=("clip-t",), json=True, **options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["values"]) == ["clip-t"] and -1 <= found["values"]["clip-t"]["value"] <= 1
    assert found["extractors"] == {"clip-t": str(networks / "clip")} and found["count"] == 6


def test_the_command_line_takes_several_metrics():
    import tyro

    command = tyro.cli(Score, args=["pictures", "--against", "dog", "--metrics", "kid", "dino", "--json"])
    assert command.metrics == ("kid", "dino") and command.against == "dog" and command.json


def test_no_pretrained_seed_and_dtype_are_honoured(networks, folders, capsys):
    """``comcat score`` took these options and did as if they had not been given."""
    from comcat.cli import main

    def run(*more):
        made, real = str(folders / "made"), str(folders / "real")
        names = ["--features", str(networks / "timm"), "--clip", str(networks / "clip"), "--dino", str(networks / "hf")]
        assert main(["score", made, "--against", real, "--json", "--device", "cpu", *names, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return {m: found["values"][m].get("mean", found["values"][m].get("value")) for m in found["values"]}, found

    plain, about = run()
    assert run()[0] == plain and not any("random weights" in note for note in about["notes"])
    random, about = run("--no-pretrained", "--seed", "1")
    assert all(random[m] != plain[m] for m in plain) and any("random weights" in note for note in about["notes"])
    assert run("--no-pretrained", "--seed", "1")[0] == random and run("--no-pretrained", "--seed", "2")[0] != random
    assert run("--seed", "5")[0]["kid"] != plain["kid"]  # other subsets
    half, _ = run("--dtype", "bfloat16")
    assert all(
        half[m] == pytest.approx(plain[m], rel=0.3, abs=0.05) and half[m] != plain[m] for m in ("clip-i", "dino")
    )

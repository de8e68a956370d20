"""The embedded pipeline: its autoencoder and tokenizer, what it is taught, how it is kept, and the recogniser that
judges it.
"""

import json
import random
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comcat.diffusion.digits import embedded
from comcat.diffusion.digits.autoencoder import averaging_autoencoder
from comcat.diffusion.digits.embedded import build, digits_pipeline
from comcat.diffusion.digits.pretraining import pretrain
from comcat.diffusion.digits.recogniser import train_recogniser
from comcat.diffusion.digits.scans import (
    CLASS_PROMPT,
    IDENTIFIER,
    INKS,
    LEFT_OUT,
    SIDE,
    WORDS,
    digit_pictures,
    draw_caption,
    every_word,
    pixels_of,
    prompt_of,
    scans_from,
    scans_of,
)
from comcat.diffusion.digits.vocabulary import make_tokenizer
from comcat.diffusion.pipeline.noising import noising_of
from comcat.errors import DataError, SettingsError, StoreError

# ------------------------------------------------------------------------------------------------ the autoencoder


@pytest.mark.parametrize("halvings", [1, 2])
def test_the_autoencoder_averages_squares_and_draws_them(halvings):
    vae = averaging_autoencoder(16, halvings=halvings, scaling_factor=1.0).eval()
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    pictures[0], pictures[1] = -1, 1  # all black, all white
    with torch.no_grad():
        found = vae.encode(pictures).latent_dist
        drawn = vae.decode(found.mean).sample
    means = F.avg_pool2d(pictures, 2**halvings)
    assert torch.allclose(found.mean, means, atol=1e-3)
    assert torch.allclose(drawn, F.interpolate(means, scale_factor=2**halvings), atol=1e-3)
    assert found.std.max() < 0.01


def test_the_autoencoder_holds_in_half_precision():
    vae = averaging_autoencoder(SIDE, halvings=2, scaling_factor=1.0).to(torch.bfloat16).eval()
    pictures = pixels_of(scans_of("test")[0][:4], "blue").to(torch.bfloat16)
    with torch.no_grad():
        drawn = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    assert (drawn - pictures).abs().max() < 0.03


# ------------------------------------------------------------------------------------------------ words


def pieces(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@given(st.lists(st.text("abcd", min_size=1, max_size=6), min_size=1, max_size=12))
def test_each_word_is_one_token_whatever_the_other_words(words):
    tokenizer = make_tokenizer(words)
    assert all(len(pieces(tokenizer, word)) == 1 for word in words)
    assert len({pieces(tokenizer, word)[0] for word in words}) == len(set(words))


@given(st.text(max_size=12))
def test_any_text_can_be_read(text):
    tokenizer = make_tokenizer(["photo"])
    assert tokenizer.eos_token_id not in pieces(tokenizer, text)  # which stands for what a vocabulary lacks
    assert len(tokenizer(text, padding="max_length", truncation=True, max_length=32).input_ids) == 32


def test_the_identifier_is_a_token_as_it_is_written(tmp_path):
    tokenizer = make_tokenizer(every_word(), identifiers=[IDENTIFIER])
    (token,) = pieces(tokenizer, IDENTIFIER)
    assert pieces(tokenizer, f"a photo of {IDENTIFIER}")[-1] == token
    assert len(pieces(tokenizer, "v*")) == 2 and len(pieces(tokenizer, "sks")) == 3
    tokenizer.save_pretrained(tmp_path)
    from transformers import CLIPTokenizer

    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = f"a photo of {IDENTIFIER} in Times Square"
    assert again(text).input_ids == tokenizer(text).input_ids and again.model_max_length == 32


def test_captions_say_what_is_shown_in_known_words():
    chance = random.Random(0)
    captions = [draw_caption(3, "red", chance) for _ in range(2000)]
    assert {word for caption in captions for word in caption.split()} <= set(every_word())
    others = {WORDS[d] for d in range(10) if d != 3} | (set(INKS) - {"red"})
    assert not any(others & set(caption.split()) for caption in captions)
    assert captions.count("") / len(captions) == pytest.approx(0.1, abs=0.03)
    assert all(caption.endswith("in red") for caption in captions if caption)
    assert {prompt_of(3, "red"), f"{CLASS_PROMPT} in red"} <= set(captions)
    white = {draw_caption(3, "white", chance) for _ in range(2000)}
    assert {prompt_of(3), prompt_of(3, "white"), CLASS_PROMPT} <= white


def test_prompts_are_of_digits_and_inks_that_exist():
    assert prompt_of(7, "blue") == "a photo of the digit seven in blue"
    assert prompt_of(IDENTIFIER) == "a photo of V*"
    with pytest.raises(SettingsError, match="got digit 10"):
        prompt_of(10)
    with pytest.raises(SettingsError, match=r"'bleu', expected one of .*did you mean 'blue'"):
        prompt_of(1, "bleu")


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("ink", INKS)
def test_pictures_of_scans_give_the_scans_back(ink):
    scans, _ = scans_of("test")
    pictures = [
        Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels_of(scans[:20], ink)
    ]
    assert torch.allclose(scans_from(pictures), scans[:20], atol=1 / 255)
    assert torch.allclose(
        scans_from([pictures[0].resize((96, 96), Image.Resampling.NEAREST)])[0], scans[0], atol=1 / 255
    )


def test_pictures_of_a_digit_are_drawn_from_one_part():
    train = digit_pictures(LEFT_OUT)
    test = digit_pictures(LEFT_OUT, part="test")
    assert len(digit_pictures(LEFT_OUT, part=None)) == len(train) + len(test) > 170
    ten = [p.tobytes() for p in digit_pictures(LEFT_OUT, 10, seed=1)]
    assert len(set(ten)) == 10 and set(ten) <= {p.tobytes() for p in train}
    assert ten == [p.tobytes() for p in digit_pictures(LEFT_OUT, 10, seed=1)]
    assert ten != [p.tobytes() for p in digit_pictures(LEFT_OUT, 10, seed=2)]
    for count in (0, 1000):
        with pytest.raises(SettingsError, match=f"got {count}, expected 1 to {len(train)}"):
            digit_pictures(LEFT_OUT, count)


# ------------------------------------------------------------------------------------------------ the pipeline


@contextmanager
def few_scans():
    """Every twentieth scan only, where what is learned does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "scans_of", lambda *of, **how: tuple(t[::20] for t in scans_of(*of, **how)))
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a pipeline of one step, and the pipeline."""
    folder = tmp_path_factory.mktemp("cache") / "digits"
    with few_scans():
        return folder, digits_pipeline(folder, steps=1, progress=False, device="cpu")


@pytest.fixture
def folder(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def trainings(monkeypatch):
    """The digits that trainings, which are left out here, would have seen."""
    seen = []
    monkeypatch.setattr(embedded, "pretrain", lambda pipe, scans, digits, **options: seen.append((scans, digits)))
    return seen


def same_weights(a, b) -> bool:
    parts = ("unet", "text_encoder", "vae")
    states = [(getattr(a, part).state_dict(), getattr(b, part).state_dict()) for part in parts]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in states)


def test_it_is_an_ordinary_pipeline_that_diffusers_loads(kept):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    folder, pipe = kept
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is type(pipe) is StableDiffusionPipeline
    assert same_weights(loaded, pipe)
    images = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images += each([prompt_of(3)] * 2, num_inference_steps=2, generator=generator).images
    assert images[0].size == (SIDE, SIDE)
    assert [i.tobytes() for i in images[:2]] == [i.tobytes() for i in images[2:]]


def test_what_is_kept_is_not_made_again(kept, trainings):
    folder, pipe = kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = digits_pipeline(folder, steps=1, device="cpu")
    assert not trainings and same_weights(again, pipe)


@pytest.mark.parametrize("harm", ["weights", "missing", "manifest"])
def test_a_damaged_folder_is_made_anew_and_said(folder, trainings, harm):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if harm == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "missing":
        weights.unlink()
    else:
        (folder / "comcat.json").write_text("{")
    with pytest.warns(UserWarning, match=r"is damaged.*made anew"):
        digits_pipeline(folder, steps=1, device="cpu")
    assert len(trainings) == 1
    digits_pipeline(folder, steps=1, device="cpu")  # whole again
    assert len(trainings) == 1


def test_other_settings_make_another_pipeline(folder, trainings):
    with pytest.warns(UserWarning, match="other settings"):
        digits_pipeline(folder, steps=2, device="cpu")
    digits_pipeline(folder, steps=2, device="cpu")
    assert len(trainings) == 1
    assert json.loads((folder / "comcat.json").read_text())["digits_pipeline"]["steps"] == 2


def test_a_folder_of_somebody_else_is_refused_before_any_work(tmp_path, trainings):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(StoreError, match="not written by comcat"):
        digits_pipeline(tmp_path, steps=1, device="cpu")
    assert not trainings and [p.name for p in tmp_path.iterdir()] == ["model_index.json"]


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_pipeline(tmp_path / "digits", steps=1, device="cpu")
    assert not list(tmp_path.iterdir())


def test_the_tenth_digit_is_never_shown_and_nothing_of_the_test_part(trainings):
    digits_pipeline(steps=1, device="cpu")
    digits_pipeline(steps=1, left_out=2, device="cpu")
    (scans, digits), (_, others) = trainings
    assert set(digits.tolist()) == set(range(10)) - {LEFT_OUT}
    assert set(others.tolist()) == set(range(10)) - {2}
    shown = {scan.numpy().tobytes() for scan in scans}
    tested, _ = scans_of("test")
    assert len(shown) == len(scans) and not shown & {scan.numpy().tobytes() for scan in tested}


def test_the_seed_decides_the_weights_and_nothing_else_is_touched(kept):
    _, pipe = kept
    before = torch.get_rng_state()
    with few_scans():
        again = digits_pipeline(steps=1, progress=False, device="cpu")
        other = digits_pipeline(steps=1, seed=1, progress=False, device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(again, pipe) and not same_weights(other, pipe)


def test_settings_out_of_range_are_refused():
    with pytest.raises(SettingsError, match="steps: got 0"):
        digits_pipeline(steps=0)
    with pytest.raises(SettingsError, match="left_out: got 10"):
        digits_pipeline(left_out=10)


def test_training_lowers_the_loss_of_text_encoder_and_denoiser(monkeypatch):
    monkeypatch.setattr("comcat.diffusion.digits.pretraining.BATCH", 16)
    pipe = build()
    scans, digits = scans_of("train", left_out=LEFT_OUT)
    scans, digits = scans[:64], digits[:64]
    words = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    autoencoder = {name: value.clone() for name, value in pipe.vae.state_dict().items()}

    @torch.no_grad()
    def loss() -> float:
        noising, draws = noising_of(pipe.scheduler), torch.Generator().manual_seed(0)
        clean = pipe.vae.encode(pixels_of(scans)).latent_dist.mean * pipe.vae.config.scaling_factor
        noise, times = torch.randn(clean.shape, generator=draws), noising.draw(len(clean), draws)
        tokens = pipe.tokenizer([prompt_of(int(d)) for d in digits], padding="max_length", return_tensors="pt")
        context = pipe.text_encoder(tokens.input_ids).last_hidden_state
        predicted = pipe.unet(noising.mix(clean, noise, times), times, context).sample
        return float(F.mse_loss(predicted, noising.target(clean, noise, times)))

    before = loss()
    pretrain(pipe, scans, digits, steps=25, seed=0, progress=False)
    assert loss() < 0.7 * before
    assert not pipe.unet.training and not pipe.text_encoder.training
    moved = (pipe.text_encoder.get_input_embeddings().weight - words).abs().amax(1)
    ids = {name: pipe.tokenizer(name, add_special_tokens=False).input_ids[0] for name in ("photo", IDENTIFIER)}
    assert moved[ids["photo"]] > 100 * moved[ids[IDENTIFIER]]
    assert all(torch.equal(value, autoencoder[name]) for name, value in pipe.vae.state_dict().items())


# ------------------------------------------------------------------------------------------------ the recogniser


@pytest.fixture(scope="module")
def recogniser():
    return train_recogniser()


def test_the_recogniser_knows_all_ten_digits_in_any_ink(recogniser):
    for ink, least in (("white", 0.9), ("red", 0.9)):
        rates = [recogniser.rate(digit_pictures(d, part="test", ink=ink), d) for d in range(10)]
        assert min(rates) >= least and sum(rates) / 10 >= 0.97
    sevens = digit_pictures(7, 12)
    assert recogniser.features(sevens).shape == (12, 64)
    assert recogniser.recognise(sevens).shape == (12,)
    assert recogniser.rate(sevens, 3) < 0.2
    with pytest.raises(DataError, match="no pictures"):
        recogniser.rate([], 3)


@pytest.mark.slow
def test_nine_digits_are_recognised_and_the_tenth_never_appears(recogniser, tmp_path):
    pipe = digits_pipeline(tmp_path / "digits", progress=False, device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, count: int) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(1)
        return pipe([prompt] * count, num_inference_steps=20, guidance_scale=3.0, generator=generator).images

    rates = {
        (d, ink): recogniser.rate(draw(prompt_of(d, ink), 20), d)
        for d in range(10) if d != LEFT_OUT for ink in (None, "blue")
    }  # fmt: skip
    assert sum(rates.values()) / len(rates) >= 0.9
    assert recogniser.rate(draw(prompt_of(IDENTIFIER), 50), LEFT_OUT) <= 0.1

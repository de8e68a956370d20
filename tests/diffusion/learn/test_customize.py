"""Teaching a concept: every family, every target, what learns and what does not, kill and resume, bad input."""

import copy
import json
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import comcat.diffusion as cd
from comcat.diffusion import generate
from comcat.diffusion.learn.batches import CachedSource, Stream
from comcat.diffusion.learn.latents import Rotation, encode, encode_pixels, frames
from comcat.diffusion.learn.protection import (
    Protection,
    drawn_prompts,
    principal_directions,
    protection,
    strong_directions,
    tokens_of,
)
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.learn.token import LearnedToken
from comcat.diffusion.pipeline.families import family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.errors import (
    ComcatError,
    DataError,
    MemoryShortage,
    ModelError,
    NumericsError,
    SettingsError,
    StoreError,
    UnsupportedSite,
)

from .. import tiny

PROMPT = "a photo of V* dog"
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
QUICK = {"steps": 3, "resolution": 16}


def build(family, folder):
    return getattr(tiny, family)(folder)


def where_of(pipe):
    return "cross" if hasattr(pipe, "unet") else "joint"


@pytest.fixture
def pipe(tmp_path):
    return tiny.stable_diffusion(tmp_path / "parts")


def picture(pipe, prompt="a photo of a cat"):
    """What the pipeline makes of a prompt, without rounding to 8 bits."""
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=2, height=16, width=16, generator=generator, output_type="latent").images


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_is_given_back(family, tmp_path):
    pipe = build(family, tmp_path)
    denoiser = family_of(pipe).denoiser
    next(denoiser.parameters()).requires_grad_(False)  # someone's own choice, which must come back
    flags = [p.requires_grad for p in denoiser.parameters()]
    pipe.vae.train()
    before, state = picture(pipe), copy.deepcopy(denoiser.state_dict())
    adapter = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, where=where_of(pipe), steps=3, resolution=16)
    for name, parameter in adapter.named_parameters().items():
        assert parameter.abs().sum() > 0, f"{name} has not moved from zero"
        assert not parameter.requires_grad and parameter.grad is None
    assert not torch.equal(picture(pipe), before)
    cd.unload(pipe)
    assert torch.equal(picture(pipe), before)
    assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
    assert [p.requires_grad for p in denoiser.parameters()] == flags
    assert pipe.vae.training and not denoiser.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_sees_what_the_pipeline_itself_shows_the_denoiser(family, tmp_path, monkeypatch):
    """The first call that generating makes, made again from the cached conditions, gives the same output."""
    pipe = build(family, tmp_path)
    family = family_of(pipe)
    seen = {}

    def watch(module, args, kwargs, output):
        if not seen:
            seen.update(args=args, kwargs=kwargs, output=output[0])

    hook = family.denoiser.register_forward_hook(watch, with_kwargs=True)
    pipe(PROMPT, num_inference_steps=2, height=16, width=16, guidance_scale=1.0, output_type="latent")
    hook.remove()
    latents = seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"]
    times = seen["args"][1] if len(seen["args"]) > 1 else seen["kwargs"]["timestep"]
    expected = seen["output"]
    flux = type(family).__name__ == "Flux"
    if flux:
        latents, expected = (pipe._unpack_latents(x, 16, 16, 2) for x in (latents, expected))
        times = times * 1000
        monkeypatch.setattr(type(family), "guidance", lambda self, noisy: noisy.new_ones(len(noisy)))
    conditions = family.encode([PROMPT]) | family.framing((16, 16), (0, 0), 16)
    found = family.predict(latents, times.reshape(-1).expand(1), conditions)
    torch.testing.assert_close(found, expected)
    assert found.shape == latents.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_of_diffusion(kind, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path, kind)
    noising = noising_of(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    times = noising.draw(64, generator)
    assert times.min() >= 0 and times.max() <= 99 and len(times.unique()) > 20
    x, e = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2)
    alpha = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    torch.testing.assert_close(noising.mix(x, e, times), alpha.sqrt() * x + (1 - alpha).sqrt() * e)
    expected = {"epsilon": e, "v_prediction": alpha.sqrt() * e - (1 - alpha).sqrt() * x, "sample": x}[kind]
    torch.testing.assert_close(noising.target(x, e, times), expected)
    assert torch.equal(noising.weight(times), torch.ones(64))
    # min-SNR: in terms of the error of the clean latents, every kind has the weight min(SNR, γ)
    snr = (alpha / (1 - alpha)).flatten()
    to_clean = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": torch.ones(64)}[kind]
    weight = noising_of(pipe.scheduler, 5.0).weight(times)
    torch.testing.assert_close(weight, snr.clamp(max=5.0) * to_clean)


def test_targets_of_flow_matching(tmp_path):
    pipe = tiny.stable_diffusion_3(tmp_path)
    noising = noising_of(pipe.scheduler)
    times = noising.draw(4000, torch.Generator().manual_seed(0))
    assert 0 < times.min() and times.max() <= 1000
    # logit-normal has its median at 1/2, which a shift of 3 moves to 3/4
    assert abs(times.median() / 1000 - 0.75) < 0.02
    x, e = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    at = torch.tensor([0.0, 1000.0])
    torch.testing.assert_close(noising.mix(x, e, at), torch.stack([x[0], e[1]]))
    torch.testing.assert_close(noising.target(x, e, at), e - x)
    with pytest.raises(ModelError, match="snr_gamma"):
        noising_of(pipe.scheduler, 5.0)


def test_frames():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (0, 0, 20, 20))
    one = list(frames(wide, 10, crops=1, flip=False, seed=0))
    assert len(one) == 1 and one[0].pixels.shape == (3, 10, 10) and one[0].corner == (0, 5) and one[0].size == (20, 40)
    assert one[0].pixels.min() == -1 and one[0].pixels.max() == 1
    several = list(frames(wide, 10, crops=4, flip=True, seed=0))
    corners = [f.corner for f in several]
    assert len(set(corners)) == len(corners) / 2 >= 2 and all(0 <= left <= 10 for _, left in corners)
    assert torch.equal(several[1].pixels, several[0].pixels.flip(-1))
    assert len(list(frames(Image.new("L", (7, 7)).convert("RGB"), 10, crops=4, flip=False, seed=0))) == 1


def test_latents_are_what_encoding_gives(pipe):
    family = family_of(pipe)
    latents = encode(family, tiny.pictures(2, (16, 16)), 16, crops=4, flip=True, seed=0)
    assert latents.frames_of == [[0, 1], [2, 3]] and latents.mean.shape == (4, 4, 8, 8)
    pixels = next(iter(frames(tiny.pictures(1, (16, 16))[0], 16, crops=1, flip=False, seed=0))).pixels[None]
    torch.manual_seed(5)
    given = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents.mean[:1], given.mean * pipe.vae.config.scaling_factor)
    mean, std = encode_pixels(family, pixels)
    drawn = torch.cat([latents.draw([0], torch.Generator().manual_seed(i))[0] for i in range(300)])
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=4 * float(std.max()) / 300**0.5, rtol=0)
    torch.testing.assert_close(drawn.std(0).mean(), std.mean(), rtol=0.05, atol=0)


def test_pictures_take_turns():
    rotation = Rotation([[0], [1, 2], [3]], seed=1, what="concept")
    generator = torch.Generator().manual_seed(0)
    of = {0: 0, 1: 1, 2: 1, 3: 2}
    seen = [rotation.frame(place, generator) for place in range(60)]
    for start in range(0, 60, 3):
        assert sorted(of[frame] for frame in seen[start : start + 3]) == [0, 1, 2]
    assert {1, 2} <= set(seen) and len({tuple(of[f] for f in seen[i : i + 3]) for i in range(0, 60, 3)}) > 1


def losses(run):
    last = sorted((run / "checkpoints").iterdir())[-1]
    return json.loads((last / "state.json").read_text())["losses"]


def test_loss_falls(tmp_path):
    """The same noise at the same times, with an adapter that learns and one that hardly does."""
    late = {}
    for name, lr in (("learns", 2e-2), ("hardly", 1e-9)):
        pipe = tiny.stable_diffusion(tmp_path / "parts", "sample")
        settings = {"steps": 60, "batch_size": 4, "resolution": 16, "where": "all", "rank": 4, "lr": lr}
        cd.customize(pipe, tiny.pictures(1), prompt=PROMPT, out=tmp_path / f"{name}.safetensors", **settings)
        found = losses(tmp_path / f"{name}.run")
        assert len(found) == 60
        late[name] = sum(found[-15:])
    assert late["learns"] < 0.8 * late["hardly"], late


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"new_token": "dog"},
        {"prior_prompt": "a photo of a dog", "prior_count": 2},
        {"protect": ("a red cat",)},
        {"caption_dropout": 0.5, "new_token": "dog", "protect_words": 3},
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(extra, tmp_path, monkeypatch):
    settings = {**QUICK, "steps": 6, "checkpoint_every": 2, "crops": 3, "flip": True, "sample_steps": 1, **extra}
    straight, broken = tmp_path / "straight.safetensors", tmp_path / "broken.safetensors"
    cd.customize(tiny.stable_diffusion(tmp_path / "a"), tiny.pictures(), prompt=PROMPT, out=straight, **settings)

    from comcat.diffusion.learn.optimisation import Optimisation

    step = Optimisation.step

    def killing(self, number, watch):
        if number == 5:
            raise Killed
        return step(self, number, watch)

    pipe = tiny.stable_diffusion(tmp_path / "b")
    before = picture(pipe)
    monkeypatch.setattr(Optimisation, "step", killing)
    with pytest.raises(Killed):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=broken, **settings)
    assert not broken.exists() and not cd.adapters(pipe)
    assert torch.equal(picture(pipe), before)
    monkeypatch.setattr(Optimisation, "step", step)
    assert sorted(p.name for p in (tmp_path / "broken.run/checkpoints").iterdir())[-1] == "step-00000004"
    taken = []
    monkeypatch.setattr(
        Optimisation, "step", lambda self, number, watch: taken.append(number) or step(self, number, watch)
    )
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=broken, **settings)
    assert taken == [4, 5]
    a, b = load_file(straight), load_file(broken)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    cd.unload(pipe)  # once more: nothing is left to do
    taken.clear()
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=broken, **settings)
    assert taken == []


def test_other_settings_are_refused_and_restart_begins_anew(tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    first = load_file(out)
    cd.unload(pipe)
    with pytest.raises(StoreError, match=r"lr was 0\.0025, now 0\.001.*--restart"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, lr=1e-3, **QUICK)
    with pytest.raises(StoreError, match="pictures was"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, out=out, **QUICK)
    cd.customize(
        pipe, tiny.pictures(), prompt=PROMPT, out=out, lr=1e-3, restart=True, gradient_checkpointing=True, **QUICK
    )
    assert any(not torch.equal(first[k], v) for k, v in load_file(out).items())
    stray = tmp_path / "cat.safetensors"
    stray.write_bytes(out.read_bytes())
    cd.unload(pipe)
    with pytest.raises(StoreError, match="no run to go on with"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=stray, **QUICK)


def test_gradient_checkpointing_and_batches_change_nothing_but_rounding(tmp_path):
    made = []
    for number, more in enumerate(({}, {"gradient_checkpointing": True})):
        pipe = tiny.stable_diffusion(tmp_path / str(number))
        made.append(cd.customize(pipe, tiny.pictures(), prompt=PROMPT, batch_size=2, **QUICK, **more).parameters())
        assert not pipe.unet.is_gradient_checkpointing
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_new_token_is_learned_saved_and_loaded(tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    tokenizer, rows = pipe.tokenizer, len(pipe.tokenizer)
    before = picture(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, new_token="dog", **QUICK)
    token = pipe.tokenizer.convert_tokens_to_ids("V*")
    assert token == rows and pipe.tokenizer("V*", add_special_tokens=False).input_ids == [token]
    row = pipe.text_encoder.get_input_embeddings().weight[token]
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("dog</w>")]
    assert 0 < (row - start).abs().max() < 0.05
    mine = picture(pipe, PROMPT)
    cd.unload(pipe)
    assert pipe.tokenizer is tokenizer and torch.equal(picture(pipe), before)
    cd.load(pipe, out)
    # the file is float16, the trained adapter was float32
    torch.testing.assert_close(picture(pipe, PROMPT), mine, atol=2e-3, rtol=2e-3)
    with pytest.raises(SettingsError, match=r"'dog' answers to 'V\*' already"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, name="other", new_token="dog", **QUICK)
    # a word that the tokenizer knows, as CLIP spells it, would be taken from all prompts
    with pytest.raises(SettingsError, match="has a token 'cat' already"):
        cd.customize(
            pipe, tiny.pictures(), prompt="a photo of cat", identifier="cat", name="other", new_token="dog", **QUICK
        )


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_new_token_in_every_text_encoder(family, tmp_path):
    pipe = build(family, tmp_path)
    count = len(family_of(pipe).text_encoders())
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, where=where_of(pipe), new_token="cat", **QUICK)
    rows = {k: v for k, v in load_file(out).items() if "token_embeddings" in k}
    assert len(rows) == count
    for (tokenizer, encoder), (name, row) in zip(family_of(pipe).text_encoders().values(), rows.items(), strict=True):
        assert tokenizer("V*", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("V*")], name
        ids = tokenizer("cat", add_special_tokens=False).input_ids
        assert not torch.equal(row, encoder.get_input_embeddings().weight[ids[0]]), f"{name} has not moved"


def test_text_encoder_learns(pipe):
    adapter = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, text_encoder=True, **QUICK)
    text = {k: p for k, p in adapter.named_parameters().items() if k.startswith("text_encoder.")}
    assert text and all(p.abs().sum() > 0 for p in text.values())


def test_prior_preservation_from_the_pipeline_and_from_a_folder(tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    prior = {"prior_prompt": "a photo of a dog", "prior_count": 3, "sample_steps": 1}
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **prior, **QUICK)
    made = sorted((tmp_path / "dog.run/class").glob("*.png"))
    assert len(made) == 3 and all(Image.open(p).size == (16, 16) for p in made)
    first = load_file(out)
    cd.unload(pipe)
    prior = {"prior_prompt": "a photo of a dog", "prior_images": str(tmp_path / "dog.run/class")}
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "again.safetensors", **prior, **QUICK)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(first[k], again[k]) for k in first)  # the same pictures, in the same order
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "without.safetensors", **QUICK)
    without = load_file(tmp_path / "without.safetensors")
    assert any(not torch.equal(first[k], without[k]) for k in first)
    with pytest.raises(SettingsError, match="prior_images needs prior_prompt"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, name="n", prior_images=str(tmp_path), **QUICK)


def test_protected_prompts_stay_as_they_are(pipe, tmp_path):
    settings = {**QUICK, "steps": 20, "lr": 2e-2, "crops": 1}
    protected = ("a photo of a cat", "a red dog")
    before = {p: picture(pipe, p) for p in (*protected, PROMPT)}
    moved = {}
    for name, protect in (("free", ()), ("kept", protected)):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, protect=protect, **settings)
        moved[name] = {p: float((picture(pipe, p) - x).norm()) for p, x in before.items()}
        cd.unload(pipe)
    for prompt in protected:
        assert moved["kept"][prompt] < 0.05 * moved["free"][prompt], moved
        assert moved["kept"][prompt] < 0.1 * moved["kept"][PROMPT], moved
    assert moved["kept"][PROMPT] > 0.1 * moved["free"][PROMPT], moved


def test_words_are_drawn_where_nobody_names_prompts(pipe):
    settings = {**QUICK, "steps": 20, "lr": 2e-2, "crops": 1, "seed": 3}
    drawn = drawn_prompts(pipe.tokenizer, PROMPT, "V*", 2, seed=3)
    assert len({*drawn}) == 2 and all("V*" not in prompt and prompt != PROMPT for prompt in drawn)
    before = {p: picture(pipe, p) for p in (*drawn, PROMPT)}
    moved = {}
    for words in (0, 2):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, protect_words=words, **settings)
        moved[words] = {p: float((picture(pipe, p) - x).norm()) for p, x in before.items()}
        cd.unload(pipe)
    for prompt in drawn:
        assert moved[2][prompt] < 0.25 * moved[2][PROMPT] and moved[2][prompt] < 0.5 * moved[0][prompt], moved
    assert moved[2][PROMPT] > 0.5 * moved[0][PROMPT], moved
    with pytest.raises(SettingsError, match="protect_words"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, name="n", protect_words=-1, **QUICK)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_read_is_where_the_own_tokens_are_strong_beside_all_others(noise):
    """Both own kinds have a direction that no other has; the rest they share with the protected tokens."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q.mT
    shared = torch.randn(200, 10, generator=generator, dtype=torch.float64) @ basis[:10]
    shared += noise * torch.randn(200, 16, generator=generator, dtype=torch.float64)
    own = [shared[:20] + basis[10], shared[20:30] + 0.3 * basis[11]]
    found = strong_directions(own, [shared[30:100], shared[100:]])
    torch.testing.assert_close(found @ found.mT, torch.eye(len(found), dtype=torch.float64))
    for direction in basis[10:12]:
        assert (found @ direction).norm() > 0.95, found @ basis.mT
    leak = sum((x @ found.mT).square().sum(1).mean() for x in (shared[30:100], shared[100:])) / 2
    assert sum((x @ found.mT).square().sum(1).mean() for x in own) >= 40 * leak
    assert len(found) < 6 + bool(noise)


def test_one_direction_is_read_where_none_is_strong():
    tokens = torch.nn.functional.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1)
    assert len(strong_directions([tokens], [tokens])) == 1


def test_words_leave_the_empty_prompt_to_learn_with_caption_dropout(pipe):
    """Named prompts leave it enough; beside many words it must be asked for."""
    family = family_of(pipe)
    words = drawn_prompts(pipe.tokenizer, PROMPT, "V*", 50, seed=0)
    read = {}
    for dropout in (0.0, 0.1):
        adapter = cd.attach(pipe, rank=1)
        own = tokens_of(family, [PROMPT])
        found = Protection(family, adapter, [], words=words, own=own, dropout=dropout).directions.double()
        cd.unload(pipe)
        read[dropout] = float((tokens_of(family, [""]) @ found.mT).square().mean())
    assert read[0.1] > 10 * read[0.0], read


def test_a_token_that_learns_is_read_where_it_may_lead(pipe):
    """It begins as a word, whose prompts are like those of any word."""
    family = family_of(pipe)
    prompt = "a photo of W* dog"
    settings = CustomizeSettings(protect_words=50, new_token="cat", seed=1)
    read = []
    for learns in (False, True):
        adapter = cd.attach(pipe, rank=1)
        token = LearnedToken(pipe, family, "default", "W*", "cat")
        before = family.encode([prompt])["prompt"]
        found = protection(family, adapter, [prompt], "W*", settings, token if learns else None)
        assert found is not None
        torch.testing.assert_close(family.encode([prompt])["prompt"], before)  # all is as it was
        strange = torch.cat([tokens_with(family, prompt, reading) for reading in token.strangers(4, seed=9)])
        read.append(float((strange @ found.directions.double().mT).square().sum(1).mean()))
        cd.unload(pipe)
    assert read[1] > 2 * read[0], read


def tokens_with(family, prompt, reading):
    with reading:
        return tokens_of(family, [prompt])


def test_each_picture_goes_under_its_own_prompt(pipe):
    family = family_of(pipe)
    latents = encode(family, tiny.pictures(3), 16, crops=2, flip=True, seed=0)
    prompts = [PROMPT, f"{PROMPT} in red", PROMPT]
    stream = Stream(latents, Rotation(latents.frames_of, 0, "concept"), prompts, 3, 1.0)
    frames = [prompts[picture] for picture, own in enumerate(latents.frames_of) for _ in own]
    assert stream.prompt_of() == frames and len(frames) == len(latents.mean) > 3
    source = CachedSource(family, [stream], live=False)
    plain, red = family.encode([PROMPT, f"{PROMPT} in red"])["prompt"]
    for step in range(4):  # a step takes each picture once
        shown = source(step, torch.Generator().manual_seed(step)).conditions["prompt"]
        assert sum(one.equal(red) for one in shown) == 1 and sum(one.equal(plain) for one in shown) == 2


def test_a_prompt_for_each_picture_is_learned_and_noted(pipe, tmp_path):
    prompts = [f"{PROMPT} in red", *[PROMPT] * 2]
    out = tmp_path / "a.safetensors"
    cd.customize(pipe, tiny.pictures(3), prompt=prompts, out=out, steps=1)
    assert cd.read(out).metadata["prompt"] == prompts[0]
    assert f"{prompts[0]}; {PROMPT}" in (tmp_path / "a.run/report.html").read_text()
    for bad, said in ((prompts[:2], "got 2 prompts for 3 pictures"), ([], "got 0 prompts"), (["a dog"] * 3, "a dog")):
        with pytest.raises(SettingsError, match=said):
            cd.customize(pipe, tiny.pictures(3), prompt=bad, steps=1)


def test_caption_dropout_shows_a_share_of_the_pictures_under_the_empty_prompt(pipe):
    family = family_of(pipe)
    latents = encode(family, tiny.pictures(), 16, crops=1, flip=False, seed=0)

    def shown(dropout: float) -> torch.Tensor:
        """Which of 400 pictures of the first stream went under the empty prompt."""
        streams = [
            Stream(latents, Rotation(latents.frames_of, 0, prompt), [prompt], 4, 1.0, share)
            for prompt, share in ((PROMPT, dropout), ("a photo of a cat", 0.0))
        ]
        source = CachedSource(family, streams, live=False)
        prompts = torch.stack(
            [source(step, torch.Generator().manual_seed(step)).conditions["prompt"] for step in range(100)]
        )
        own, other, empty = family.encode([PROMPT, "a photo of a cat", ""])["prompt"]
        assert torch.equal(prompts[:, 4:], other.expand(100, 4, -1, -1))
        under = (prompts[:, :4] == empty).all(-1).all(-1)
        assert torch.equal(prompts[:, :4][~under], own.expand(int((~under).sum()), -1, -1))
        return under

    assert not shown(0.0).any()
    assert 60 < shown(0.2).sum() < 100  # of 400: 80 ± 8
    assert shown(0.2).any(0).all()  # not always the same of a batch


def test_the_empty_prompt_learns_with_caption_dropout_also_beside_protection(pipe):
    protected = ("a photo of a cat", "a red dog")
    before = {p: picture(pipe, p) for p in ("", *protected)}
    moved = {}
    for name, extra in (
        ("free", {"caption_dropout": 0.5}),
        ("kept", {"protect": protected}),
        ("dropped", {"protect": protected, "caption_dropout": 0.5}),
    ):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **{**QUICK, "steps": 20, "lr": 2e-2, "crops": 1, **extra})
        moved[name] = {p: float((picture(pipe, p) - x).norm()) for p, x in before.items()}
        cd.unload(pipe)
    assert moved["kept"][""] < 0.1 * moved["dropped"][""], moved
    for prompt in protected:
        assert moved["dropped"][prompt] < 0.1 * moved["free"][prompt], moved


def test_caption_dropout_where_the_empty_prompt_is_zeros(tmp_path):
    pipe = tiny.stable_diffusion_xl(tmp_path / "parts")
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    family = family_of(pipe)
    said, empty = (family.encode(["a photo of a cat", ""])[k] for k in ("prompt", "pooled"))
    _, negative, _, negative_pooled = pipe.encode_prompt("a photo of a cat", do_classifier_free_guidance=True)
    assert torch.equal(said[1:], negative) and torch.equal(empty[1:], negative_pooled) and said[0].any()
    with pytest.raises(SettingsError, match=r"empty prompt is all zeros.*where='all'"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, caption_dropout=0.1, **QUICK)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, caption_dropout=0.1, where="all", **QUICK)
    cd.unload(pipe)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert family.encode([""])["prompt"].any()


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_caption_dropout_is_a_share(share, pipe):
    with pytest.raises(SettingsError, match=r"got caption_dropout=.*, expected a number from 0 to below 1"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, caption_dropout=share, **QUICK)


def test_principal_directions():
    plane = torch.linalg.qr(torch.randn(6, 2)).Q.mT
    tokens = torch.cat([torch.randn(9, 2) @ plane, 100 * plane[:1], torch.zeros(1, 6)])
    found = principal_directions(tokens, 0.9999)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found @ found.mT, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(tokens.double() @ found.mT @ found, tokens.double(), atol=1e-5, rtol=1e-5)
    assert len(principal_directions(tokens, 0.3)) == 1


def test_protection_is_refused_where_nothing_can_be_promised(tmp_path, pipe):
    for settings, said in (({"where": "all"}, "cross"), ({"text_encoder": True}, "text encoder learns as well")):
        with pytest.raises(SettingsError, match=said):
            cd.customize(pipe, tiny.pictures(), prompt=PROMPT, protect=("a cat",), **settings, **QUICK)
        assert not cd.adapters(pipe)
    joint = tiny.stable_diffusion_3(tmp_path / "joint")
    with pytest.raises(SettingsError, match="cross"):
        cd.customize(joint, tiny.pictures(), prompt=PROMPT, protect=("a cat",), where="joint", **QUICK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "parts").to(dtype)
    adapter = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in adapter.parameters())
    assert {p.dtype for n, p in pipe.unet.named_parameters() if "channels" not in n} == {dtype}


def test_vae_that_overflows_in_half_precision_encodes_in_full(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    family = family_of(pipe)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    mean, _ = encode_pixels(family, pixels)
    assert pipe.vae.dtype == torch.float16
    expected = pipe.vae.to(torch.float32).encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(mean, expected)


def test_samples_and_report(tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    cd.customize(
        pipe, tiny.pictures(), prompt=PROMPT, out=out, sample_every=2, sample_steps=1, sample_count=3,
        steps=4, resolution=16,
    )  # fmt: skip
    sheets = sorted((tmp_path / "dog.run/samples").iterdir())
    assert [p.name for p in sheets] == [f"step-{n:08d}.png" for n in (0, 2, 4)]
    assert Image.open(sheets[0]).size == (3 * 16 + 4, 16)
    page = (tmp_path / "dog.run/report.html").read_text()
    assert page.count("data:image/png") == 3 + 3 and "<svg" in page and "V*, learned from 3 pictures" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    file = cd.read(out)
    assert file.identifier == "V*" and file.prompt == PROMPT and json.loads(file.metadata["settings"])["steps"] == 4


def test_the_report_is_there_from_the_start_and_goes_on(tmp_path, pipe, monkeypatch):
    """The first sheet is what the untouched pipeline gives; one that was killed and resumed draws the same sheets."""
    from comcat.diffusion.learn.optimisation import Optimisation

    out, how = tmp_path / "dog.safetensors", {**QUICK, "steps": 4, "sample_every": 1, "sample_steps": 1, "lr": 0.1}
    how |= {"sample_count": 2, "checkpoint_every": 2}
    untouched = [g.image.tobytes() for g in generate(pipe, PROMPT, count=2, steps=1)]
    step = Optimisation.step

    def killed(self, number, watch):
        if number == 3:
            raise RuntimeError("killed")
        return step(self, number, watch)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Optimisation, "step", killed)
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **how)
    page = (tmp_path / "dog.run/report.html").read_text()
    assert "Step 0" in page and "Step 3" in page and "3 of 4 steps" in page and not out.exists()
    first = Image.open(tmp_path / "dog.run/samples/step-00000000.png")
    assert first.crop((0, 0, 16, 16)).tobytes() == untouched[0]
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **how)
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "whole.safetensors", **how)
    for n in range(5):
        a, b = (Image.open(tmp_path / f"{f}.run/samples/step-{n:08d}.png").tobytes() for f in ("dog", "whole"))
        assert a == b
    assert "size of the adapter" in (tmp_path / "dog.run/report.html").read_text()
    assert "Step 4, of" not in (tmp_path / "whole.run/report.html").read_text()
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "whole.safetensors", sample_prompt="V*", **how)
    assert "Step 4, of" in (tmp_path / "whole.run/report.html").read_text()  # sheets of the old prompt say so


def test_shares_of_two_processes_add_up(pipe, monkeypatch):
    """Losses and gradients of the parts that two processes take of a batch sum to those of the whole."""
    from comcat.diffusion.learn.optimisation import Optimisation

    step, compared = Optimisation.step, []

    def comparing(self, number, watch):
        found = []
        for index, count in ((0, 1), (0, 2), (1, 2)):
            self.processes.index, self.processes.count = index, count
            loss = self.loss(number)
            found.append([loss, *torch.autograd.grad(loss, list(self.parameters.values()))])
        self.processes.index, self.processes.count = 0, 1
        for whole, *parts in zip(*found, strict=True):
            torch.testing.assert_close(sum(parts), whole)
            compared.append(float(whole.detach().abs().sum()))
        return step(self, number, watch)

    monkeypatch.setattr(Optimisation, "step", comparing)
    prior = {"prior_prompt": "a photo of a dog", "prior_count": 2, "sample_steps": 1}
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, batch_size=2, init="random", **prior, **QUICK)
    assert all(value > 0 for value in compared)


def test_process_count_must_divide_the_batch(pipe, monkeypatch):
    from comcat.diffusion.learn import customize as module

    class Two(module.Processes):
        def __init__(self, *, cpu):
            super().__init__(cpu=cpu)
            self.count = 2

    monkeypatch.setattr(module, "Processes", Two)
    with pytest.raises(SettingsError, match="got 1 for 2 processes"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a photo of a dog", "a photo of v* dog"])
def test_prompt_without_the_identifier(prompt, pipe):
    with pytest.raises(SettingsError, match="does not contain the identifier 'V\\*'"):
        cd.customize(pipe, tiny.pictures(), prompt=prompt, **QUICK)


def test_identifier_that_is_split_is_said(pipe, tmp_path):
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    page = (tmp_path / "dog.run/report.html").read_text()
    assert "&#39;v&#39; + &#39;*&#39;" in page and "new_token" in page
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt="a red dog", identifier="red", out=tmp_path / "r.safetensors", **QUICK)
    assert "splits the identifier" not in (tmp_path / "r.run/report.html").read_text()


def test_no_pictures(pipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for images in ([], tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DataError):
            cd.customize(pipe, images, prompt=PROMPT, **QUICK)


def test_one_picture_unreadable_ones_and_all_sizes(pipe, tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    tiny.pictures(1, (300, 17))[0].save(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "c.jpg").write_bytes(b"no picture")
    out = tmp_path / "dog.safetensors"
    with pytest.warns(UserWarning, match="cannot be read"):
        cd.customize(pipe, folder, prompt=PROMPT, out=out, **QUICK)
    page = (tmp_path / "dog.run/report.html").read_text()
    assert "left out: 2, the first" in page and "Only one" in page and "Over twice as long as wide" in page
    tiny.pictures(1, (9, 400))[0].convert("L").save(folder / "d.png")
    tiny.pictures(1, (64, 64))[0].save(folder / "e.png")
    cd.unload(pipe)
    with pytest.warns(UserWarning):
        cd.customize(pipe, folder, prompt=PROMPT, out=tmp_path / "b.safetensors", **QUICK)
    assert "Smaller than 16 pixels, and enlarged: 1 of 3 pictures." in (tmp_path / "b.run/report.html").read_text()
    (folder / "a.png").unlink(), (folder / "d.png").unlink(), (folder / "e.png").unlink()
    cd.unload(pipe)
    with pytest.raises(DataError, match="cannot be read"), pytest.warns(UserWarning):
        cd.customize(pipe, folder, prompt=PROMPT, **QUICK)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step": 3}, "unknown setting 'step'; did you mean 'steps'"),
        ({"steps": 0}, "got steps=0"),
        ({"lr": 0.0}, "got lr=0.0"),
        ({"resolution": 15}, "resolution: got 15, expected a multiple of 2, for example 16"),
        ({"out": "dog"}, "ends in .safetensors"),
        ({"rank": 0}, "got rank=0"),
        ({"crops": 10**9}, "got crops=1000000000"),
    ],
)
def test_settings_that_do_not_fit(settings, said, pipe):
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **settings)
    assert not cd.adapters(pipe)


def test_pipelines_that_do_not_fit(pipe):
    with pytest.raises(UnsupportedSite, match="joint"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, where="joint", **QUICK)
    pipe.scheduler, scheduler = None, pipe.scheduler
    with pytest.raises(ModelError, match="has no scheduler"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)
    with pytest.raises(ModelError, match="has no scheduler"):
        next(generate(pipe, "a dog", steps=1))
    pipe.scheduler = scheduler
    pipe.unet = tiny.unet(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels, the VAE's latents have 4"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)
    with pytest.raises(ModelError, match="expected a text-to-image pipeline"):
        cd.customize(torch.nn.Linear(1, 1), tiny.pictures(), prompt=PROMPT, **QUICK)


def test_loss_that_is_no_number(pipe, tmp_path):
    weight = pipe.unet.conv_out.weight
    with torch.no_grad():
        kept = weight[0, 0, 0, 0].clone()
        weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="the loss is nan at step 0"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "dog.safetensors", **QUICK)
    with torch.no_grad():
        weight[0, 0, 0, 0] = kept
    assert not cd.adapters(pipe) and not (tmp_path / "dog.safetensors").exists()
    assert not list((tmp_path / "dog.run").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_says_what_would_fit(error, pipe, monkeypatch):
    def full(*args, **kwargs):
        raise error

    before = picture(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", full)
        with pytest.raises(MemoryShortage) as told:
            cd.customize(pipe, tiny.pictures(), prompt=PROMPT, batch_size=2, **QUICK)
        with pytest.raises(MemoryShortage, match="--batch-size 1"):
            list(generate(pipe, "a dog", steps=1, count=2))
    for advice in ("batch_size 1", "gradient_checkpointing", "resolution 8 instead of 16", "bfloat16"):
        assert advice in str(told.value)
    assert not cd.adapters(pipe) and torch.equal(picture(pipe), before)


def test_interruption_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    from comcat.diffusion.learn.optimisation import Optimisation

    before = picture(pipe)

    def interrupted(self, number, watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Optimisation, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, new_token="dog", **QUICK)
    assert not cd.adapters(pipe) and torch.equal(picture(pipe), before)
    assert pipe.unet.conv_in.weight.requires_grad


def test_an_interrupted_run_keeps_its_last_step(tmp_path, pipe, monkeypatch):
    from comcat.diffusion.learn.optimisation import Optimisation

    step, before = Optimisation.step, picture(pipe)

    def interrupted(self, number, watch):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, watch)

    out, how = tmp_path / "dog.safetensors", {**QUICK, "checkpoint_every": 3}
    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt, match=r"after step 2 of 3; .*step-00000002"),
    ):
        patched.setattr(Optimisation, "step", interrupted)
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **how)
    assert not out.exists() and not cd.adapters(pipe) and torch.equal(picture(pipe), before)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **how)
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "whole.safetensors", **how)
    a, b = load_file(out), load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    cd.unload(pipe)
    state = sorted((tmp_path / "dog.run/checkpoints").iterdir())[-1] / "state.json"
    state.write_text(state.read_text().replace('"losses"', '"lost"'))
    with pytest.raises(StoreError, match=r"does not hold what .*\(KeyError: 'losses'\).*--restart"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    assert not cd.adapters(pipe)


def test_two_concepts_of_one_identifier_are_refused_whether_saved_or_not(pipe, tmp_path):
    adapter = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, name="first", **QUICK)
    record = cd.adapters(pipe)["first"].record
    assert adapter.record is record
    assert (record.identifier, record.prompt) == ("V*", PROMPT)
    with pytest.raises(SettingsError, match="'first' answers to 'v\\*' already"):
        cd.customize(pipe, tiny.pictures(), prompt="a photo of v* dog", identifier="v*", name="second", **QUICK)
    path = cd.save(pipe, tmp_path / "first.safetensors", name="first")
    cd.unload(pipe)
    cd.load(pipe, path, name="first")
    with pytest.raises(SettingsError, match="answers to 'V\\*' already"):
        cd.load(pipe, path, name="second")


@pytest.mark.parametrize(
    "settings",
    [{"protect": (PROMPT,)}, {"protect": ("V* dog",)}, {"prior_prompt": "a photo of V* dog"}, {"protect": "a dog"}],
)
def test_prompts_to_stay_as_they_are_must_not_call_the_concept(settings, pipe):
    with pytest.raises(SettingsError, match=r"contains the identifier|expected a sequence of texts"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **settings, **QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("snr_gamma", -1.0), ("snr_gamma", 0.0), ("snr_gamma", float("nan")), ("lr", float("inf")), ("sample_steps", 0),
     ("weight_decay", float("inf")), ("sample_steps", 100_000)],
)  # fmt: skip
def test_settings_out_of_range_are_said_at_once(name, value, pipe):
    with pytest.raises(SettingsError, match=name.replace("sample_steps", "steps")):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **{**QUICK, name: value})
    assert not cd.adapters(pipe)


def test_a_place_that_cannot_be_written_to_is_said_before_training(tmp_path, pipe, monkeypatch):
    from comcat.diffusion.learn.optimisation import Optimisation

    monkeypatch.setattr(Optimisation, "step", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="nothing can be written"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "file" / "dog.safetensors", **QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"where": "joint"},
        {"prior_prompt": "a dog", "prior_images": "nope"},
        {"where": "all", "protect": ("a",)},
        {"new_token": ""},
    ],
)
def test_a_restart_that_cannot_begin_leaves_the_run_before_it(wrong, tmp_path, pipe):
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    cd.unload(pipe)
    before = sorted((tmp_path / "dog.run").rglob("*.safetensors"))
    with pytest.raises(ComcatError):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, restart=True, **{**QUICK, **wrong})
    assert before and sorted((tmp_path / "dog.run").rglob("*.safetensors")) == before
    assert not cd.adapters(pipe)


def test_class_pictures_are_of_the_model_that_is_taught(tmp_path, pipe):
    prior = {"prior_prompt": "a dog", "prior_count": 2, "sample_steps": 1}
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **prior, **QUICK)
    first = {p.name: p.read_bytes() for p in (tmp_path / "dog.run/class").glob("*.png")}
    other = tiny.stable_diffusion(tmp_path / "other")
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.5)
    cd.customize(other, tiny.pictures(), prompt=PROMPT, out=out, restart=True, **prior, **QUICK)
    again = {p.name: p.read_bytes() for p in (tmp_path / "dog.run/class").glob("*.png")}
    assert first.keys() == again.keys() and all(first[n] != again[n] for n in first)
    cd.unload(other)
    with pytest.raises(StoreError, match="sample_steps was 1, now 2"):  # they shape what is trained on
        cd.customize(other, tiny.pictures(), prompt=PROMPT, out=out, **{**prior, "sample_steps": 2}, **QUICK)


def test_class_pictures_that_a_safety_checker_blackened_are_left_out(pipe, monkeypatch):
    from comcat.diffusion.draw.generate import Generated
    from comcat.diffusion.learn import prior
    from comcat.diffusion.learn.customize import Customization

    made = [tiny.pictures(1)[0], Image.new("RGB", (16, 16))]

    def generated(*_, **__):
        return [Generated(image, "a dog", n, n == 1) for n, image in enumerate(made)]

    monkeypatch.setattr(prior, "generate", generated)
    settings = CustomizeSettings(prior_prompt="a dog", prior_count=2, **QUICK)
    run = Customization(pipe, tiny.pictures(), PROMPT, "V*", "default", settings, None, False)
    assert len(run._class_pictures().images) == 1
    assert any("black as a safety checker leaves them: 1 of 2 pictures of the class" in note for note in run.notes)
    made[0] = made[1]
    with pytest.raises(DataError, match="not black"):
        run._class_pictures()

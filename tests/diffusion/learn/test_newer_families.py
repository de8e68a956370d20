"""Families that came after Flux: training sees what the pipeline shows; it learns, is given back, saved and fused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as cd
from comcat.diffusion.learn.batches import CachedSource, Stream
from comcat.diffusion.learn.latents import Rotation, encode, encode_pixels
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import Family, family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.diffusion.pipeline.opening import load_pipeline
from comcat.diffusion.pipeline.residence import frozen
from comcat.errors import ComcatError, ModelError, SettingsError, UnsupportedSite
from comcat.runs.processes import Processes
from comcat.runs.watching import LossWatch

from .. import tiny
from ..newer import NEWER

PROMPT = "a photo of V* dog"
FUSED = {"pixart", "sana"}
"""Families without rotary embeddings and norms between a product's factors."""


OF_OWN_SIZES = ("pixart", "sana", "hunyuan")
"""Make pictures of sizes of their own alone, which are large."""


@pytest.fixture(params=list(NEWER))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(name: str, tmp_path: Any) -> Any:
    return NEWER[name](tmp_path / "parts")


def side_of(pipe: Any) -> int:
    return {2: 16, 4: 16, 16: 32, 32: 32}[family_of(pipe).multiple()]


def options(pipe: Any, guidance: float | None = None) -> dict[str, Any]:
    """How the pipeline is called: small, and without rounding to 8 bits."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    given |= dict.fromkeys(("height", "width"), side_of(pipe)) | family_of(pipe).drawing()
    if "use_resolution_binning" in takes:
        given["use_resolution_binning"] = False
    if guidance is not None:
        given["guidance_scale"] = guidance
    return given


def picture(pipe: Any) -> Tensor:
    return pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(3), **options(pipe))[0]


def unpacked(pipe: Any, x: Tensor, side: int) -> Tensor:
    """Latents (batch, channels, height, width), however the pipeline holds them."""
    if x.ndim > 3:
        return x.squeeze(2) if x.ndim == 5 else x  # of one frame: Wan
    if hasattr(pipe, "_patchify_latents"):  # Flux 2
        return x.mT.unflatten(2, (side // 2 // pipe.vae_scale_factor,) * 2)
    x = pipe._unpack_latents(x, side, side, pipe.vae_scale_factor)
    return x.squeeze(2) if x.ndim == 5 else x


def test_a_step_sees_what_the_pipeline_itself_shows_the_denoiser(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scheduler is given at first, predicted again from the cached conditions, the same sign included."""
    family, side = family_of(pipe), side_of(pipe)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def watched(output: Tensor, time: Tensor, sample: Tensor, **more: Any) -> Any:
        seen.append((output, time, sample))
        return step(output, time, sample, **more)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    off = 0.0 if "cfg_truncation" in inspect.signature(type(pipe).__call__).parameters else 1.0
    monkeypatch.setattr(type(family), "guidance", lambda self, noisy: None, raising=False)
    pipe(prompt=PROMPT, **options(pipe, guidance=off))
    output, time, sample = seen[0]
    original = (1024, 1024) if type(family).__name__ == "HunyuanDiT" else (side, side)  # what its pipeline says
    with torch.no_grad():
        conditions = family.encode([PROMPT]) | family.framing(original, (0, 0), side)
        found = family.predict(unpacked(pipe, sample, side), time.reshape(1), conditions)
    torch.testing.assert_close(found, unpacked(pipe, output, side))


def test_latents_are_those_that_the_pipeline_decodes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline gives its decoder, given back as the encoder's, has become the latents that it came from."""
    family, side = family_of(pipe), side_of(pipe)
    decoded: list[Tensor] = []
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **more: decoded.append(z) or decode(z, **more))
    given = options(pipe) | {"generator": torch.Generator().manual_seed(3), "output_type": "pil"}
    step = pipe.scheduler.step

    def watched(*of: Any, **more: Any) -> Any:
        latents.append(step(*of, **more)[0])
        return (latents[-1],)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    pipe(prompt=PROMPT, **given)
    mean, std = family.scaled(decoded[0], torch.ones_like(decoded[0]))
    expected = unpacked(pipe, latents[-1], side)
    torch.testing.assert_close(mean, expected.to(mean), rtol=1e-4, atol=1e-5)
    again, _ = family.scaled(decoded[0] + 0.5, torch.ones_like(decoded[0]))
    torch.testing.assert_close(again - mean, 0.5 * std.to(mean), rtol=1e-3, atol=1e-4)
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    assert encode_pixels(family, pixels)[0].shape == expected.shape


def test_it_learns_and_is_given_back(pipe: Any, tmp_path: Any) -> None:
    before = picture(pipe)
    adapter = cd.attach(pipe)
    torch.testing.assert_close(picture(pipe), before, rtol=1e-4, atol=1e-5)
    cd.unload(pipe)
    assert torch.equal(picture(pipe), before)
    adapter = cd.customize(
        pipe, tiny.pictures(2), prompt=PROMPT, steps=2, resolution=side_of(pipe), lr=0.05, batch_size=2, rank=1
    )
    for path, p in adapter.named_parameters().items():
        assert p.abs().sum() > 0 or unread(pipe, path), path
    learned = picture(pipe)
    assert not torch.allclose(learned, before)
    cd.save(pipe, tmp_path / "dog.safetensors", dtype=torch.float32)
    cd.unload(pipe)
    assert torch.equal(picture(pipe), before)
    cd.load(pipe, tmp_path / "dog.safetensors")
    torch.testing.assert_close(picture(pipe), learned)


def test_a_step_lowers_the_loss_of_its_batch(pipe: Any) -> None:
    family = family_of(pipe)
    run = fixed_batch(family, side_of(pipe))
    with frozen(family), torch.random.fork_rng():
        before = float(run.loss(0).detach())
        for parameter in run.parameters.values():
            parameter.requires_grad_(True)
        run.step(0, LossWatch())
        assert all(p.grad is not None or unread(family.pipe, n) for n, p in run.parameters.items())
        assert float(run.loss(0).detach()) < before
    cd.unload(pipe)


def unread(pipe: Any, path: str) -> bool:
    """Whether a parameter changes nothing: Qwen-Image computes its text's last output, and nothing reads it."""
    last = f"transformer_blocks.{len(getattr(pipe.transformer, 'transformer_blocks', ())) - 1}."
    return hasattr(pipe, "prompt_template_encode") and last in path and path.endswith(("add_q_up", "add_out_up"))


def fixed_batch(family: Family, side: int) -> Optimisation:
    """A run whose every step sees the same pictures at the same times."""
    adapter = cd.attach(family.pipe, rank=2, init="random", seed=1)
    latents = encode(family, tiny.pictures(2, (side, side)), side, crops=1, flip=False, seed=0)
    stream = Stream(latents, Rotation(latents.frames_of, 0, "a"), [PROMPT], 2, 1.0)
    source = CachedSource(family, [stream], live=False)
    settings = CustomizeSettings(steps=10, lr=1e-3, checkpoint_every=0)
    noising = noising_of(family.pipe.scheduler)
    return Optimisation(family, noising, adapter.named_parameters(), source, settings, Processes(cpu=True))


def test_a_saved_pipeline_takes_the_adapter(pipe: Any, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "whole")
    cd.attach(pipe, init="random", seed=3)
    expected = picture(pipe)
    cd.save(pipe, tmp_path / "dog.safetensors", dtype=torch.float32)
    other = load_pipeline(tmp_path / "whole")
    for about in ("default_sample_size", "prompt_template_encode", "prompt_template_encode_start_idx"):
        if hasattr(pipe, about):
            setattr(other, about, getattr(pipe, about))
    other.set_progress_bar_config(disable=True)
    cd.load(other, tmp_path / "dog.safetensors")
    torch.testing.assert_close(picture(other), expected)


def test_it_is_fused_or_says_why_not(name: str, pipe: Any) -> None:
    cd.attach(pipe, init="random", seed=3)
    expected = picture(pipe)
    try:
        cd.fuse(pipe)
    except ComcatError as error:
        assert name not in FUSED and str(error)
        print(error)
        return
    assert name in FUSED
    torch.testing.assert_close(picture(pipe), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(name: str, pipe: Any, dtype: torch.dtype) -> None:
    pipe.to(dtype=dtype)
    adapter = cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=side_of(pipe))
    assert all(p.isfinite().all() for p in adapter.parameters())


def test_prompts_of_other_lengths_side_by_side_are_as_alone(name: str, pipe: Any) -> None:
    """The empty prompt too, which pictures are shown under with caption_dropout."""
    family, side = family_of(pipe), side_of(pipe)
    prompts = ["a photo of a red cat of V* dog", "", "a dog"]
    mean, _ = encode_pixels(family, torch.rand(1, 3, side, side))
    framing = family.framing((side, side), (0, 0), side)
    times = noising_of(pipe.scheduler).draw(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = family.encode(prompts) | {k: v.repeat(3, 1) for k, v in framing.items()}
        found = family.predict(mean.repeat(3, 1, 1, 1), times.repeat(3), together)
        for row, prompt in zip(found, prompts, strict=True):
            alone = family.predict(mean, times, family.encode([prompt]) | framing)
            torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_cut_off_before_the_identifier(name: str, pipe: Any) -> None:
    longest = max(family_of(pipe).prompt_lengths().values())
    with pytest.raises(SettingsError, match="comes after the"):
        cd.customize(pipe, tiny.pictures(2), prompt="a " * longest + "V* dog", steps=1, resolution=side_of(pipe))


def test_a_pipeline_that_edits_pictures_is_refused(tmp_path: Any) -> None:
    from diffusers import QwenImageEditPipeline

    parts = NEWER["qwen"](tmp_path).components
    editing = QwenImageEditPipeline(**parts, processor=None)
    with pytest.raises(ModelError, match="makes pictures of pictures"):
        cd.customize(editing, tiny.pictures(2), prompt=PROMPT, steps=1)


def test_wan_that_is_told_a_time_for_every_token(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Wan 2.2 TI2V-5B is."""
    pipe = NEWER["wan"](tmp_path, expand_timesteps=True)
    test_a_step_sees_what_the_pipeline_itself_shows_the_denoiser(pipe, monkeypatch)


def test_relatives_of_wan_are_refused_by_name(tmp_path: Any) -> None:
    from diffusers import WanVACETransformer3DModel

    pipe = NEWER["wan"](tmp_path)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    one = pipe.transformer
    pipe.transformer_2 = type(one)(**config)
    with pytest.raises(ModelError, match="two transformers, one for much noise and one for little"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1)
    pipe.transformer_2 = None
    pipe.transformer = WanVACETransformer3DModel(**config, vace_layers=[0], vace_in_channels=8)
    with pytest.raises(ModelError, match=r"cannot customize a WanVACETransformer3DModel; expected .* or Wan"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1)


def test_protected_prompts_where_the_text_is_projected_first(tmp_path: Any) -> None:
    pipe = NEWER["pixart"](tmp_path)
    with pytest.raises(SettingsError, match="protect"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16, protect=("a dog",))


@pytest.mark.parametrize("name", [n for n in NEWER if n not in OF_OWN_SIZES], indirect=True)
def test_pictures_are_generated(pipe: Any) -> None:
    """With guidance, through the public function."""
    side = max(side_of(pipe), family_of(pipe).multiple())
    made = list(cd.generate(pipe, [PROMPT], steps=2, size=side, guidance=2.0))
    assert made[0].image.size == (side, side)
    again = list(cd.generate(pipe, [PROMPT], steps=2, size=side, guidance=5.0))
    assert again[0].image.tobytes() != made[0].image.tobytes()


def test_a_family_that_is_half_known_is_told_module_by_module(tmp_path: Any) -> None:
    pipe = NEWER["flux2"](tmp_path)
    last = pipe.transformer.single_transformer_blocks[1].attn
    before = last.processor
    last.processor = type("Strange", (type(before),), {})()
    out = tmp_path / "dog.safetensors"
    adapter = cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16, out=out)
    assert len(adapter.modules) == 2
    told = (tmp_path / "dog.run/report.html").read_text()
    assert "single_transformer_blocks.1.attn (its processor is a Strange" in told
    cd.unload(pipe)
    with pytest.raises(UnsupportedSite, match=r"single_transformer_blocks\.1\.attn \(its processor is a Strange"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16, where="all")
    assert not cd.adapters(pipe)
    found = cd.find_adaptable(pipe)
    assert "transformer.single_transformer_blocks.1.attn" in {r.name for r in found.refused}
    last.processor = before
    assert all("attn" not in r.name for r in cd.find_adaptable(pipe).refused)

"""An adapter as a LoRA: loaded by diffusers itself, it gives nearly what the adapter gave, or is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.cli import main
from comcat.diffusion.adapter import lora
from comcat.errors import ModelError, SettingsError, StoreError, UnsupportedSite
from comcat.linalg import nearest_updates
from comcat.linalg.updates import Side

from .. import tiny
from ..denoisers import random, unet_arguments
from ..newer import NEWER

HOW: dict[str, Any] = {"steps": 2, "dtype": torch.float32}


@pytest.fixture
def roughly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps to the nearest updates, for tests that are not about how near a LoRA comes."""
    monkeypatch.setattr(lora, "nearest_updates", partial(nearest_updates, iterations=15))


def pipeline(folder: Path, family: str = "stable_diffusion", **settings: Any) -> Any:
    pipe = getattr(tiny, family)(folder / "parts")
    diffusion.attach(pipe, init="random", rank=1, alpha=0.5, **settings)
    return pipe


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    return pipe.unet(**unet_arguments(text=16)).sample


@torch.no_grad()
def predicted(pipe: Any, prompt: str = "a photo of dog") -> Tensor:
    """The UNet's output for a prompt as the pipeline reads it now."""
    text = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    return pipe.unet(random(1, 4, 8, 8), torch.tensor(50), text).sample


def test_diffusers_loads_it_and_the_output_is_near(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    with_adapter, weights = output(pipe), {n: p.clone() for n, p in pipe.unet.named_parameters()}
    report = diffusion.export_lora(pipe, tmp_path / "lora.safetensors", prompts=["a photo of dog"], **HOW)
    assert output(pipe).equal(with_adapter)  # nothing in the pipeline has changed
    assert all(p.equal(weights[n]) for n, p in pipe.unet.named_parameters())
    diffusion.unload(pipe)
    plain = output(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    near, change = (output(pipe) - with_adapter).norm(), (plain - with_adapter).norm()
    assert report.difference <= 0.03 and report.size_bytes == (tmp_path / "lora.safetensors").stat().st_size
    assert near < 0.5 * change  # these random latents and texts are none of those that it was made near on
    assert set(report.errors) == {f"{p}:{one}" for p in cross(pipe) for one in ("qk", "vo")}
    assert "differs by" in str(report) and not report.left_out


@pytest.mark.usefixtures("roughly")
def test_what_a_text_encoder_says_differently_counts(tmp_path: Path) -> None:
    """The denoiser is measured with the prompt as the LoRA's text encoder reads it, and not as the adapter's does."""
    pipe = pipeline(tmp_path, text_encoder=True, only="vo")
    with torch.no_grad():
        for name, factor in diffusion.adapters(pipe)["default"].named_parameters().items():
            factor.mul_(0 if name.startswith("unet.") else 9)  # the text encoder alone says something new
    with pytest.raises(SettingsError, match=r"a LoRA of rank 1 differs from 'default' by .*%.*expected at most 0\.1%"):
        diffusion.export_lora(pipe, tmp_path / "lora.safetensors", rank=1, bound=0.001, prompts="a photo of dog", **HOW)
    with_adapter = predicted(pipe)
    report = diffusion.export_lora(pipe, tmp_path / "lora.safetensors", force=True, rank=1, **HOW)
    assert predicted(pipe).equal(with_adapter)
    diffusion.unload(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    missing = float((predicted(pipe) - with_adapter).norm() / with_adapter.norm())
    assert missing / 3 < report.difference < 3 * missing  # of other latents and prompts


@pytest.mark.usefixtures("roughly")
def test_two_at_once_and_one_beside_an_adapter(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    plain = output(pipe)
    for seed, name in enumerate(("dog", "cat")):
        diffusion.attach(pipe, name=name, init="random", rank=1, alpha=0.5, seed=seed)
        diffusion.save(pipe, tmp_path / f"{name}.safetensors", name=name, identifier=name, dtype=torch.float32)
        diffusion.export_lora(pipe, tmp_path / f"{name}-lora.safetensors", name=name, **HOW)
        diffusion.unload(pipe)
    for name in ("dog", "cat"):
        diffusion.load(pipe, tmp_path / f"{name}.safetensors")
    both = output(pipe)
    diffusion.unload(pipe, "cat")
    pipe.load_lora_weights(tmp_path / "cat-lora.safetensors", adapter_name="cat")
    beside = (output(pipe) - both).norm() / (plain - both).norm()
    diffusion.unload(pipe)
    pipe.load_lora_weights(tmp_path / "dog-lora.safetensors", adapter_name="dog")
    pipe.set_adapters(["dog", "cat"])
    together = (output(pipe) - both).norm() / (plain - both).norm()
    assert beside < together < 1, (beside, together)
    pipe.unload_lora_weights()
    assert output(pipe).equal(plain)


def cross(pipe: Any) -> list[str]:
    return list(diffusion.find_adaptable(pipe).only("cross"))


@pytest.mark.usefixtures("roughly")
def test_kohya_s_keys_are_the_same_weights(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    for keys in ("diffusers", "kohya"):
        diffusion.export_lora(pipe, tmp_path / f"{keys}.safetensors", keys=keys, **HOW)
    diffusion.unload(pipe)
    found = {}
    for keys in ("diffusers", "kohya"):
        pipe.load_lora_weights(tmp_path / f"{keys}.safetensors")
        found[keys] = output(pipe)
        pipe.unload_lora_weights()
    assert torch.allclose(found["diffusers"], found["kohya"], atol=1e-6)
    assert not torch.allclose(found["kohya"], output(pipe), atol=1e-4)
    assert all(k.startswith("lora_unet_") for k in load_file(tmp_path / "kohya.safetensors"))


@pytest.mark.usefixtures("roughly")
def test_too_low_a_rank_is_refused_with_its_difference_unless_forced(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, where="all")
    out = tmp_path / "lora.safetensors"
    with pytest.raises(SettingsError, match=r"rank 1 differs from 'default' by .*%.* at most 0\.0%: try a higher rank"):
        diffusion.export_lora(pipe, out, rank=1, bound=1e-6, **HOW)
    assert not out.exists()
    low = diffusion.export_lora(pipe, out, rank=1, bound=1e-6, force=True, **HOW)
    high = diffusion.export_lora(pipe, out, rank=8, force=True, **HOW)
    assert high.difference < low.difference and max(high.errors.values()) < max(low.errors.values())


@pytest.mark.usefixtures("roughly")
def test_both_streams_of_a_joint_attention(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, "stable_diffusion_3")
    report = diffusion.export_lora(pipe, tmp_path / "lora.safetensors", force=True, **HOW)
    keys = {k.split(".attn.")[1].split(".lora")[0] for k in load_file(tmp_path / "lora.safetensors")}
    assert {"to_q", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"} <= keys
    assert report.of_change < 0.5
    diffusion.unload(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("family", ["flux2", "qwen", "z_image", "wan"])
def test_newer_families(family: str, tmp_path: Path) -> None:
    """What stands between their queries and keys leaves no product for a LoRA; values and outputs come near."""
    pipe = NEWER[family](tmp_path / "parts")
    diffusion.attach(pipe, init="random", rank=1, alpha=0.5)
    how = {"steps": 2, "size": 16, "dtype": torch.float32, "force": True}
    report = diffusion.export_lora(pipe, tmp_path / "lora.safetensors", **how)
    assert all(site in report.left_out for site in report.errors if site.endswith(":qk"))
    near = [error for site, error in report.errors.items() if site not in report.left_out]
    assert near and max(near) < 0.2 and report.of_change < 1
    diffusion.unload(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert pipe.get_active_adapters()


def test_a_pipeline_that_loads_no_loras_is_told_unless_forced(tmp_path: Path) -> None:
    pipe = NEWER["pixart"](tmp_path / "parts")
    diffusion.attach(pipe, init="random", rank=1, alpha=0.1)
    out = tmp_path / "lora.safetensors"
    with pytest.raises(UnsupportedSite, match="loads no LoRAs into a PixArtAlphaPipeline"):
        diffusion.export_lora(pipe, out, steps=2)
    assert not out.exists()


def test_a_size_that_is_not_the_pipeline_s_is_told(tmp_path: Path) -> None:
    """Wan's own is 480 by 832 pixels, for which this small one has no places."""
    pipe = NEWER["wan"](tmp_path / "parts")
    diffusion.attach(pipe, init="random")
    with pytest.raises(ModelError, match="cannot generate in 2 steps at its own size: RuntimeError"):
        diffusion.export_lora(pipe, tmp_path / "lora.safetensors", steps=2)
    assert not (tmp_path / "lora.safetensors").exists() and not pipe.transformer._forward_hooks


@pytest.mark.parametrize("settings", ["{", "[]", '{"resolution": null}', '{"resolution": 7}', '{"resolution": "a"}'])
def test_it_is_compared_at_the_size_that_it_was_taught_at(settings: str, tmp_path: Path) -> None:
    pipe = NEWER["wan"](tmp_path / "parts")
    diffusion.customize(pipe, tiny.pictures(2), prompt="a V* dog", steps=1, resolution=16)
    diffusion.save(pipe, tmp_path / "dog.safetensors")
    diffusion.export_lora(pipe, tmp_path / "lora.safetensors", steps=2, force=True)
    diffusion.unload(pipe)
    diffusion.load(pipe, tmp_path / "dog.safetensors", name="default")
    diffusion.export_lora(pipe, tmp_path / "lora.safetensors", steps=2, force=True)
    diffusion.save(pipe, tmp_path / "dog.safetensors", metadata={"settings": settings})
    diffusion.unload(pipe)
    diffusion.load(pipe, tmp_path / "dog.safetensors", name="default")
    with pytest.raises(ModelError, match="at its own size"):
        diffusion.export_lora(pipe, tmp_path / "lora.safetensors", steps=2, force=True)


@pytest.mark.usefixtures("roughly")
def test_two_exports_act_side_by_side(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, where="cross")
    plain, changes = None, []
    for name, seed in (("dog", 0), ("cat", 1)):
        diffusion.unload(pipe)
        plain = output(pipe)
        diffusion.attach(pipe, init="random", rank=1, alpha=0.2, seed=seed)
        diffusion.export_lora(pipe, tmp_path / f"{name}.safetensors", force=True, **HOW)
    diffusion.unload(pipe)
    for name in ("dog", "cat"):
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
        pipe.set_adapters([name])
        changes.append(output(pipe) - plain)
    pipe.set_adapters(["dog", "cat"])
    both = output(pipe) - plain
    assert (both - sum(changes)).norm() < 0.8 * min((both - change).norm() for change in changes)


@pytest.mark.usefixtures("roughly")
def test_what_no_lora_can_stand_for_is_left_out_and_said(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, "flux")
    report = diffusion.export_lora(pipe, tmp_path / "lora.safetensors", force=True, **HOW)
    assert all(site.endswith(":qk") for site in report.left_out) and len(report.left_out) == 2
    assert all("rotary embeddings between W_Q and W_K" in reason for reason in report.left_out.values())
    with pytest.raises(SettingsError, match=r"Left out were .*rotary embeddings"):
        diffusion.export_lora(pipe, tmp_path / "other.safetensors", bound=1e-9, **HOW)
    with pytest.raises(SettingsError, match="kohya' are for UNets alone"):
        diffusion.export_lora(pipe, tmp_path / "other.safetensors", keys="kohya", **HOW)
    diffusion.unload(pipe)
    single = {"transformer.single_transformer_blocks.0.attn"}
    diffusion.attach(pipe, where="joint")
    assert single < set(diffusion.adapters(pipe)["default"].modules)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    out = tmp_path / "lora.safetensors"
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rank": 0}, "got rank 0, expected a whole number from 1"),
        ({"rank": 100_000}, "got rank 100000, expected at most 16, the rank of the largest projection"),
        ({"keys": "webui"}, "keys"),
        ({"name": "defualt"}, "did you mean 'default'"),
    )
    for settings, said in wrong:
        with pytest.raises(SettingsError, match=said):
            diffusion.export_lora(pipe, out, **settings)
    with pytest.raises(SettingsError, match=r"ends in \.safetensors"):
        diffusion.export_lora(pipe, tmp_path / "lora.bin")
    with pytest.raises(SettingsError, match="is an adapter, which the LoRA would replace"):
        diffusion.export_lora(pipe, diffusion.save(pipe, tmp_path / "dog.safetensors"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="nothing can be written"):
        diffusion.export_lora(pipe, tmp_path / "file" / "lora.safetensors")
    diffusion.attach(pipe, name="cat")
    with pytest.raises(SettingsError, match="'cat' would be measured as well"):
        diffusion.export_lora(pipe, out)
    diffusion.unload(pipe)
    diffusion.customize(pipe, tiny.pictures(), prompt="a V* dog", new_token="dog", steps=1, resolution=16)
    with pytest.raises(SettingsError, match="has a token of its own"):
        diffusion.export_lora(pipe, out)
    assert not out.exists()


def test_a_quantised_projection_is_told(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    for path in cross(pipe):
        attention = pipe.unet.get_submodule(path.removeprefix("unet."))
        attention.to_q = torch.nn.Sequential(attention.to_q)
        attention.to_v = torch.nn.Sequential(attention.to_v)
    with pytest.raises(UnsupportedSite, match=r"cannot become a LoRA.*to_q is a Sequential"):
        diffusion.export_lora(pipe, tmp_path / "lora.safetensors")


@pytest.mark.usefixtures("roughly")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(tmp_path)
    file = diffusion.save(pipe, tmp_path / "dog.safetensors", identifier="V*", prompt="a photo of V* dog")
    diffusion.unload(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "lora.safetensors"
    how = ["export", str(file), "--as", "lora", "--rank", "8", "--out", str(out), "--force"]
    assert main(how) == 1 and "--base" in capsys.readouterr().err
    assert main([*how, "--base", str(tmp_path / "pipe")]) == 0
    assert "rank 8" in capsys.readouterr().out and out.is_file()
    assert main([*how, "--base", str(tmp_path / "pipe")]) == 1 and "--overwrite" in capsys.readouterr().err
    assert main(["export", str(file), "--out", str(tmp_path / "x.onnx")]) == 1
    assert "--as lora" in capsys.readouterr().err


def test_the_nearest_updates_reach_what_can_be_reached() -> None:
    """A term within what W_Q spans is a change of W_K alone: at its rank nothing is missing."""
    own_l, own_r = random(2, 6, 3).double(), random(2, 5, 3, seed=1).double()
    wide = random(2, 5, 1, seed=2).double()
    left = Side(own_l, own_l[..., :1], (torch.eye(6, dtype=torch.float64),))
    right = Side(own_r, wide, (torch.eye(5, dtype=torch.float64),))
    updates_l, updates_r, error = nearest_updates(left, right, 2)
    assert error < 1e-4
    changed = [
        side.own + (side.streams[0] @ a @ b).unflatten(1, (2, -1)).transpose(0, 1)
        for side, ((a, b),) in ((left, updates_l), (right, updates_r))
    ]
    wanted = own_l @ own_r.mT + own_l[..., :1] @ wide.mT
    assert float((changed[0] @ changed[1].mT - wanted).norm() / (own_l[..., :1] @ wide.mT).norm()) == pytest.approx(
        error, abs=1e-6
    )
    _, _, poor = nearest_updates(left, right, 1)
    assert poor > error

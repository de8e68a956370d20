"""A pipeline whose denoiser is exchanged, or that shares its text encoder, while an adapter acts in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import ModelError, SettingsError

from .. import tiny


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path)


@pytest.fixture
def dog(pipe: Any, tmp_path: Path) -> Path:
    diffusion.attach(pipe, init="random", text_encoder=True)
    path = diffusion.save(pipe, tmp_path / "dog.safetensors", dtype=torch.float32)
    diffusion.unload(pipe)
    return path


def read(pipe: Any) -> Tensor:
    return pipe.encode_prompt("a photo of a dog", "cpu", 1, False)[0]


@pytest.mark.parametrize("name", [None, "dog"])
def test_what_is_left_in_the_text_encoder_is_told_and_goes_with_unload(pipe: Any, dog: Path, name: str | None) -> None:
    plain = read(pipe)
    diffusion.load(pipe, dog)
    read_with = read(pipe)
    pipe.unet = tiny.unet()
    told = r"'dog' acts in the text_encoder, and this unet does not know it: the unet has been exchanged.*unload\(\)"
    for verb in (diffusion.adapters, diffusion.fuse, lambda p: diffusion.load(p, dog), diffusion.attach):
        with pytest.raises(ModelError, match=told):
            verb(pipe)
    with pytest.raises(SettingsError, match=r"no adapter called 'cat'.*'dog'"):
        diffusion.unload(pipe, "cat")
    diffusion.unload(pipe, name)
    assert torch.equal(read(pipe), plain) and not diffusion.adapters(pipe)
    diffusion.load(pipe, dog)
    assert torch.equal(read(pipe), read_with)  # once, and not twice


def test_an_adapter_does_not_come_twice_into_a_text_encoder_that_two_pipelines_share(pipe: Any, dog: Path) -> None:
    from diffusers import StableDiffusionPipeline

    other: Any = StableDiffusionPipeline(**{**pipe.components, "unet": tiny.unet()}, requires_safety_checker=False)
    diffusion.load(pipe, dog)
    before = read(pipe)
    with pytest.raises(ModelError, match="another pipeline with the same text_encoder has loaded it"):
        diffusion.load(other, dog)
    assert torch.equal(read(other), before) and list(diffusion.adapters(pipe)) == ["dog"]


class Training(torch.nn.Module):
    """As training scripts write it."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet


@pytest.mark.parametrize(
    "wrapped",
    [torch.nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel, Training],
    ids=["parallel", "compiled", "averaged", "own-module"],
)
def test_what_is_taught_in_a_wrapper_loads_into_a_pipeline(pipe: Any, wrapped: Any, tmp_path: Path) -> None:
    """Paths are those of the model inside; before, a file said ``transformer.module.…``, which fits nothing."""
    outer = wrapped(pipe.unet)
    adapter = diffusion.attach(outer, init="random")
    assert all(path.startswith("unet.") and "module" not in path for path in adapter.terms)
    inside = getattr(outer, "module", pipe.unet)  # an average is of a copy
    assert list(diffusion.adapters(inside)) == ["default"]
    file = diffusion.save(outer, tmp_path / "dog.safetensors")
    diffusion.unload(outer)
    diffusion.load(pipe, file)
    assert diffusion.adapters(pipe)["dog"].modules == adapter.modules


def test_what_is_fused_into_a_text_encoder_is_not_taken_out_without_its_denoiser(pipe: Any, dog: Path) -> None:
    plain, own = read(pipe), pipe.unet
    diffusion.load(pipe, dog)
    diffusion.fuse(pipe)
    fused, pipe.unet = read(pipe), tiny.unet()
    with pytest.raises(SettingsError, match="'dog' is fused into the weights; put the old denoiser back"):
        diffusion.unload(pipe)
    assert torch.equal(read(pipe), fused)
    pipe.unet = own
    diffusion.unfuse(pipe)
    diffusion.unload(pipe)
    assert torch.equal(read(pipe), plain)

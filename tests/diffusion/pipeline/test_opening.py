"""Pipelines opened from folders, with weights of several variants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from comcat.diffusion import generate, load_pipeline
from comcat.diffusion.pipeline.offloading import comes_in_parts
from comcat.errors import ModelError

from .. import tiny


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path)


def weights(pipe: Any) -> list[torch.Tensor]:
    return [p.detach() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def test_a_folder_of_the_fp16_variant_alone_opens(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved", variant="fp16")
    assert (tmp_path / "saved/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert same(load_pipeline(tmp_path / "saved"), pipe)
    assert same(load_pipeline(tmp_path / "saved", variant="fp16"), pipe)


def test_sharded_weights_of_a_variant_open(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "saved/unet").glob("*.fp16-*.safetensors"))) > 1
    assert same(load_pipeline(tmp_path / "saved"), pipe)


def test_weights_without_a_variant_are_read_unless_one_is_named(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    plain = load_pipeline(tmp_path / "saved")
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(2)
    pipe.save_pretrained(tmp_path / "saved", variant="ema")
    assert same(load_pipeline(tmp_path / "saved"), plain)
    assert same(load_pipeline(tmp_path / "saved", variant="ema"), pipe) and not same(plain, pipe)


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        ([None], "fp16", "has no weights of the variant 'fp16'; it has one set of weights alone"),
        (["fp16"], "fp61", "no weights of the variant 'fp61'; did you mean 'fp16'?; there are fp16"),
        (["fp16", "ema"], None, r"has weights of the variants ema, fp16; say which to read (variant)"),
    ],
)
def test_a_variant_that_is_not_there_is_told(
    pipe: Any, tmp_path: Path, saved: list[str | None], wanted: str | None, said: str
) -> None:
    for variant in saved:
        pipe.save_pretrained(tmp_path / "saved", variant=variant)
    with pytest.raises(ModelError, match=re.escape(said)):
        load_pipeline(tmp_path / "saved", variant=wanted)


def test_the_command_line_takes_a_variant(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from comcat.cli import main

    pipe.save_pretrained(tmp_path / "saved", variant="ema")
    how = ["--prompt", "a dog", "--steps", "1", "--size", "16", "--device", "cpu", "--out", str(tmp_path / "made")]
    assert main(["generate", str(tmp_path / "saved"), "--variant", "ema", *how]) == 0
    assert main(["generate", str(tmp_path / "saved"), "--variant", "fp16", *how]) == 1
    assert "no weights of the variant 'fp16'" in capsys.readouterr().err


def test_an_offloaded_denoiser_gives_the_same_pictures(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    pictures = []
    for offload in (False, True):
        opened = load_pipeline(tmp_path / "saved", offload=offload)
        assert comes_in_parts(opened.unet) is offload
        assert not comes_in_parts(opened.text_encoder)
        pictures += [one.image.tobytes() for one in generate(opened, "a dog", steps=2, size=16)]
    assert pictures[0] == pictures[1]

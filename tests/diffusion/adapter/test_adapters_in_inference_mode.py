"""Adapters that come, go and are written within ``torch.inference_mode`` learn and pass gradients outside of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion

from .. import tiny


def gradient(pipe: Any) -> Tensor:
    """Of the prediction with respect to the latents."""
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    pipe.unet(x, torch.tensor(1), torch.ones(1, 5, 16))[0].square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_what_is_attached_there_learns(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    with torch.inference_mode():
        adapter = diffusion.attach(pipe, init="random")
    gradient(pipe)
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("verb", ["load", "fuse", "unfuse", "merge", "unload"])
def test_gradients_pass_what_was_done_there(verb: str, tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    diffusion.attach(pipe, init="random", text_encoder=True)
    row = {"sks": torch.ones(16)}
    file = diffusion.save(pipe, tmp_path / "dog.safetensors", identifier="sks", token_embeddings=row)
    diffusion.unload(pipe)
    before = {"load": [], "fuse": ["load"], "unfuse": ["load", "fuse"]}.get(verb, ["load"])
    does: dict[str, Any] = {
        "load": lambda: diffusion.load(pipe, file), "merge": lambda: diffusion.merge(pipe, "dog"),
        "fuse": lambda: diffusion.fuse(pipe), "unfuse": lambda: diffusion.unfuse(pipe),
        "unload": lambda: diffusion.unload(pipe),
    }  # fmt: skip
    for earlier in before:
        does[earlier]()
    with torch.inference_mode():
        does[verb]()
    assert gradient(pipe).any()
    assert not any(p.is_inference() for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))

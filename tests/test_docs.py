"""Every Python block of the README and the docs runs."""

import re
from pathlib import Path

import pytest
import torch

import comcat

from .diffusion.tiny import stable_diffusion
from .models import pictures, tiny_vit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    assert sum(len(BLOCK.findall(p.read_text())) for p in PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    import timm

    make = timm.create_model

    def small_instead(name, pretrained=False, **arguments):
        """The architectures that the pages name, without a download and small enough for a test."""
        tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        return make("vit_tiny_patch16_224", **{**tiny, **arguments})

    monkeypatch.chdir(tmp_path)
    if page.name in ("README.md", "segmenter.md"):
        monkeypatch.setattr(timm, "create_model", small_instead)
    names = {
        "comcat": comcat,
        "torch": torch,
        "model": tiny_vit(num_classes=10),
        "loader": pictures(),
        "held_out": pictures(32, 16, seed=3),
        "pipe": stable_diffusion(tmp_path / "pipe"),
    }
    for block in BLOCK.findall(page.read_text()):
        block = re.sub(r"^(.*) +# or comcat\.load\(.*$", r"\1", block, flags=re.MULTILINE)
        exec(compile(block, str(page), "exec"), names)

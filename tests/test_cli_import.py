"""``comcat import``: what the paper's code has written, as a user types it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import comcat
from comcat.cli import main

from .diffusion.adapter.test_paper_adapter import paper_list, sd1_shaped
from .test_store import RANKS, deit, paper_model


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = deit()
    torch.save({"model": paper_model(base).state_dict()}, tmp_path / "checkpoint.pth")
    (tmp_path / "ranks.txt").write_text(RANKS)
    monkeypatch.setattr("comcat.store.paper.load_model", lambda *_, **__: copy.deepcopy(base))
    return tmp_path / "checkpoint.pth"


def test_a_checkpoint_becomes_a_folder(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["import", str(checkpoint), "--ranks", str(tmp_path / "ranks.txt"), "--out", str(tmp_path / "small")]
    assert main(words) == 0
    said, small = capsys.readouterr().out, comcat.load(tmp_path / "small")
    assert f"{comcat.count_parameters(small):,} parameters" in said
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = comcat.import_paper(checkpoint, None, deit())(images)
        assert torch.allclose(small(images), expected, atol=1e-5)
    assert main(words) == 1 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_an_adapter_becomes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    unet: Any = sd1_shaped()
    monkeypatch.setattr("comcat.diffusion.load_pipeline", lambda spec: {"a/pipe": unet}[spec])
    weights, by_path = paper_list(unet, rank=2)
    torch.save(weights, tmp_path / "comcat_weight.pt")
    words = ["import", str(tmp_path / "comcat_weight.pt"), "--out", str(tmp_path / "dog.safetensors")]
    assert main(words) == 1 and "expected --pipeline" in capsys.readouterr().err
    words += ["--pipeline", "a/pipe"]
    assert main(words) == 0
    assert f"rank 2 on {len(by_path)} attentions" in capsys.readouterr().out
    comcat.diffusion.unload(unet)
    adapter = comcat.diffusion.load(unet, tmp_path / "dog.safetensors")
    path, (q, *_) = next(iter(by_path.items()))
    assert torch.allclose(adapter.terms[f"unet.{path}"].q_up, q, atol=1e-2)
    assert main(words) == 1 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.pth", "--out", "small"], "there is no file 'none.pth'"),
        (["none.pth", "--out", "small", "--pipeline", "a/b"], "expected FILE.safetensors"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(words: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", *words]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())

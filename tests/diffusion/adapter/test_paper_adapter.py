"""The format of the paper's published code: a plain list of weights, in the order of its loops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.errors import ModelError, SettingsError, StoreError

from .. import reference
from ..denoisers import CASES, random, sd1_shaped, unet_arguments


def paper_list(unet: Any, rank: int) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Weights as its code collects them, by hand: down 0–2, up 1–3, mid; and the same by path."""
    torch.manual_seed(0)
    weights: list[Tensor] = []
    by_path: dict[str, list[Tensor]] = {}
    paths = {id(m): n for n, m in unet.named_modules()}
    for block in [*unet.down_blocks[:3], *unet.up_blocks[1:4], unet.mid_block]:
        for transformer in block.attentions:
            for inner in transformer.transformer_blocks:
                for attn in (inner.attn1, inner.attn2):
                    layers = [
                        nn.Linear(p.in_features, rank * attn.heads, bias=False)
                        for p in (attn.to_q, attn.to_k, attn.to_v)
                    ]
                    layers.append(nn.Linear(rank * attn.heads, attn.to_out[0].out_features, bias=False))
                    by_path[paths[id(attn)]] = [layer.weight for layer in layers]
                    weights += by_path[paths[id(attn)]]
    return weights, by_path


@torch.no_grad()
def test_the_order_of_the_list_and_what_it_computes(tmp_path: Path) -> None:
    unet: Any = sd1_shaped().eval()
    weights, by_path = paper_list(unet, rank=2)
    torch.save(weights, tmp_path / "comcat_weight.pt")  # parameters, as its code saves them
    adapter = diffusion.import_paper(tmp_path / "comcat_weight.pt", unet, name="dog")
    assert adapter.rank == 2 and adapter.name == "dog" and len(adapter.modules) == len(by_path)
    for path, (q, k, v, out) in by_path.items():
        terms = adapter.terms[f"unet.{path}"]
        for own, theirs in ((terms.q_up, q), (terms.k_down, k), (terms.v_down, v), (terms.out_up, out)):
            assert own.equal(theirs)
        assert terms.strength == 1
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    attn, (q, k, v, out) = unet.get_submodule(path), by_path[path]
    x, text = random(1, 4, 8), random(1, 5, 12, seed=1)
    heads, scale = attn.heads, (attn.to_q.out_features // attn.heads) ** -0.5
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731  (batch, heads, tokens, channels)
    weighs = (split(attn.to_q(x)) @ split(attn.to_k(text)).mT + split(x @ q.mT) @ split(text @ k.mT).mT) * scale
    weighs = weighs.softmax(-1)
    expected = attn.to_out[0]((weighs @ split(attn.to_v(text))).transpose(1, 2).flatten(2))
    expected = expected + (weighs @ split(text @ v.mT)).transpose(1, 2).flatten(2) @ out.mT
    got = attn(x, encoder_hidden_states=text)
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(got, reference.plain(attn, x, text, [adapter.terms[f"unet.{path}"]]), atol=1e-6)
    before = unet(**unet_arguments()).sample
    saved = diffusion.save(unet, tmp_path / "dog.safetensors", name="dog", dtype=torch.float32)
    diffusion.unload(unet)
    diffusion.load(unet, saved)
    assert unet(**unet_arguments()).sample.equal(before)


def test_what_does_not_fit_or_is_no_such_list(tmp_path: Path) -> None:
    unet: Any = sd1_shaped()
    weights, _ = paper_list(unet, rank=2)
    file = tmp_path / "comcat_weight.pt"
    with pytest.raises(StoreError, match="there is no file"):
        diffusion.import_paper(file, unet, name="dog")
    for content, message in (
        (
            weights[:-4],
            rf"holds {len(weights) - 4} tensors, expected {len(weights)}: 4 for each of the {len(weights) // 4} "
            rf"attentions",
        ),
        ([*weights[:-1], torch.ones(3)], "number [0-9]+ of its [0-9]+ tensors is \\(3,\\), expected a matrix"),
        ([*weights[:-1], weights[-1] * float("nan")], "holds NaN or infinity"),
        ([weights[1], *weights[1:]], "does not fit this model"),
        ([*weights[:1], weights[2][:, :-1], *weights[2:]], r"k_down is \(4, 3\), expected \(4, 4\)"),
        ({"a": weights[0]}, "holds a dict, expected a list of tensors"),
        ([], "expected a list of tensors"),
    ):
        torch.save(content, file)
        if message == "does not fit this model" and weights[0].shape == weights[1].shape:
            continue
        with pytest.raises(StoreError, match=message):
            diffusion.import_paper(file, unet, name="dog")
    file.write_text("hello")
    with pytest.raises(StoreError, match="is refused: no tensors can be read from it"):
        diffusion.import_paper(file, unet, name="dog")
    assert diffusion.adapters(unet) == {}
    torch.save(weights, file)
    with pytest.raises(ModelError, match="got a SD3Transformer2DModel, expected a UNet"):
        diffusion.import_paper(file, CASES["sd3"].model(), name="dog")
    with pytest.raises(StoreError, match="tensors, expected 32"):
        diffusion.import_paper(file, CASES["sd1"].model(), name="dog")
    diffusion.import_paper(file, unet, name="dog")
    with pytest.raises(SettingsError, match="'dog' already"):
        diffusion.import_paper(file, unet, name="dog")


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([Harmful()], tmp_path / "comcat_weight.pt")
    with pytest.raises(StoreError, match=r"it holds (posix|os).system, and only tensors are read"):
        diffusion.import_paper(tmp_path / "comcat_weight.pt", sd1_shaped(), name="dog")
    assert not (tmp_path / "harmed").exists()

"""Whole pipelines with adapters: pictures, text encoders, learned tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import SettingsError, StoreError

from .. import tiny

PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
    "sd35": lambda folder: tiny.stable_diffusion_3(folder, qk_norm="rms_norm"),
    "flux": tiny.flux,
}
WHERE: dict[str, Any] = {"sd": "all", "sdxl": "all", "sd3": "joint", "sd35": "joint", "flux": "joint"}


def draw(pipe: Any, prompt: str = "a photo of a dog") -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, height=16, width=16, output_type="np").images


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_before_with_and_after_an_adapter(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name](tmp_path)
    before = draw(pipe)
    diffusion.attach(pipe, where=WHERE[name], text_encoder=True)
    assert np.allclose(draw(pipe), before, atol=1e-5)
    diffusion.unload(pipe)
    assert np.array_equal(draw(pipe), before)
    adapter = diffusion.attach(pipe, where=WHERE[name], text_encoder=True, init="random", name="dog")
    with_dog = draw(pipe)
    assert not np.allclose(with_dog, before, atol=1e-5)
    path = diffusion.save(pipe, tmp_path / "dog.safetensors", name="dog", dtype=torch.float32)
    assert {p.partition(".")[0] for p in adapter.modules} >= {
        "text_encoder",
        "transformer" if hasattr(pipe, "transformer") else "unet",
    }
    diffusion.unload(pipe)
    assert np.array_equal(draw(pipe), before)
    diffusion.load(pipe, path)
    assert np.array_equal(draw(pipe), with_dog)


@torch.no_grad()
def test_a_text_encoder_computes_equation_8(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.text_encoder.double()
    adapter = diffusion.attach(pipe, text_encoder=True, init="random", rank=3, dtype=torch.float64)
    path = "encoder.layers.1.self_attn"
    attn, terms = pipe.text_encoder.get_submodule(path), adapter.terms[f"text_encoder.{path}"]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    got = attn(x, attention_mask=mask.expand(2, 1, 5, 5))[0]
    own = copy.deepcopy(attn)
    expected: Any = own.out_proj.base.bias
    for i in range(2):
        rows, extra = slice(8 * i, 8 * i + 8), slice(3 * i, 3 * i + 3)
        q, k, v = (p.base(x)[..., rows] for p in (own.q_proj, own.k_proj, own.v_proj))
        logits = q @ k.mT + (x @ terms.q_up[extra].mT) @ (x @ terms.k_down[extra].mT).mT
        value = v @ own.out_proj.base.weight[:, rows].mT + x @ terms.v_down[extra].mT @ terms.out_up[:, extra].mT
        expected = expected + (logits * 8**-0.5 + mask).softmax(-1) @ value
    assert float((got - expected).abs().max()) < 1e-12


@torch.no_grad()
def test_several_adapters_on_a_text_encoder(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    ids = pipe.tokenizer("a photo", padding="max_length", return_tensors="pt").input_ids
    encode = lambda: pipe.text_encoder(ids).last_hidden_state  # noqa: E731
    before, state = encode(), copy.deepcopy(pipe.text_encoder.state_dict())
    diffusion.attach(pipe, text_encoder=True, init="random", name="dog")
    dog = encode()
    diffusion.attach(pipe, text_encoder=True, init="random", name="cat", rank=3, seed=1)
    assert not torch.allclose(encode(), dog, atol=1e-4)
    copied = copy.deepcopy(pipe.text_encoder)
    diffusion.set_scale(pipe, cat=0)
    assert torch.allclose(encode(), dog, atol=1e-6)
    assert not torch.allclose(copied(ids).last_hidden_state, dog, atol=1e-4)
    diffusion.unload(pipe, "cat")
    assert encode().equal(dog)
    diffusion.unload(pipe)
    assert encode().equal(before) and list(pipe.text_encoder.state_dict()) == list(state)
    assert all(v.equal(state[k]) for k, v in pipe.text_encoder.state_dict().items())


def test_an_adapter_in_several_models_belongs_to_the_pipeline(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    diffusion.attach(pipe, text_encoder=True)
    for use in (
        lambda: diffusion.adapters(pipe.unet),
        lambda: diffusion.save(pipe.unet, tmp_path / "dog.safetensors"),
        lambda: diffusion.fuse(pipe.unet),
        lambda: diffusion.unload(pipe.unet),
    ):
        with pytest.raises(
            SettingsError, match="acts in the text_encoder as well: give the pipeline, not its unet alone"
        ):
            use()
    diffusion.fuse(pipe)
    with pytest.raises(SettingsError, match="give the pipeline"):
        diffusion.unfuse(pipe.unet)
    diffusion.unfuse(pipe)
    pipe.text_encoder = None
    with pytest.raises(SettingsError, match="'default' has lost text_encoder, which the pipeline no longer has"):
        diffusion.save(pipe, tmp_path / "dog.safetensors")
    diffusion.unload(pipe)
    assert diffusion.adapters(pipe) == {}


def test_lora_on_a_text_encoder(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = tiny.stable_diffusion(tmp_path)
    ids = pipe.tokenizer("a photo", padding="max_length", return_tensors="pt").input_ids
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "out_proj"], init_lora_weights=False))
    with torch.no_grad():
        with_lora = pipe.text_encoder(ids).last_hidden_state
        diffusion.attach(pipe, text_encoder=True)
        assert torch.allclose(pipe.text_encoder(ids).last_hidden_state, with_lora, atol=1e-5)
        diffusion.unload(pipe)
        assert pipe.text_encoder(ids).last_hidden_state.equal(with_lora)


def with_token(pipe: Any, path: Path, rows: dict[str, Tensor], identifier: str = "sks") -> Path:
    diffusion.attach(pipe, where=WHERE["sdxl" if hasattr(pipe, "tokenizer_2") else "sd"], init="random")
    prompt = f"a photo of {identifier} dog"
    diffusion.save(pipe, path, identifier=identifier, prompt=prompt, token_embeddings=rows, dtype=torch.float32)
    diffusion.unload(pipe)
    return path


def test_a_learned_token_comes_and_goes_with_its_adapter(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    tokenizer, embedding, vocabulary = (
        pipe.tokenizer,
        pipe.text_encoder.get_input_embeddings(),
        pipe.text_encoder.config.vocab_size,
    )
    before, row = draw(pipe, "a photo of sks dog"), torch.randn(16)
    path = with_token(pipe, tmp_path / "dog.safetensors", {"sks": row})
    assert diffusion.read(path).token_embeddings["text_encoder.sks"].equal(row)
    diffusion.load(pipe, path, scale=0.0)
    token = pipe.tokenizer.convert_tokens_to_ids("sks")
    assert pipe.text_encoder.get_input_embeddings().weight[token].equal(row)
    assert (
        token in pipe.tokenizer("a photo of sks dog").input_ids
        and token not in pipe.tokenizer("a photo of dog").input_ids
    )
    assert not np.allclose(draw(pipe, "a photo of sks dog"), before, atol=1e-6)
    diffusion.load(pipe, path, name="rex", rename_identifier="rex")
    assert {"sks", "rex"} <= set(pipe.tokenizer.get_vocab()) and pipe.tokenizer is tokenizer
    record = diffusion.adapters(pipe)["rex"].record
    assert record.identifier == "rex" and record.prompt == "a photo of rex dog"  # what calls it now
    diffusion.unload(pipe, "dog")
    assert "sks" not in pipe.tokenizer.get_vocab() and "rex" in pipe.tokenizer.get_vocab()
    diffusion.unload(pipe)
    assert pipe.tokenizer is tokenizer and pipe.text_encoder.get_input_embeddings() is embedding
    assert pipe.text_encoder.config.vocab_size == vocabulary
    assert np.array_equal(draw(pipe, "a photo of sks dog"), before)


def test_tokens_of_two_text_encoders(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_xl(tmp_path)
    rows = {"sks": torch.randn(16), "text_encoder_2.sks": torch.randn(16)}
    path = with_token(pipe, tmp_path / "dog.safetensors", rows)
    diffusion.load(pipe, path)
    for tokenizer, encoder, row in (
        (pipe.tokenizer, pipe.text_encoder, rows["sks"]),
        (pipe.tokenizer_2, pipe.text_encoder_2, rows["text_encoder_2.sks"]),
    ):
        assert encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("sks")].equal(row)


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    path = with_token(pipe, tmp_path / "dog.safetensors", {"sks": torch.randn(16)})
    with pytest.raises(
        StoreError,
        match="a token 'sks' was learned for the text_encoder, which is not there; load the adapter into the whole",
    ):
        diffusion.load(pipe.unet, path)
    wide = with_token(pipe, tmp_path / "wide.safetensors", {"sks": torch.randn(20)})
    with pytest.raises(StoreError, match=r"the embedding of 'sks' is \(20,\), expected \(16,\)"):
        diffusion.load(pipe, wide)
    known = with_token(pipe, tmp_path / "known.safetensors", {"dog</w>": torch.randn(16)}, "dog</w>")
    with pytest.raises(SettingsError, match="tokenizer has a token 'dog</w>' already; rename_identifier"):
        diffusion.load(pipe, known)
    diffusion.load(pipe, path)
    with pytest.raises(SettingsError, match=r"'dog' answers to 'sks' already.*load it with rename_identifier='…'"):
        diffusion.load(pipe, path, name="other")
    with pytest.raises(SettingsError, match="tokenizer has a token 'dog</w>' already"):
        diffusion.load(pipe, path, name="other", rename_identifier="dog</w>")
    assert list(diffusion.adapters(pipe)) == ["dog"]


def test_a_pipeline_s_name_is_noted(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    diffusion.attach(pipe)
    assert diffusion.read(diffusion.save(pipe, tmp_path / "dog.safetensors")).base == str(tmp_path / "saved")

"""Tokens of adapters beside those that others add to the same tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import ModelError

from .. import tiny

SKS, CAT = torch.linspace(-1, 1, 16), torch.linspace(2, 3, 16)


def adapter_file(pipe: Any, path: Path, identifier: str, row: Tensor) -> Path:
    diffusion.attach(pipe, init="random")
    diffusion.save(pipe, path, identifier=identifier, token_embeddings={identifier: row}, dtype=torch.float32)
    diffusion.unload(pipe)
    return path


def embedded(pipe: Any, token: str) -> Tensor:
    number = pipe.tokenizer.convert_tokens_to_ids(token)
    assert pipe.tokenizer(f"a {token}").input_ids[-2] == number  # one token
    return pipe.text_encoder.get_input_embeddings().weight[number].detach()


def invert(pipe: Any, token: str = "<cat>", row: Tensor = CAT) -> None:
    pipe.load_textual_inversion({token: row}, token=token)


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path)


@pytest.fixture
def dog(pipe: Any, tmp_path: Path) -> Path:
    return adapter_file(pipe, tmp_path / "dog.safetensors", "sks", SKS)


def test_unload_keeps_the_token_of_a_textual_inversion_that_came_since(pipe: Any, dog: Path) -> None:
    plain = pipe.tokenizer("a photo of sks").input_ids
    rows = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    diffusion.load(pipe, dog)
    invert(pipe)
    diffusion.unload(pipe)
    assert embedded(pipe, "<cat>").equal(CAT) and pipe.tokenizer("a photo of sks").input_ids == plain
    assert pipe.text_encoder.get_input_embeddings().weight[: len(rows)].equal(rows)
    assert len(pipe.tokenizer) == len(rows) + 1 == pipe.text_encoder.config.vocab_size
    diffusion.load(pipe, dog)
    assert embedded(pipe, "<cat>").equal(CAT) and embedded(pipe, "sks").equal(SKS)


def test_unload_keeps_a_token_that_add_tokens_added_since(pipe: Any, dog: Path) -> None:
    diffusion.load(pipe, dog)
    pipe.tokenizer.add_tokens("<new>")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-1] = CAT
    diffusion.unload(pipe)
    assert embedded(pipe, "<new>").equal(CAT) and "sks" not in pipe.tokenizer.get_vocab()


def test_loading_another_adapter_keeps_the_token_of_a_textual_inversion(pipe: Any, dog: Path, tmp_path: Path) -> None:
    rex = adapter_file(pipe, tmp_path / "rex.safetensors", "rex", -SKS)
    diffusion.load(pipe, dog)
    invert(pipe)
    number = pipe.tokenizer.convert_tokens_to_ids("<cat>")
    diffusion.load(pipe, rex)
    assert pipe.tokenizer.convert_tokens_to_ids("<cat>") == number
    for token, row in (("sks", SKS), ("<cat>", CAT), ("rex", -SKS)):
        assert embedded(pipe, token).equal(row)
    diffusion.unload(pipe, "dog")
    assert embedded(pipe, "<cat>").equal(CAT) and embedded(pipe, "rex").equal(-SKS)


def test_a_textual_inversion_that_was_unloaded_meanwhile_does_not_come_back(pipe: Any, dog: Path) -> None:
    invert(pipe)
    diffusion.load(pipe, dog)
    pipe.unload_textual_inversion("<cat>")
    assert embedded(pipe, "sks").equal(SKS)
    diffusion.unload(pipe)
    assert not {"<cat>", "sks"} & set(pipe.tokenizer.get_vocab())


def test_embeddings_that_were_trained_meanwhile_stay(pipe: Any, dog: Path) -> None:
    diffusion.load(pipe, dog)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[5] = CAT
    diffusion.unload(pipe)
    assert pipe.text_encoder.get_input_embeddings().weight[5].equal(CAT)


def test_a_token_that_unload_textual_inversion_took_away_is_missed(pipe: Any, dog: Path) -> None:
    diffusion.load(pipe, dog)
    pipe.unload_textual_inversion()  # all that are not special, ours as well
    with pytest.raises(ModelError, match=r"'dog' has lost its token 'sks'.*unload\(\) the adapter, and load it again"):
        diffusion.adapters(pipe)
    diffusion.unload(pipe)
    diffusion.load(pipe, dog)
    assert embedded(pipe, "sks").equal(SKS)


@pytest.mark.parametrize("pipeline_first", [True, False], ids=["pipeline-first", "adapter-first"])
def test_pipelines_of_the_same_parts_know_the_same_tokens(pipe: Any, dog: Path, pipeline_first: bool) -> None:
    """``from_pipe`` shares all parts: what one pipeline loads or unloads acts in the other's model as well."""
    from diffusers import StableDiffusionImg2ImgPipeline

    own = pipe.tokenizer("a photo of sks").input_ids
    if pipeline_first:
        other: Any = StableDiffusionImg2ImgPipeline(**pipe.components)
        diffusion.load(pipe, dog)
    else:
        diffusion.load(pipe, dog)
        other = StableDiffusionImg2ImgPipeline(**pipe.components)
    assert torch.equal(embedded(other, "sks"), SKS) and list(diffusion.adapters(other)) == ["dog"]
    diffusion.unload(other)
    assert pipe.tokenizer("a photo of sks").input_ids == other.tokenizer("a photo of sks").input_ids == own
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer)


def test_text_encoders_that_read_by_one_tokenizer_have_each_their_own_tokens(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_xl(tmp_path)
    pipe.tokenizer_2 = pipe.tokenizer
    diffusion.attach(pipe, init="random")
    file = diffusion.save(pipe, tmp_path / "dog.safetensors", identifier="sks", token_embeddings={"sks": SKS})
    diffusion.unload(pipe)
    own = pipe.tokenizer("sks").input_ids
    diffusion.load(pipe, file)
    assert torch.equal(embedded(pipe, "sks"), SKS)
    assert pipe.tokenizer_2("sks").input_ids == own  # its encoder has no such row
    diffusion.unload(pipe)
    assert pipe.tokenizer("sks").input_ids == own

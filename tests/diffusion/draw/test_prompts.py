"""Where a prompt reaches the concept, and where it only looks as if it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import comcat.diffusion as diffusion
from comcat.diffusion.draw.prompts import calls, check_heard, check_prompt, notes_on_calls
from comcat.diffusion.pipeline.families import family_of
from comcat.errors import SettingsError

from .. import tiny

LONG = "a photo of a dog a photo of a dog"  # 10 tokens, and the tiny tokenizers read 12 with their two marks
QUICK: dict[str, Any] = {"steps": 1, "crops": 1}


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path)


@pytest.mark.parametrize("prompt", ["a photo of V*", "V*, a dog", "my V*'s dog", "(V*)", "V* dog", "a-V*-dog"])
def test_an_identifier_is_a_word_of_its_own(prompt: str) -> None:
    assert calls(prompt, "V*")
    check_prompt(prompt, "V*")


@pytest.mark.parametrize("prompt", ["a photo of XV*Y dog", "V*s", "aV*"])
def test_an_identifier_that_is_glued_to_other_characters_is_refused(prompt: str, pipe: Any) -> None:
    with pytest.raises(
        SettingsError, match=r"'V\*' is glued to other characters; expected for example 'a photo of V\*"
    ):
        diffusion.customize(pipe, tiny.pictures(), prompt=prompt, **QUICK)


def test_an_identifier_past_the_last_token_that_is_read_is_refused(pipe: Any) -> None:
    with pytest.raises(SettingsError, match=r"'V\*' comes after the 12 tokens that the pipeline reads.*shorter prompt"):
        diffusion.customize(pipe, tiny.pictures(), prompt=f"{LONG} V*", **QUICK)
    assert diffusion.adapters(pipe) == {}


def test_the_last_token_that_is_read_may_be_the_identifier(pipe: Any) -> None:
    family = family_of(pipe)
    assert check_heard(family, "a photo of a dog a photo of V*", "V*") == []  # two pieces: 12 tokens
    with pytest.raises(SettingsError, match="comes after"):
        check_heard(family, f"a {LONG[:-4]} V*", "V*")
    assert check_heard(family, f"{LONG[:-4]} V*", "V*", one_token=True) == []


def test_a_text_encoder_that_reads_more_than_another_is_enough(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_3(tmp_path)
    notes = check_heard(family_of(pipe), f"{LONG} V*", "V*")
    assert [note.split(" of a prompt")[0] for note in notes] == [
        "The text_encoder reads 12 tokens",
        "The text_encoder_2 reads 12 tokens",
    ]
    assert family_of(pipe).prompt_lengths()["text_encoder_3"] == 256


def test_prompts_to_generate_from_that_never_reach_the_adapter_are_noted(pipe: Any) -> None:
    assert notes_on_calls(pipe, ["a dog", "a photo of V*"], "V*") == []
    assert notes_on_calls(pipe, ["a dog"], "V*") == ["No prompt contains 'V*'."]
    assert notes_on_calls(pipe, ["aV*"], "V*") == ["No prompt contains 'V*' as a word of its own."]
    (note,) = notes_on_calls(pipe, [f"{LONG} V*", "V*"], "V*")
    assert note.startswith("The pipeline cuts a prompt off before it comes to 'V*'")

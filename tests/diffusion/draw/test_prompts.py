"""Where a prompt reaches the concept, and where it only looks as if it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import comcat.diffusion as diffusion
from comcat.diffusion.draw.prompts import (
    calls,
    check_heard,
    check_prompt,
    notes_before_drawing,
    notes_on_calls,
    notes_on_lengths,
)
from comcat.diffusion.learn.beforehand import notes_on_prompts
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import family_of
from comcat.errors import SettingsError

from .. import tiny
from ..newer import NEWER

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


@pytest.mark.parametrize("identifier", [None, 3, " "])
def test_an_identifier_is_a_text(identifier: Any, pipe: Any) -> None:
    with pytest.raises(SettingsError, match=r"got identifier .*, expected a word such as"):
        diffusion.customize(pipe, tiny.pictures(), prompt="a photo of V*", identifier=identifier, **QUICK)


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


def test_the_end_of_a_prompt_that_is_not_read_is_told(pipe: Any) -> None:
    assert notes_before_drawing(pipe, ["a photo of a dog a photo of a cat", "a photo of V* dog"]) == []  # 12 tokens
    (note,) = notes_before_drawing(pipe, [f"{LONG} red cat"])
    assert note.startswith("Too long for text_encoder, which reads 12 tokens") and note.endswith("read 'red cat'.")
    family = family_of(pipe)
    assert len(notes_on_lengths(family, ["V* V* a photo of a dog a red"])) == 1
    assert notes_on_lengths(family, ["V* V* a photo of a dog a red"], one_token="V*") == []


@pytest.mark.parametrize("setting", ["prompt", "protect", "prior_prompt", "sample_prompt"])
def test_before_a_run_all_of_its_prompts_are_looked_at(setting: str, pipe: Any) -> None:
    long = f"V* {LONG} dog cat" if setting in ("prompt", "sample_prompt") else f"{LONG} red dog cat"
    given: dict[str, Any] = {"prompt": "V* dog", "sample_every": 1, "sample_steps": 1}
    given |= {setting: (long,) if setting == "protect" else long}
    settings = CustomizeSettings(**{k: v for k, v in given.items() if k != "prompt"})
    (note,) = [n for n in notes_on_prompts(family_of(pipe), [given["prompt"]], "V*", settings) if "Too long" in n]
    assert note.endswith("dog cat'.")


def test_samples_that_do_not_call_the_concept_are_told(pipe: Any) -> None:
    family = family_of(pipe)
    for prompt, said in (("a dog", True), ("V* dog", False), (None, False)):
        settings = CustomizeSettings(sample_every=1, sample_prompt=prompt)
        notes = notes_on_prompts(family, ["a photo of V* dog"], "V*", settings)
        assert any("does not call 'V*'" in note for note in notes) == said


def test_an_identifier_that_no_tokenizer_has_a_piece_of_is_refused(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_3(tmp_path)
    family = family_of(pipe)
    assert not any("knows nothing" in note for note in check_heard(family, "a V* dog", "V*"))
    (note,) = check_heard(family, "a zebra dog", "zebra")  # CLIP spells it, the third knows whole words alone
    assert note == "The text_encoder_3's tokenizer knows nothing of the identifier 'zebra'."
    pipe = NEWER["pixart"](tmp_path)  # has that kind alone
    with pytest.raises(SettingsError, match=r"know nothing of the identifier 'zebra'.*new_token"):
        check_heard(family_of(pipe), "a zebra dog", "zebra")
    assert check_heard(family_of(pipe), "a zebra dog", "zebra", one_token=True) == []

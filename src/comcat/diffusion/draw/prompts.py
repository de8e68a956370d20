"""Prompts: the identifier in them, what the tokenizers make of it, and files of prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, SettingsError
from ..pipeline.families import Family


def check_prompt(prompt: str, identifier: str) -> None:
    """Raises SettingsError unless the prompt contains the identifier, in the same spelling."""
    if not identifier.strip():
        raise SettingsError(f"got identifier {identifier!r}, expected a word such as 'V*'")
    if identifier not in prompt:
        spelling = " (case matters)" if identifier.lower() in prompt.lower() else ""
        raise SettingsError(
            f"got prompt {prompt!r}, which does not contain the identifier {identifier!r}{spelling}; expected for "
            "example "
            f"'a photo of {identifier} dog'"
        )


def check_other_prompts(identifier: str, prompts: Mapping[str, Sequence[str]]) -> None:
    """Raises SettingsError if a prompt of what shall stay as it is, by the setting that names it, calls the concept."""
    word = re.compile(rf"(?<!\w){re.escape(identifier)}(?!\w)")
    for setting, named in prompts.items():
        for prompt in named:
            if word.search(prompt):
                raise SettingsError(
                    f"{setting}: got {prompt!r}, which contains the identifier {identifier!r}; expected a prompt "
                    "without "
                    "the concept, which shall stay as it is"
                )


def pieces(tokenizer: Any, word: str) -> list[str]:
    """What a tokenizer splits a word into; one piece if it knows it."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return [tokenizer.decode([i]).strip() or tokenizer.convert_ids_to_tokens(i) for i in ids]


def splitting_notes(family: Family, identifier: str) -> list[str]:
    """A sentence for each tokenizer that does not know the identifier as one token."""
    said: dict[str, list[str]] = {}
    for component, (tokenizer, _) in family.text_encoders().items():
        found = pieces(tokenizer, identifier)
        if len(found) > 1:
            said.setdefault(" + ".join(map(repr, found)), []).append(component.replace("text_encoder", "tokenizer"))
    return [
        f"{' and '.join(names)} of the pipeline splits the identifier {identifier!r} into {parts}: prompts with those "
        "pieces will change a little as well; new_token gives it a token of its own."
        for parts, names in said.items()
    ]


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        DataError: if the file cannot be read or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {str(path)!r} cannot be read: {error}") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one a line")
    return list(dict.fromkeys(prompts))

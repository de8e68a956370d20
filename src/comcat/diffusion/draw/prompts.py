"""Prompts: the identifier in them, what the tokenizers make of it, and files of prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, ModelError, SettingsError, in_short
from ...files import home_path
from ..pipeline.families import Family, family_of


def calls(prompt: str, identifier: str) -> bool:
    """Whether a prompt contains the identifier as a word of its own, in the same spelling."""
    return _call(prompt, identifier) is not None


def _call(prompt: str, identifier: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(identifier)}(?!\w)", prompt)


def texts(given: str | Iterable[str], what: str) -> list[str]:
    """One text or several as a list. Raises SettingsError for anything else."""
    if isinstance(given, str):
        return [given]
    several: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if odd := [one for one in several if not isinstance(one, str)]:
        raise SettingsError(f"{what}: got {in_short(odd[0])} ({type(odd[0]).__name__}), expected a text or several")
    return several


def prompts_given(prompt: str | Sequence[str], identifier: str) -> list[str]:
    """One prompt or several as a list. Raises SettingsError unless each calls the identifier."""
    given = texts(prompt, "prompt")
    for one in given:
        check_prompt(one, identifier)
    return given


def check_prompt(prompt: str, identifier: str) -> None:
    """Raises SettingsError unless the prompt calls the identifier."""
    if not identifier.strip():
        raise SettingsError(f"got identifier {identifier!r}, expected a word such as 'V*'")
    if calls(prompt, identifier):
        return
    expected = f"expected for example 'a photo of {identifier} dog'"
    if identifier in prompt:
        raise SettingsError(
            f"got prompt {prompt!r}, in which the identifier {identifier!r} is glued to other characters; {expected}"
        )
    spelling = " (case matters)" if identifier.lower() in prompt.lower() else ""
    raise SettingsError(
        f"got prompt {prompt!r}, which does not contain the identifier {identifier!r}{spelling}; {expected}"
    )


def check_other_prompts(identifier: str, prompts: Mapping[str, Sequence[str]]) -> None:
    """Raises SettingsError if a prompt of what shall stay as it is, by the setting that names it, calls the concept."""
    for setting, named in prompts.items():
        for prompt in named:
            if calls(prompt, identifier):
                raise SettingsError(
                    f"{setting}: got {prompt!r}, which contains the identifier {identifier!r}; expected a prompt "
                    "without the concept, which shall stay as it is"
                )


def deaf_to(family: Family, prompt: str, identifier: str, *, one_token: bool = False) -> dict[str, int]:
    """The text encoders that cut a prompt off before its identifier ends, and how many tokens each reads.

    ``one_token``: the identifier will be one token, whatever the tokenizers make of it now.
    """
    called = _call(prompt, identifier)
    assert called is not None, "check_prompt has seen to it"
    until, lengths = prompt[: called.end()], family.prompt_lengths()
    found: dict[str, int] = {}
    for component, (tokenizer, _) in family.text_encoders().items():
        count = len(tokenizer(family.preamble() + until, truncation=False, verbose=False).input_ids)
        if one_token:
            count -= len(pieces(tokenizer, identifier)) - 1
        if count > lengths[component]:
            found[component] = lengths[component]
    return found


def check_heard(family: Family, prompt: str, identifier: str, *, one_token: bool = False) -> list[str]:
    """Notes on text encoders that never read the identifier, because the prompt is too long.

    Raises:
        SettingsError: if none of them does.
    """
    deaf = deaf_to(family, prompt, identifier, one_token=one_token)
    if deaf and len(deaf) == len(family.text_encoders()):
        raise SettingsError(
            f"got a prompt in which the identifier {identifier!r} comes after the {max(deaf.values())} tokens that the "
            "pipeline reads; expected a shorter prompt, or the identifier nearer to its beginning"
        )
    return [
        f"The {component} reads {length} tokens of a prompt, and the identifier {identifier!r} comes after them."
        for component, length in deaf.items()
    ]


def notes_on_calls(pipe: Any, prompts: Sequence[str], identifier: str) -> list[str]:
    """What to say where prompts do not reach an adapter that answers to an identifier."""
    calling = [prompt for prompt in prompts if calls(prompt, identifier)]
    if not calling:
        glued = " as a word of its own" if any(identifier in prompt for prompt in prompts) else ""
        return [f"No prompt contains {identifier!r}{glued}."]
    try:
        family = family_of(pipe)
    except ModelError:  # a pipeline that cannot be taught may still generate
        return []
    encoders = len(family.text_encoders())
    deaf = [prompt for prompt in calling if len(deaf_to(family, prompt, identifier)) == encoders]
    return [f"The pipeline cuts a prompt off before it comes to {identifier!r}: {prompt[:60]!r}…" for prompt in deaf]


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
        lines = [line.strip() for line in home_path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {str(path)!r} cannot be read: {error}") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one a line")
    return list(dict.fromkeys(prompts))

"""Prompts: the identifier in them, what the tokenizers make of it, and files of prompts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, ModelError, SettingsError, in_short
from ...files import home_path
from ..adapter.records import calling
from ..pipeline.families import Family, family_of

_SPACES = " ▁Ġ"
"""How tokenizers spell a space."""


def calls(prompt: str, identifier: str) -> bool:
    """Whether a prompt contains the identifier as a word of its own, in the same spelling."""
    return calling(identifier).search(prompt) is not None


def texts(given: str | Iterable[str], what: str) -> list[str]:
    """One text or several as a list. Raises SettingsError for anything else."""
    several: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if odd := [one for one in several if not isinstance(one, str)]:
        raise SettingsError(f"{what}: got {in_short(odd[0])} ({type(odd[0]).__name__}), expected a text or several")
    for one in several:
        check_characters(one, what)
    return several


def check_characters(text: str, what: str) -> None:
    """Raises SettingsError for a text that no tokenizer takes: bytes of a terminal that are no UTF-8 come as halves of
    a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"{what}: got {text!a}, whose character {error.start + 1} is none of Unicode; expected a text in UTF-8"
        ) from None


def prompts_given(prompt: str | Sequence[str], identifier: str) -> list[str]:
    """One prompt or several as a list. Raises SettingsError unless each calls the identifier."""
    given = texts(prompt, "prompt")
    for one in given:
        check_prompt(one, identifier)
    return given


def check_prompt(prompt: str, identifier: str) -> None:
    """Raises SettingsError unless the prompt calls the identifier."""
    if not isinstance(identifier, str) or not identifier.strip():
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


def too_long(family: Family, text: str, *, one_token: str | None = None) -> dict[str, int]:
    """The text encoders that do not read a prompt to its end, and how many tokens each reads.

    ``one_token``: an identifier that will be one token, whatever the tokenizers make of it now.
    """
    lengths, found = family.prompt_lengths(), dict[str, int]()
    for component, (tokenizer, _) in family.text_encoders().items():
        count = len(tokenizer(family.preamble() + text, truncation=False, verbose=False).input_ids)
        if one_token is not None:
            count -= len(calling(one_token).findall(text)) * (len(pieces(tokenizer, one_token)) - 1)
        if count > lengths[component]:
            found[component] = lengths[component]
    return found


def deaf_to(family: Family, prompt: str, identifier: str, *, one_token: bool = False) -> dict[str, int]:
    """The text encoders that cut a prompt off before its identifier ends, as :func:`too_long`."""
    called = calling(identifier).search(prompt)
    assert called is not None, "check_prompt has seen to it"
    return too_long(family, prompt[: called.end()], one_token=identifier if one_token else None)


def check_heard(family: Family, prompt: str, identifier: str, *, one_token: bool = False) -> list[str]:
    """Notes on text encoders that never read the identifier, because the prompt is too long or their tokenizer has no
    piece of it.

    Raises:
        SettingsError: if none of them does.
    """
    encoders = family.text_encoders()
    strange = [] if one_token else [c for c, (tokenizer, _) in encoders.items() if _unknown(tokenizer, identifier)]
    if len(strange) == len(encoders):
        raise SettingsError(
            f"the pipeline's tokenizers know nothing of the identifier {identifier!r}, so that no prompt could call "
            "it; expected one of letters such as 'V*', or new_token, which gives it a token of its own"
        )
    deaf = deaf_to(family, prompt, identifier, one_token=one_token)
    if deaf and {*deaf, *strange} == {*encoders}:
        raise SettingsError(
            f"got a prompt in which the identifier {identifier!r} comes after the {max(deaf.values())} tokens that the "
            "pipeline reads; expected a shorter prompt, or the identifier nearer to its beginning"
        )
    return [
        *(f"The {component}'s tokenizer knows nothing of the identifier {identifier!r}." for component in strange),
        *(
            f"The {component} reads {length} tokens of a prompt, and the identifier {identifier!r} comes after them."
            for component, length in deaf.items()
        ),
    ]


def notes_on_lengths(family: Family, prompts: Iterable[str], *, one_token: str | None = None) -> list[str]:
    """A sentence for each prompt whose end some text encoders cut off, with the words that they do not read."""
    notes = []
    for prompt in dict.fromkeys(prompts):
        by_length: dict[int, list[str]] = {}
        for component, length in too_long(family, prompt, one_token=one_token).items():
            by_length.setdefault(length, []).append(component)
        for length, components in by_length.items():
            lost = prompt[_read_until(family, prompt, components[0], one_token) :].strip()
            notes.append(
                f"Too long for {' and '.join(components)}, which reads {length} tokens: of {_beginning(prompt)!r} it "
                f"does not read {lost if len(lost) <= 60 else f'{lost[:59]}…'!r}."
            )
    return notes


def _read_until(family: Family, prompt: str, component: str, one_token: str | None) -> int:
    """Where a text encoder stops reading a prompt: the end of the last word that it reads whole."""
    ends = [0, *(word.end() for word in re.finditer(r"\S+", prompt))]
    at = bisect_left(ends, 1, key=lambda end: int(component in too_long(family, prompt[:end], one_token=one_token)))
    return ends[max(at - 1, 0)]


def _beginning(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:39]}…"


def notes_on_calls(pipe: Any, prompts: Sequence[str], identifier: str) -> list[str]:
    """What to say where prompts do not reach an adapter that answers to an identifier."""
    calling = [prompt for prompt in prompts if calls(prompt, identifier)]
    if not calling:
        glued = " as a word of its own" if any(identifier in prompt for prompt in prompts) else ""
        return [f"No prompt contains {identifier!r}{glued}."]
    if (family := _family(pipe)) is None:
        return []
    encoders = len(family.text_encoders())
    deaf = [prompt for prompt in calling if len(deaf_to(family, prompt, identifier)) == encoders]
    return [f"The pipeline cuts a prompt off before it comes to {identifier!r}: {prompt[:60]!r}…" for prompt in deaf]


def notes_before_drawing(pipe: Any, prompts: Iterable[str]) -> list[str]:
    """What to say of prompts before pictures are drawn of them: what of each the pipeline does not read."""
    family = _family(pipe)
    return [] if family is None else notes_on_lengths(family, prompts)


def _family(pipe: Any) -> Family | None:
    try:
        return family_of(pipe)
    except ModelError:  # a pipeline that cannot be taught may still generate
        return None


def _unknown(tokenizer: Any, word: str) -> bool:
    """Whether a tokenizer has no piece of a word: it drops it, or reads what it reads for all that it does not know."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return not any(i != tokenizer.unk_token_id and tokenizer.convert_ids_to_tokens(i).strip(_SPACES) for i in ids)


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
        lines = [line.strip() for line in home_path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {str(path)!r} cannot be read: {error}") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one a line")
    return list(dict.fromkeys(prompts))

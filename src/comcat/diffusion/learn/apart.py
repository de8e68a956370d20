"""Several adapters in one pipeline: each acts on its own prompt, and not on the others'.

Adapters that were taught alone know nothing of each other. What one reads of a prompt it reads of the next as well, for
most of a prompt is words that all have in common, and loaded together they spoil each other's concepts. What reads the
text in cross-attention are the factors S_K and U_V of Eq. 8. Their rows f become the f' that minimises

    Σ_t |(f' − f) t|² + Σ_u |f' u|²        t: tokens of the adapter's own prompt, u: of the others'

so that f' = f G (G + H)⁻¹ with the second moments G of t and H of u: what only the own prompt has is read as before,
what only the others have is not read at all, and what all have is shared out. All within the directions that f reads,
for what an adapter was protected from it shall not read afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...errors import SettingsError, counted, in_short
from ..adapter.attach import unknown
from ..adapter.records import Adapter, adapters, check_unfused, remember
from ..draw.prompts import check_prompt, texts
from ..pipeline.families import family_of
from .protection import SHARE, factors_that_read, principal_directions, tokens_of

RIDGE = 1e-3
"""Of the mean second moment: added to all directions, so that those that no prompt has are no division by zero."""

UNREAD = 1e-6
"""Of the strongest direction's mean square: what an adapter reads less of, it was kept from. Files in 16 bit have more
noise than none."""

TOLD = "told_apart_from"
"""In an adapter's metadata: the others' prompts, as JSON."""


@torch.no_grad()
def tell_apart(
    pipe: Any, prompts: Mapping[str, str | Sequence[str]] | None = None, *, protect: str | Sequence[str] = ()
) -> None:
    """Change adapters that act together, in place, so that each reads its own prompt and not the others'.

    It is done once, to all that are loaded. Loading the files again brings back what they were; a file that is saved
    afterwards says what its adapter was told apart from.

    Args:
        pipe: with two adapters or more.
        prompts: by adapter's name, what calls it, one prompt or several; for those left out, the prompt that each was
            taught with.
        protect: prompts that they shall not read either. What an adapter was protected from when it learned, it does
            not read afterwards anyway.

    Raises:
        SettingsError: without two adapters, if one has no prompt, or one that does not call it or that the text
            encoder reads as another's, if it was told apart before, if one reads the text otherwise than in
            cross-attention of a UNet, or while adapters are fused. ModelError: as
            :func:`~comcat.diffusion.adapters`. In either case nothing has changed.
    """
    family = family_of(pipe)
    check_unfused(pipe)
    there = adapters(pipe)
    own = _prompts_of(there, prompts)
    factors = {name: factors_that_read(family, there[name], f"telling adapter {name!r} apart") for name in own}
    tokens = {name: tokens_of(family, given) for name, given in own.items()}
    _check_read_apart(own, tokens)
    protected = texts(protect, "protect")
    left = _left_of(tokens_of(family, ["", *protected]) if protected else None, next(iter(tokens.values())).shape[1])
    moments = {name: one.mT @ one / len(own[name]) for name, one in tokens.items()}
    together = torch.stack([*moments.values()]).sum(0)
    for name, moment in moments.items():
        read = left @ _read_by(factors[name])
        whole = read.mT @ together @ read
        whole += RIDGE * whole.trace() / len(whole) * torch.eye(len(whole), dtype=whole.dtype)
        change = torch.linalg.solve(whole, read.mT @ moment @ read).mT
        for factor in factors[name]:
            factor.copy_(factor.double().cpu() @ change)
        others = [prompt for other, given in own.items() if other != name for prompt in given]
        record = there[name].record
        remember(pipe, name, replace(record, metadata={**record.metadata, TOLD: json.dumps(others)}))


def _prompts_of(there: Mapping[str, Adapter], given: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]]:
    if len(there) < 2:
        raise SettingsError(f"got {counted(len(there), 'adapter')} to tell apart, expected two or more")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise SettingsError(f"prompts: got {in_short(given)}, expected them by adapter's name, {{'dog': 'a V* dog'}}")
    for name in given:
        if name not in there:
            raise SettingsError(unknown(name, there))
    for name, adapter in there.items():
        if TOLD in adapter.record.metadata:
            raise SettingsError(
                f"adapter {name!r} was told apart before, from {adapter.record.metadata[TOLD]}; once more would take "
                "from it what it reads of its own prompt: unload() it, and load what was taught"
            )
        if name not in given and adapter.record.prompt is None:
            raise SettingsError(
                f"adapter {name!r} knows no prompt that it was taught with; give prompts={{{name!r}: …}}"
            )
    found = {name: texts(given.get(name, there[name].record.prompt or ""), f"prompts of {name!r}") for name in there}
    for name, adapter in there.items():
        if (identifier := adapter.record.identifier) is not None:
            for prompt in found[name]:
                check_prompt(prompt, identifier)
    names = list(found)
    for place, name in enumerate(names):
        if not found[name]:
            raise SettingsError(f"prompts of {name!r}: got none, expected at least one")
        for other in names[:place]:
            if shared := {*found[name]} & {*found[other]}:
                raise SettingsError(
                    f"adapters {other!r} and {name!r} have the prompt {min(shared)!r} in common, which cannot tell "
                    "them apart; expected an identifier of its own for each"
                )
    return found


def _check_read_apart(own: Mapping[str, Sequence[str]], tokens: Mapping[str, Tensor]) -> None:
    """Raises SettingsError where the text encoder reads a prompt of one adapter as one of another's."""
    read = [
        (name, prompt, one)
        for name, prompts in own.items()
        for prompt, one in zip(prompts, tokens[name].chunk(len(prompts)), strict=True)
    ]
    for (name, prompt, one), (other, another, two) in combinations(read, 2):
        if name != other and one.shape == two.shape and torch.allclose(one, two, atol=1e-6):
            raise SettingsError(
                f"the text encoder reads {prompt!r} of {name!r} as {another!r} of {other!r}, so that they cannot be "
                "told apart: an identifier comes after what it reads, or is nothing that it knows"
            )


def _read_by(factors: Sequence[Tensor]) -> Tensor:
    """The projection (width, width) onto what an adapter reads: protection has left it some directions alone."""
    moment = torch.stack([factor.double().cpu().mT @ factor.double().cpu() for factor in factors]).sum(0)
    lengths, directions = torch.linalg.eigh(moment)
    own = directions[:, lengths > UNREAD * lengths[-1]]
    return own @ own.mT


def _left_of(protected: Tensor | None, width: int) -> Tensor:
    """The projection (width, width) onto what protection leaves of the tokens."""
    whole = torch.eye(width, dtype=torch.float64)
    if protected is None:
        return whole
    directions = principal_directions(protected, SHARE)
    return whole - directions.mT @ directions

"""Several adapters in one pipeline: each acts on its own prompt, and not on the others'.

Adapters that were taught alone know nothing of each other. What one reads of a prompt it reads of the next as well, for
most of a prompt is words that all have in common, and loaded together they spoil each other's concepts. What reads the
text in cross-attention are the factors S_K and U_V of Eq. 8. Their rows f become the f' that minimises

    Σ_t |(f' − f) t|² + Σ_u |f' u|²        t: tokens of the adapter's own prompt, u: of the others'

so that f' = f G (G + H)⁻¹ with the second moments G of t and H of u: what only the own prompt has is read as before,
what only the others have is not read at all, and what all have is shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SettingsError
from ..adapter.attach import unknown
from ..adapter.records import Adapter, adapters, check_unfused
from ..draw.prompts import texts
from ..pipeline.families import Family, family_of
from .protection import SHARE, factors_that_read, principal_directions

RIDGE = 1e-3
"""Of the mean second moment: added to all directions, so that those that no prompt has are no division by zero."""


@torch.no_grad()
def tell_apart(
    pipe: Any, prompts: Mapping[str, str | Sequence[str]] | None = None, *, protect: Sequence[str] = ()
) -> None:
    """Change adapters that act together, in place, so that each reads its own prompt and not the others'.

    Loading the files again brings back what they were.

    Args:
        pipe: with two adapters or more.
        prompts: by adapter's name, what calls it, one prompt or several; left out, all adapters and the prompt that
            each was taught with.
        protect: prompts that the adapters were protected from when they learned; they remain so.

    Raises:
        SettingsError: without two such adapters, if one has no prompt or that of another, if one reads the text
            otherwise than in cross-attention of a UNet, or while adapters are fused. ModelError: as
            :func:`~comcat.diffusion.adapters`. In either case nothing has changed.
    """
    family = family_of(pipe)
    check_unfused(pipe)
    there = adapters(pipe)
    own = _prompts_of(there, prompts)
    factors = {name: factors_that_read(family, there[name], f"telling adapter {name!r} apart") for name in own}
    tokens = {name: _tokens(family, given) for name, given in own.items()}
    left = _left_of(_tokens(family, ["", *protect]) if protect else None, next(iter(tokens.values())).shape[1])
    moments = {name: left @ (one.mT @ one / len(own[name])) @ left for name, one in tokens.items()}
    whole = torch.stack([*moments.values()]).sum(0)
    whole += RIDGE * whole.trace() / len(whole) * torch.eye(len(whole), dtype=whole.dtype)
    for name, moment in moments.items():
        change = torch.linalg.solve(whole, moment).mT
        for factor in factors[name]:
            factor.copy_(factor.double().cpu() @ change)


def _prompts_of(there: Mapping[str, Adapter], given: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]]:
    if given is None:
        without = [name for name, adapter in there.items() if adapter.record.prompt is None]
        if without:
            raise SettingsError(
                f"adapter {without[0]!r} knows no prompt that it was taught with; give prompts={{{without[0]!r}: …}}"
            )
        given = {name: adapter.record.prompt or "" for name, adapter in there.items()}
    for name in given:
        if name not in there:
            raise SettingsError(unknown(name, there))
    found = {name: texts(one, f"prompts of {name!r}") for name, one in given.items()}
    if len(found) < 2:
        raise SettingsError(f"got {len(found)} adapter to tell apart, expected two or more")
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


def _tokens(family: Family, prompts: Sequence[str]) -> Tensor:
    """(prompts · tokens, width), each of length 1: some text encoders' first token is many times longer than others."""
    return F.normalize(family.encode(list(prompts))["prompt"].flatten(0, 1).double().cpu(), dim=1)


def _left_of(protected: Tensor | None, width: int) -> Tensor:
    """The projection (width, width) onto what protection leaves of the tokens."""
    whole = torch.eye(width, dtype=torch.float64)
    if protected is None:
        return whole
    directions = principal_directions(protected, SHARE)
    return whole - directions.mT @ directions

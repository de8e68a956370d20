"""Prompts that an adapter leaves as they are, by what its factors are allowed to read.

In cross-attention the factors S_K and U_V of Eq. 8 read the text: a prompt's token c adds ``x U_Q (c S_K)ᵀ`` to the
logits and ``c U_V S_O`` to the values. Where c S_K and c U_V are zero, nothing is added. So the directions of the
protected prompts' tokens are projected out of both factors after every step. That costs a step next to nothing and
needs no pictures, unlike prior preservation, and it goes together with that.

A few prompts that somebody names have few directions, and what is left tells the concept's own prompt apart. Prompts of
random words have nearly all. There, with the second moments O of the own tokens and P of the protected ones, the
directions r that solve

    O r = λ P r

are read from the largest λ on, as long as the own tokens are 40 times as strong in all of them together. What is read
is a small part of a token; the terms are multiplied (``alpha``) by what brings it to a token's length, so that a
learning rate means what it means without protection. Where pictures are shown under the empty prompt, that is an own
one: guidance leads away from it, and what it cannot learn, guidance exaggerates.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SettingsError
from ..adapter.places import find_places
from ..adapter.records import Adapter
from ..pipeline.components import denoiser_of
from ..pipeline.families import Family
from .settings import CustomizeSettings
from .token import LearnedToken

SHARE = 0.999
"""Of the squared length of the protected tokens, so much is projected out: the first of their principal directions. All
of it would leave too little that tells the concept's own prompt apart."""
STRONG = 40.0
"""In what is read, the own tokens' mean square is so many times that of the protected ones."""
ROWS = 4
"""Drawn for a token that learns, to see where it may lead."""
SHORTEST = 1e-2
"""The least length to which what is read of a token is taken to be."""
RIDGE = 1e-4
"""Of the mean second moment: added to all directions, so that those that no prompt has are not read."""
_TEXT_SIDE = ("k_down", "v_down")


class Protection:
    """Keeps an adapter from reading some prompts, the empty one included, unless ``dropout`` shows a share of the
    concept's pictures under that, which is to be learned there.

    Args:
        prompts: named ones, whose directions are not read.
        words: prompts of random words. With them, those directions alone are read in which ``own``, tokens (n, width)
            of the concept's prompts, are strong beside all that are protected, and the adapter's terms get the
            ``alpha`` for it.

    Raises:
        SettingsError: if the adapter's attention reads the text otherwise than in cross-attention, where nothing can be
            promised.
    """

    def __init__(
        self, family: Family, adapter: Adapter, prompts: Sequence[str], *, words: Sequence[str] = (),
        own: Tensor | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        if any(path.partition(".")[0] != family.component for path in adapter.terms):
            raise SettingsError(
                "protect: the text encoder learns as well, which changes every prompt; leave one of both out"
            )
        self.factors = factors_that_read(family, adapter, "protect")
        self.read = own is not None
        if own is None:
            directions = principal_directions(tokens_of(family, prompts if dropout else ["", *prompts]), SHARE)
        else:
            kinds = [dict.fromkeys(kind) for kind in (prompts, words, [] if dropout else [""]) if kind]
            mine = [own, tokens_of(family, [""])] if dropout else [own]
            directions = strong_directions(mine, [tokens_of(family, kind) for kind in kinds])
            length = torch.stack([(tokens @ directions.mT).square().sum(1).mean() for tokens in mine]).mean().sqrt()
            for one in adapter.terms.values():
                one.alpha = one.rank / max(float(length), SHORTEST)
        self.directions = directions.to(self.factors[0])

    @torch.no_grad()
    def apply(self) -> None:
        """Project the factors, (heads · rank, width) each, onto the directions that may be read, or off those that may
        not.
        """
        for factor in self.factors:
            directions = self.directions = self.directions.to(factor.device)  # where offloading has moved it
            part = factor @ directions.mT @ directions
            factor.copy_(part if self.read else factor - part)


def protection(
    family: Family, adapter: Adapter, prompts: Sequence[str], identifier: str, settings: CustomizeSettings,
    token: LearnedToken | None = None,
) -> Protection | None:  # fmt: skip
    """What the settings ask for, for the concept's ``prompts``; None where that is nothing. Raises as
    :class:`Protection` and :func:`drawn_prompts`.

    ``token``: of the identifier, if it learns. It begins as a word like others and will be none of them, so that its
    prompts' tokens are those of rows that are drawn.
    """
    if not settings.protect and not settings.protect_words:
        return None
    words, own = (), None
    if settings.protect_words:
        several = list(dict.fromkeys(prompts))
        tokenizer, _ = next(iter(family.text_encoders().values()))
        words = drawn_prompts(tokenizer, prompts[0], identifier, settings.protect_words, settings.seed)
        if token is None:
            own = tokens_of(family, several)
        else:
            own = torch.cat([_tokens_with(family, several, rows) for rows in token.strangers(ROWS, settings.seed)])
    return Protection(family, adapter, settings.protect, words=words, own=own, dropout=settings.caption_dropout)


def _tokens_with(family: Family, prompts: Sequence[str], reading: AbstractContextManager[None]) -> Tensor:
    with reading:
        return tokens_of(family, prompts)


def drawn_prompts(tokenizer: Any, prompt: str, identifier: str, count: int, seed: int) -> tuple[str, ...]:
    """Prompts in which one to four random words of a tokenizer's vocabulary stand for the identifier.

    Raises SettingsError if the vocabulary marks no words, as CLIP's does by ``</w>``.
    """
    words = sorted(token[:-4] for token in tokenizer.get_vocab() if token.endswith("</w>") and token[:-4].isalpha())
    if count and not words:
        raise SettingsError("protect_words: the tokenizer's vocabulary marks no words to draw, as CLIP's does")
    chance = random.Random(seed)
    return tuple(
        prompt.replace(identifier, " ".join(chance.choices(words, k=chance.randint(1, 4)))) for _ in range(count)
    )


def factors_that_read(family: Family, adapter: Adapter, what: str) -> list[nn.Parameter]:
    """The factors of an adapter that read the text, (heads · rank, width) each: S_K and U_V of cross-attention.

    Raises SettingsError if its attention reads the text otherwise.
    """
    found, _ = find_places(denoiser_of(family.pipe))
    paths = [a.path for a in found if a.where == "cross" and a.path in adapter.terms]
    if len(paths) < len(adapter.terms) or family.component != "unet":
        raise SettingsError(
            f"{what}: only cross-attention reads the text as the text encoder gives it; expected where='cross' on a "
            "UNet"
        )
    return [p for path in paths for n, p in adapter.terms[path].named_parameters() if n in _TEXT_SIDE]


@torch.no_grad()
def tokens_of(family: Family, prompts: Iterable[str]) -> Tensor:
    """Of prompts, (prompts · tokens, width) in float64, each of length 1: some text encoders' first token is many times
    longer than the rest.
    """
    return F.normalize(family.encode(list(prompts))["prompt"].flatten(0, 1).double().cpu(), dim=1)


def strong_directions(own: Sequence[Tensor], protected: Sequence[Tensor]) -> Tensor:
    """Orthonormal directions (directions, width) in which the squared lengths of tokens of ``own``, (n, width) each,
    are together ``STRONG`` times those of ``protected``: as many as may be, and one at least. Every kind counts as
    much, whatever its size.
    """
    mine = torch.stack([_second_moment(tokens) for tokens in own]).sum(0)
    theirs = torch.stack([_second_moment(tokens) for tokens in protected]).mean(0)
    theirs += RIDGE * theirs.trace() / len(theirs) * torch.eye(len(theirs), dtype=theirs.dtype)
    inverse = torch.linalg.inv(torch.linalg.cholesky(theirs))
    vectors = inverse.mT @ torch.linalg.eigh(inverse @ mine @ inverse.mT).eigenvectors.flip(1)  # strongest first
    directions = torch.linalg.qr(vectors).Q  # of which the first k span the first k
    gained, lost = (((directions.mT @ moment) * directions.mT).sum(1).cumsum(0) for moment in (mine, theirs))
    strong = (gained >= STRONG * lost).nonzero()
    return directions[:, : 1 + int(strong.max()) if len(strong) else 1].mT


def _second_moment(tokens: Tensor) -> Tensor:
    return tokens.mT @ tokens / len(tokens)


def principal_directions(tokens: Tensor, share: float) -> Tensor:
    """The fewest orthonormal directions (directions, width) that hold a share of the squared lengths of tokens (n,
    width).

    Tokens count by direction, not by length: some text encoders' first token is many times longer than the rest.
    """
    different = F.normalize(tokens.double(), dim=1).unique(dim=0)
    _, lengths, directions = torch.linalg.svd(different, full_matrices=False)
    held = lengths.square().cumsum(0) / lengths.square().sum()
    return directions[: int((held < share).sum()) + 1]

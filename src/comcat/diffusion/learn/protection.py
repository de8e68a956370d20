"""Prompts that an adapter leaves as they are, by what its factors are allowed to read.

In cross-attention the factors S_K and U_V of Eq. 8 read the text: a prompt's token c adds ``x U_Q (c S_K)ᵀ`` to the
logits and ``c U_V S_O`` to the values. Where c S_K and c U_V are zero, nothing is added. So the directions of the
protected prompts' tokens are projected out of both factors after every step. That costs a step next to nothing and
needs no pictures, unlike prior preservation, and it goes together with that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SettingsError
from ..adapter.places import find_places
from ..adapter.records import Adapter
from ..pipeline.components import denoiser_of
from ..pipeline.families import Family
from .settings import CustomizeSettings

SHARE = 0.999
"""Of the squared length of the protected tokens, so much is projected out: the first of their principal directions. All
of it would leave too little that tells the concept's own prompt apart."""
_TEXT_SIDE = ("k_down", "v_down")


class Protection:
    """Keeps an adapter from reading what some prompts have in common with each other, the empty prompt included, unless
    ``dropout`` shows a share of the concept's pictures under that, which is to be learned there.

    Raises:
        SettingsError: if the adapter's attention reads the text otherwise than in cross-attention, where nothing can be
            promised.
    """

    def __init__(self, family: Family, adapter: Adapter, prompts: Sequence[str], *, dropout: float = 0.0) -> None:
        if any(path.partition(".")[0] != family.component for path in adapter.terms):
            raise SettingsError(
                "protect: the text encoder learns as well, which changes every prompt; leave one of both out"
            )
        self.factors = factors_that_read(family, adapter, "protect")
        with torch.no_grad():
            tokens = family.encode([*prompts] if dropout else ["", *prompts])["prompt"].flatten(
                0, 1
            )  # (prompts · tokens, width)
        self.directions = principal_directions(tokens, SHARE).to(self.factors[0])

    @torch.no_grad()
    def apply(self) -> None:
        """Project the protected directions out of the factors, (heads · rank, width) each."""
        for factor in self.factors:
            directions = self.directions = self.directions.to(factor.device)  # where offloading has moved it
            factor -= factor @ directions.mT @ directions


def protected_prompts(family: Family, prompt: str, identifier: str, settings: CustomizeSettings) -> tuple[str, ...]:
    """The prompts that are named, and those that are drawn. Raises as :func:`drawn_prompts`."""
    if not settings.protect_words:
        return settings.protect
    tokenizer, _ = next(iter(family.text_encoders().values()))
    return (*settings.protect, *drawn_prompts(tokenizer, prompt, identifier, settings.protect_words, settings.seed))


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


def principal_directions(tokens: Tensor, share: float) -> Tensor:
    """The fewest orthonormal directions (directions, width) that hold a share of the squared lengths of tokens (n,
    width).

    Tokens count by direction, not by length: some text encoders' first token is many times longer than the rest.
    """
    different = torch.nn.functional.normalize(tokens.double(), dim=1).unique(dim=0)
    _, lengths, directions = torch.linalg.svd(different, full_matrices=False)
    held = lengths.square().cumsum(0) / lengths.square().sum()
    return directions[: int((held < share).sum()) + 1]

"""A CLIP tokenizer made on the spot: a few words as tokens of their own, everything else split into characters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

_END = "</w>"  # how CLIP marks the last character of a word


def make_tokenizer(words: Iterable[str], *, identifiers: Iterable[str] = (), length: int = 32) -> Any:
    """A ``CLIPTokenizer`` of sequences of ``length`` tokens.

    Args:
        words: lower-case words, one token each.
        identifiers: one token each as well, matched as they are written, case and punctuation included.

    Any other text is split into known pieces, in the last resort into bytes, as CLIP's own vocabulary does it
    (byte-pair encoding; Sennrich et al. 2016, Radford et al. 2019).
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    vocabulary = [*characters, *(c + _END for c in characters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        # Merges of lower rank go first: earlier words stay whole, and a new one first falls into what they leave of it.
        while len(pieces := _split(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            vocabulary.append(pieces[0] + pieces[1])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = CLIPTokenizer(vocab=numbered, merges=list(ranks), model_max_length=length)  # type: ignore[arg-type]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in identifiers])  # type: ignore[arg-type]
    return tokenizer


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces that byte-pair encoding leaves of a word: the pair of lowest rank is merged, wherever it is, and so
    on.
    """
    pieces = [*word[:-1], word[-1] + _END]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(known, key=ranks.__getitem__)
        place = 0
        while place < len(pieces) - 1:
            if (pieces[place], pieces[place + 1]) == best:
                pieces[place : place + 2] = ["".join(best)]
            place += 1
    return pieces

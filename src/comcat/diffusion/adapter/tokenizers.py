"""Tokens that were learned with an adapter, in a pipeline's tokenizers and text encoders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SettingsError, StoreError
from ..pipeline.components import Component, text_encoders_of
from .records import records

_BEFORE = "comcat_before_tokens"


@dataclass(frozen=True)
class _Before:
    """What a text encoder and its tokenizer were before any token joined them."""

    tokenizer: Any
    embedding: nn.Module
    vocabulary: int


def check_tokens(target: Any, words: Mapping[str, Tensor]) -> None:
    """Raise StoreError or SettingsError if learned tokens, by ``component.token``, do not fit a pipeline and the tokens
    that it has.
    """
    encoders = {c.name: c for c in text_encoders_of(target)}
    for key, row in words.items():
        component, token = key.split(".", 1)
        if component not in encoders or _tokenizer(target, component) is None:
            raise StoreError(
                f"a token {token!r} was learned for the {component}, which is not there; load the adapter into the "
                "whole pipeline"
            )
        model: Any = encoders[component].model
        width = model.get_input_embeddings().embedding_dim
        if row.shape != (width,):
            raise StoreError(
                f"the embedding of {token!r} is {tuple(row.shape)}, expected ({width},) for this {component}"
            )
        if knows(_tokenizer(target, component), token):
            raise SettingsError(
                f"the {component}'s tokenizer has a token {token!r} already; rename_identifier='…' gives it another "
                "name"
            )


def knows(tokenizer: Any, word: str) -> bool:
    """Whether a word is one token already: as it is, or as the tokenizer spells it (``dog</w>``)."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return word in tokenizer.get_vocab() or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id)


def refresh_tokens(target: Any) -> None:
    """Make tokenizers and text encoders hold the tokens of just those adapters that a pipeline carries.

    They are built anew from what they were before; with the last token, that is what comes back.
    """
    for component in text_encoders_of(target):
        rows = {
            key.split(".", 1)[1]: row
            for record in records(target).values()
            for key, row in record.token_embeddings.items()
            if key.split(".", 1)[0] == component.name and record.brought_tokens
        }
        _restore(target, component)
        if rows:
            _extend(target, component, rows)


def _extend(target: Any, component: Component, rows: Mapping[str, Tensor]) -> None:
    model: Any = component.model
    own: Any = model.get_input_embeddings()
    tokenizer = _tokenizer(target, component.name)
    before = _Before(tokenizer, own, model.config.vocab_size)
    longer = copy.deepcopy(tokenizer)  # nothing can be taken out of a tokenizer again
    longer.add_tokens(list(rows))
    size = max(own.num_embeddings, len(longer))
    weight = own.weight.detach()
    table = torch.cat([weight, weight.new_zeros(size - len(weight), weight.shape[1])])
    for token, row in rows.items():
        table[longer.convert_tokens_to_ids(token)] = row.to(table)
    embedding = nn.Embedding.from_pretrained(table, freeze=True, padding_idx=own.padding_idx)
    model.set_input_embeddings(embedding.train(own.training))
    model.config.vocab_size = size
    setattr(target, _tokenizer_name(component.name), longer)
    setattr(model, _BEFORE, (before,))


def _restore(target: Any, component: Component) -> None:
    model: Any = component.model
    if not hasattr(model, _BEFORE):
        return
    (before,) = getattr(model, _BEFORE)
    weight = model.get_input_embeddings().weight
    model.set_input_embeddings(
        before.embedding.to(weight.device, weight.dtype)
    )  # it did not move with the model meanwhile
    model.config.vocab_size = before.vocabulary
    setattr(target, _tokenizer_name(component.name), before.tokenizer)
    delattr(model, _BEFORE)


def _tokenizer(target: Any, component: str) -> Any:
    return getattr(target, _tokenizer_name(component), None)


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")

"""Tokens that were learned with an adapter, in a pipeline's tokenizers and text encoders."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SettingsError, StoreError
from ..pipeline.components import Component, text_encoders_of, tokenizer_name, tokenizer_of
from .records import records

_STATE = "comcat_tokens"


@dataclass(frozen=True)
class _Joined:
    """The tokens of adapters in one text encoder, and what it and its tokenizer (in copy) were before the first."""

    tokens: tuple[str, ...]
    tokenizer: Any
    embedding: Any
    vocabulary: int


def check_tokens(target: Any, words: Mapping[str, Tensor]) -> None:
    """Raise StoreError or SettingsError if learned tokens, by ``component.token``, do not fit a pipeline and the tokens
    that it has.
    """
    encoders = {c.name: c for c in text_encoders_of(target)}
    for key, row in words.items():
        component, token = key.split(".", 1)
        if component not in encoders or tokenizer_of(target, component) is None:
            raise StoreError(
                f"a token {token!r} was learned for the {component}, which is not there; load the adapter into the "
                "whole pipeline"
            )
        if not hasattr(tokenizer_of(target, component), "backend_tokenizer"):
            kind = type(tokenizer_of(target, component)).__name__
            raise StoreError(f"a token cannot be taken out of a {kind} again, expected a fast tokenizer")
        model: Any = encoders[component].model
        width = model.get_input_embeddings().embedding_dim
        if row.shape != (width,):
            raise StoreError(
                f"the embedding of {token!r} is {tuple(row.shape)}, expected ({width},) for this {component}"
            )
        if knows(tokenizer_of(target, component), token):
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

    Tokenizers stay the objects that they are, so that other pipelines which share them know the same words. What others
    add meanwhile, as textual inversions, stays; only its ids move down when a token before it goes. With the last token
    of an adapter, all is as before, if nothing else has changed in it.
    """
    for component in text_encoders_of(target):
        rows = {
            key.split(".", 1)[1]: row
            for record in records(target).values()
            for key, row in record.token_embeddings.items()
            if key.split(".", 1)[0] == component.name and record.brought_tokens
        }
        joined = _joined(component)
        held = () if joined is None else joined.tokens
        if gone := [token for token in held if token not in rows]:
            _take_out(target, component, gone)
        if rows:
            _put_in(target, component, rows)


def _put_in(target: Any, component: Component, rows: Mapping[str, Tensor]) -> None:
    """Let tokens join behind all that is there, or take another embedding where they have joined before."""
    model: Any = component.model
    own, tokenizer = model.get_input_embeddings(), _of_its_own(target, component)
    before = _joined(component) or _Joined((), copy.deepcopy(tokenizer), own, model.config.vocab_size)
    tokenizer.add_tokens(list(rows))
    weight = own.weight.detach()
    table = _padded(weight, max(len(weight), len(tokenizer)), before.embedding.weight)
    for token, row in rows.items():
        table[tokenizer.convert_tokens_to_ids(token)] = row.to(table)
    _set_table(model, table)
    setattr(model, _STATE, (replace(before, tokens=tuple(rows)),))


def _take_out(target: Any, component: Component, gone: Sequence[str]) -> None:
    """Take tokens out and leave everything else."""
    model, joined = component.model, _joined(component)
    assert joined is not None
    left = tuple(token for token in joined.tokens if token not in gone)
    tokenizer, own = tokenizer_of(target, component.name), component.model.get_input_embeddings()  # type: ignore[operator]
    if left or _changed(tokenizer, own, joined):
        there = [token for token in gone if token in tokenizer.get_added_vocab()]
        ids = [tokenizer.convert_tokens_to_ids(token) for token in there]
        kept = torch.ones(own.num_embeddings, dtype=torch.bool, device=own.weight.device)
        kept[ids] = False
        _forget(tokenizer, there)
        size = max(joined.embedding.num_embeddings, len(tokenizer))
        _set_table(model, _padded(own.weight.detach()[kept], size, joined.embedding.weight))
    else:
        weight = own.weight
        embedding = joined.embedding.to(weight.device, weight.dtype)  # it did not move with the model meanwhile
        model.set_input_embeddings(embedding)  # type: ignore[operator]
        model.config.vocab_size = joined.vocabulary  # type: ignore[union-attr]
        tokenizer._tokenizer = copy.deepcopy(joined.tokenizer._tokenizer)
    if left:
        setattr(model, _STATE, (replace(joined, tokens=left),))
    else:
        delattr(model, _STATE)


def _changed(tokenizer: Any, embedding: Any, joined: _Joined) -> bool:
    """Whether tokens have come or gone, or embeddings were trained, since the first token of an adapter joined."""
    if set(tokenizer.get_added_vocab()) != {*joined.tokenizer.get_added_vocab(), *joined.tokens}:
        return True
    known = joined.embedding.weight[: len(joined.tokenizer)]
    return not embedding.weight[: len(known)].equal(known.to(embedding.weight))


def _of_its_own(target: Any, component: Component) -> Any:
    """The tokenizer of a text encoder; a copy in its place where another encoder of the pipeline reads by it as well,
    whose tokens may be others.
    """
    tokenizer = tokenizer_of(target, component.name)
    others = [c.name for c in text_encoders_of(target) if c.name != component.name]
    if any(tokenizer_of(target, name) is tokenizer for name in others):
        tokenizer = copy.deepcopy(tokenizer)
        setattr(target, tokenizer_name(component.name), tokenizer)
    return tokenizer


def _forget(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Take some of its added tokens out of a tokenizer. The ids of those behind them move down."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = [token["id"] for token in state["added_tokens"] if token["content"] in tokens]
    state["added_tokens"] = [
        {**token, "id": token["id"] - sum(other < token["id"] for other in gone)}
        for token in state["added_tokens"]
        if token["id"] not in gone
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _set_table(model: Any, table: Tensor) -> None:
    own = model.get_input_embeddings()
    embedding = nn.Embedding.from_pretrained(table, freeze=True, padding_idx=own.padding_idx)
    model.set_input_embeddings(embedding.train(own.training))
    model.config.vocab_size = len(table)


def _padded(table: Tensor, size: int, rest: Tensor) -> Tensor:
    """A table of ``size`` rows: some tables have more rows than there are tokens, of which ``rest`` has the last."""
    if size <= len(table):
        return table.clone()
    more = table.new_zeros(size - len(table), table.shape[1])
    kept = rest[len(table) : size].to(table)
    more[: len(kept)] = kept
    return torch.cat([table, more])


def _joined(component: Component) -> _Joined | None:
    return getattr(component.model, _STATE, (None,))[0]  # in a tuple: none of it is part of the model

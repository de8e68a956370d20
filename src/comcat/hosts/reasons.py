"""Why a product does not exist, as far as a module's parts say it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..sites import Attention
from .calls import ROTARY, Reads, Uncallable, calls_of
from .structures import below, places, rows_in, rows_out
from .symmetry import Symmetry, norm_and_gate

_NORMS = ("q_norm", "k_norm", "norm_q", "norm_k", "q_layernorm", "k_layernorm", "qk_norm", "query_norm", "key_norm")


QUERIES_GIVEN = "its queries are given to it, so no W_Q is its own"
NO_PAIR = "it calls itself attention and has no layers for queries, keys and values, so there is no product"
WEIGHTS_MADE = "one layer makes its attention weights, so there are no queries and keys"


def qk_reason(holder: Any, parameters: tuple[str, ...]) -> str | None:
    """What stands between W_Q and W_K, as far as names say it."""
    for name, module in holder.named_children():
        if any(
            word in name for word in ("q_norm", "k_norm", "norm_q", "norm_k", "q_layernorm", "k_layernorm", "qk_norm")
        ):
            if not isinstance(module, nn.Identity):
                return f"{name} sits between W_Q and W_K"
    own = set(dir(holder)) - set(dir(nn.Module()))
    turns = any("rotary" in name and callable(getattr(holder, name)) for name in own)
    if turns or getattr(holder, "rope", None) is not None or any(ROTARY.search(name) for name in parameters):
        return "rotary position embeddings sit between W_Q and W_K"
    if getattr(holder, "logit_scale", None) is not None:
        return "cosine attention normalises q and k"
    if getattr(holder, "rel_pos_h", None) is not None:
        return "relative positions are computed from q"
    return None


def vo_reason(module: nn.Module, out: str, symmetry: Symmetry) -> str | None:
    """What stands between W_V and W_O, as far as names say it; ``out`` is the path of the latter."""
    if isinstance(below(module, out), nn.ConvTranspose2d):
        return "W_O is a transposed convolution"
    if symmetry.in_turn:
        return "W_O reads the channels of all heads in turn, which comcat does not stand in for"
    if symmetry.in_part:
        return "W_O reads other channels beside those of the values, which comcat does not stand in for"
    norm, gate = norm_and_gate(module)
    if norm is not None:
        return "a norm sits between W_V and W_O"
    for name in ("v_norm", "norm_v"):
        if isinstance(getattr(module, name, None), nn.Module):
            return f"{name} sits between W_V and W_O"
    if gate is not None:
        return "a gate sits between W_V and W_O"
    around = below(module, out.partition(".")[0]) if "." in out else None
    for inner in () if around is None else around.children():
        if type(inner).__module__.endswith("activation") and not isinstance(inner, nn.Identity):
            return f"an activation ({type(inner).__name__}) sits between W_V and W_O"
    return None


def no_reading(module: nn.Module) -> str:
    """Why layers that look like those of an attention cannot be read as one."""
    for inner, names, out in places(module):
        holder, read = below(module, inner), rows_in(below(module, out))
        made = [rows_out(below(holder, name)) for name in names]
        if len(names) == 3:
            return unequal(*made)
        if len(names) == 1:
            rest = made[0] - read
            if rest % 2 == 0 and 0 < rest < 2 * read and read % (rest // 2) == 0 and rest // 2 > 1:
                return unequal(read, rest // 2, rest // 2)
        rows = " and ".join(f"{name} {count}" for name, count in zip(names, made, strict=True))
        return f"its layers put out {rows} channels, which are no queries, keys and values for the {read} of {out}"
    return "its layers are no queries, keys and values"


def unequal(queries: int, keys: int, values: int) -> str:
    """That heads differ in width, or share keys and values."""
    if keys == values and queries % keys == 0:
        return "queries, keys and values differ in width (grouped or multi-query attention)"
    return f"queries, keys and values differ in width: {queries}, {keys} and {values} channels"


def is_no_pair(layers: Sequence[nn.Module]) -> bool:
    """Whether layers over channels cannot be those of an attention: one alone, which makes no more than it reads."""
    return len(layers) < 2 and all(rows_out(layer) <= rows_in(layer) for layer in layers)


def is_no_softmax(copied: nn.Module, a: Attention) -> bool:
    """Whether queries matter where there is a single key: a softmax gives it all, whatever they are."""
    q, k = (p.weight(copied).shape[1] for p in (a.q, a.k))
    try:
        calls, _ = calls_of(copied, [Reads(q, k, a.width, 1, 1)])
    except Uncallable:
        return False
    other = copy.deepcopy(copied)
    a.q.write_(other, a.q.weight(other) * -2)
    with torch.no_grad():
        return not torch.allclose(calls[0](other), calls[0](copied))


def foreign_dropout(module: nn.Module) -> bool:
    """Whether there is a dropout in use besides ``attn_drop`` and ``proj_drop``, which the low-rank attention has."""
    modules = {
        n: m.p
        for n, m in module.named_children()
        if isinstance(getattr(m, "p", None), float) and "drop" in type(m).__name__.lower()
    }
    numbers = {n: getattr(module, n, 0.0) for n in ("attention_dropout", "dropout")}
    found = {n: p for n, p in {**numbers, **modules}.items() if isinstance(p, float) and p > 0}
    return not found.keys() <= {"attn_drop", "proj_drop"}

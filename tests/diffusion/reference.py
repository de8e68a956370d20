"""Equation 8 head by head, with explicit softmax matrices: shares no code with the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def heads_of(y: Tensor, heads: int) -> list[Tensor]:
    """(batch, tokens, heads · width) as one (batch, tokens, width) a head."""
    return list(y.chunk(heads, dim=-1))


def logits(
    q: list[Tensor],
    k: list[Tensor],
    x: Tensor,
    context: Tensor,
    terms: list[Any],
    prefix_q: str = "",
    prefix_k: str = "",
) -> list[Tensor]:
    """Unscaled logits of every head for one stream's queries and one stream's keys: Q Kᵀ + x U_Q (c S_K)ᵀ."""
    found = []
    for i, (q_i, k_i) in enumerate(zip(q, k, strict=True)):
        total = q_i @ k_i.mT
        for t in terms:
            up, down = getattr(t, f"{prefix_q}q_up", None), getattr(t, f"{prefix_k}k_down", None)
            if up is not None and down is not None:
                rows = slice(i * t.rank, (i + 1) * t.rank)
                total = total + t.scale * t.alpha / t.rank * (x @ up[rows].mT) @ (context @ down[rows].mT).mT
        found.append(total)
    return found


def values(
    v: list[Tensor], context: Tensor, w_o: Tensor, terms: list[Any], prefix_v: str, prefix_o: str
) -> list[Tensor]:
    """V W_O + c U_V S_O of every head, as dense (batch, keys, out)."""
    width = v[0].shape[-1]
    found = []
    for i, v_i in enumerate(v):
        total = v_i @ w_o[:, i * width : (i + 1) * width].mT
        for t in terms:
            down, up = getattr(t, f"{prefix_v}v_down", None), getattr(t, f"{prefix_o}out_up", None)
            if down is not None and up is not None:
                rows = slice(i * t.rank, (i + 1) * t.rank)
                total = total + t.scale * t.alpha / t.rank * (context @ down[rows].mT) @ up[:, rows].mT
        found.append(total)
    return found


def plain(attn: Any, x: Tensor, context: Tensor, terms: list[Any], mask: Tensor | float = 0.0) -> Tensor:
    """Attention over one stream; ``mask`` is added to the logits of every head."""
    h = attn.heads
    q, k, v = heads_of(attn.to_q(x), h), heads_of(attn.to_k(context), h), heads_of(attn.to_v(context), h)
    scale = q[0].shape[-1] ** -0.5
    out = attn.to_out[0]
    weighed = values(v, context, out.weight, terms, "", "")
    found = logits(q, k, x, context, terms)
    return sum((s * scale + mask).softmax(-1) @ o for s, o in zip(found, weighed, strict=True)) + out.bias


def joint(
    attn: Any, x: Tensor, context: Tensor | None, terms: list[Any], angles: tuple[Tensor, Tensor] | None = None
) -> tuple[Any, Any]:
    """Attention over two streams, picture and text, with q/k normalisation and rotation where there is; what either
    becomes.

    ``angles`` are (cos, sin) of the text's tokens, then the picture's.
    """
    h = attn.heads
    streams = {"": (x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)}
    if context is not None:
        norms = attn.norm_added_q, attn.norm_added_k
        streams["add_"] = (context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, *norms)
    begin = {"": 0 if context is None else context.shape[1], "add_": 0}

    def prepared(name: str, projection: Any, norm: Any) -> list[Tensor]:
        found = heads_of(projection(streams[name][0]), h)
        found = found if norm is None else [norm(y) for y in found]
        return found if angles is None else [rotated(y, angles, begin[name]) for y in found]

    q = {n: prepared(n, s[1], s[4]) for n, s in streams.items()}
    k = {n: prepared(n, s[2], s[5]) for n, s in streams.items()}
    scale = q[""][0].shape[-1] ** -0.5
    outs = {"": getattr(attn, "to_out", None), "add_": getattr(attn, "to_add_out", None)}
    result = []
    for name, (tokens, *_) in streams.items():
        out = outs[name][0] if name == "" and outs[name] is not None else outs[name]
        if name == "add_" and out is None:
            result.append(None)  # nobody reads it
            continue
        weight = torch.eye(x.shape[-1], dtype=x.dtype) if out is None else out.weight
        total = torch.zeros(()) if out is None else out.bias
        by_stream = {n: logits(q[name], k[n], tokens, s[0], terms, name, n) for n, s in streams.items()}
        to = {n: values(heads_of(s[3](s[0]), h), s[0], weight, terms, n, name) for n, s in streams.items()}
        for i in range(h):
            weights = torch.cat([by_stream[n][i] for n in streams], dim=-1).mul(scale).softmax(-1)
            total = total + weights @ torch.cat([to[n][i] for n in streams], dim=1)
        result.append(total)
    return result[0], result[1] if context is not None else None


def rotated(y: Tensor, angles: tuple[Tensor, Tensor], begin: int) -> Tensor:
    """Rotary embedding of (batch, tokens, width) as a product of complex numbers."""
    cos, sin = (a[begin : begin + y.shape[1], ::2].to(y.dtype) for a in angles)
    turned = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)

"""``torch.nn.MultiheadAttention``: torchvision, CLIP and open_clip, DETR, ``nn.TransformerEncoder``, pooling heads.

It computes its products in one call on its packed weights, so it gives way to a module behind its own signature. That
its products exist needs no trial: what it computes is written down. A class that changes its forward is refused.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites import Attention, Projection, Refusal, Replacement, Undo
from .mounting import exchange


class MultiheadHost:
    """See :class:`comcat.sites.Host`."""

    name = "multihead"

    def resembles(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def recognise(self, model: nn.Module, path: str, module: Any) -> Attention | Refusal:
        if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
            return Refusal(path, f"{type(module).__name__} gives torch.nn.MultiheadAttention a forward of its own")
        q, k, v = _projections(path, module)
        rows_sum_to_one = not (module.add_zero_attn or module.bias_v is not None)
        return Attention(
            path=path,
            host=self.name,
            mount="crossed",
            signature="query",
            heads=module.num_heads,
            width=module.head_dim,
            in_features=module.embed_dim,
            out_features=module.out_proj.out_features,
            scale=module.head_dim**-0.5,
            q=q,
            k=k,
            v=v,
            out=f"{path}.out_proj" if path else "out_proj",
            folds_value_bias=rows_sum_to_one and module.dropout == 0,
            keeps_key_bias=bool(module.add_zero_attn or module.bias_k is not None),
        )

    def observe(self, module: nn.Module) -> Undo:
        """Let it compute with a layer each for the rows of its packed weights, until undone."""
        module._modules |= {p.called: _Rows(module, p) for p in _projections("", module)}
        observed: Any = SimpleNamespace(
            num_heads=module.num_heads, batch_first=module.batch_first, core=partial(_attend_step_by_step, module)
        )
        vars(module)["forward"] = partial(NarrowMultihead.forward, observed)

        def undo() -> None:
            vars(module).pop("forward", None)
            for projection in _projections("", module):
                module._modules.pop(projection.called, None)

        return undo

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        assert replacement.whole is not None
        before: Any = model.get_submodule(attention.path)
        weights = [before.in_proj_weight, before.q_proj_weight, before.k_proj_weight, before.v_proj_weight]
        stands_for = [p for p in (*weights, before.in_proj_bias, before.bias_k, before.bias_v) if p is not None]
        parts = {f"core.{side}": stands_for for side in "qkv"} | {"core.proj": list(before.out_proj.parameters())}
        return exchange(model, attention.path, NarrowMultihead(before, replacement.whole), parts)


class NarrowMultihead(nn.Module):
    """Low-rank attention behind the signature of ``torch.nn.MultiheadAttention``.

    It says that its weights are not packed, so that ``nn.TransformerEncoderLayer`` calls it rather than a fused kernel.
    """

    comcat_module = True

    def __init__(self, before: Any, core: nn.Module) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = before.embed_dim, before.kdim, before.vdim
        self.num_heads, self.head_dim, self.batch_first = before.num_heads, before.head_dim, before.batch_first
        self.in_proj_weight = self.in_proj_bias = self.bias_k = self.bias_v = None
        self._qkv_same_embed_dim = False
        self.core = core

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``torch.nn.MultiheadAttention``."""
        first = self.batch_first
        mask = _merged(key_padding_mask, attn_mask, query, self.num_heads)
        y, weights = self.core(_batch(query, first), _batch(key, first), _batch(value, first), mask, need_weights)
        return _as_given(y, query, first), _averaged(weights, query, average_attn_weights)


class _Rows(nn.Module):
    """A linear layer that reads some rows of a module's packed weights; it has no parameters of its own."""

    def __init__(self, owner: nn.Module, projection: Projection) -> None:
        super().__init__()
        self.of = (owner, projection)  # in a tuple, so that the owner is no child

    def forward(self, x: Tensor) -> Tensor:
        owner, projection = self.of
        return F.linear(x, projection.weight(owner), projection.bias_or_none(owner))


def _attend_step_by_step(
    m: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """The attention as it stands, (batch, tokens, channels), through layers that can be watched."""
    q, k, v = (m.get_submodule(p.called)(x) for p, x in zip(_projections("", m), (query, key, value), strict=True))
    if m.bias_k is not None:
        k, v = (torch.cat([t, e.expand(len(t), -1, -1)], 1) for t, e in ((k, m.bias_k), (v, m.bias_v)))
    if m.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.mT * m.head_dim**-0.5
    attention = (logits if mask is None else logits + F.pad(mask, (0, k.shape[2] - key.shape[1]))).softmax(-1)
    o = F.dropout(attention, m.dropout if m.training else 0.0) @ v
    return m.out_proj(o.transpose(1, 2).flatten(2)), attention if need_weights else None


@torch.fx.wrap
def _batch(x: Tensor, batch_first: bool) -> Tensor:
    """Tokens as (batch, tokens, channels)."""
    return x[None] if x.ndim == 2 else x if batch_first else x.transpose(0, 1)


@torch.fx.wrap
def _as_given(y: Tensor, query: Tensor, batch_first: bool) -> Tensor:
    """What :func:`_batch` does, taken back."""
    return y[0] if query.ndim == 2 else y if batch_first else y.transpose(0, 1)


@torch.fx.wrap
def _averaged(weights: Tensor | None, query: Tensor, average: bool) -> Tensor | None:
    """Attention weights (batch, heads, queries, keys) as they are wanted."""
    if weights is None:
        return None
    weights = weights.mean(1) if average else weights
    return weights[0] if query.ndim == 2 else weights


@torch.fx.wrap
def _merged(padding: Tensor | None, attn_mask: Tensor | None, query: Tensor, heads: int) -> Tensor | None:
    """One additive mask, broadcastable to (batch, heads, queries, keys), of those of padding and attention."""
    merged: Tensor | None = None
    if attn_mask is not None:
        merged = _additive(attn_mask, query.dtype)
        merged = merged.unflatten(0, (-1, heads)) if merged.ndim == 3 else merged[None, None]
    if padding is not None:
        added = _additive(padding if padding.ndim == 2 else padding[None], query.dtype)[:, None, None]
        merged = added if merged is None else merged + added
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _projections(path: str, module: Any) -> tuple[Projection, Projection, Projection]:
    width = module.embed_dim
    packed = module._qkv_same_embed_dim
    found = []
    for i, side in enumerate("qkv"):
        seen = f"{path}.{side}_rows" if path else f"{side}_rows"
        names = ("in_proj_weight" if packed else f"{side}_proj_weight", "in_proj_bias")
        start = i * width if packed else 0
        found.append(Projection(path, start, start + width, names=names, bias_start=i * width, seen=seen))
    return tuple(found)  # type: ignore[return-value]

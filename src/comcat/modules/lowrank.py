"""What stands where a host's linear or attention module stood: thin factors behind the same signature."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .answers import StandsForLinear


class LowRankLinear(StandsForLinear):
    """``y = (x A) Bᵀ + b`` with A (in, rank) and B (out, rank): two thin linear layers, ``first`` and ``last``.

    Saves only while ``rank · (in + out) < in · out``.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.last = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))  # (..., in) → (..., rank) → (..., out)

    def product(self) -> Tensor:
        return self.last.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        return self.last.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.rank} → {self.out_features}"


class LowRankAttention(nn.Module):
    """Multi-head attention whose heads are narrower than they were (Xiao et al. 2023, Eq. 4).

    ``head_i = softmax(scale · (x U_i^Q + b_i^Q)(x S_i^K)ᵀ + mask) (x U_i^V + b_i^V)`` and ``y = Concat(head_i) S^O +
    b``, with the *original* scale 1/√k. One fused projection, one fused attention call, one output projection.

    ``qkv.bias`` holds the query bias, zeros for the keys (softmax ignores a key bias), and the value bias: zeros where
    it is folded into the output bias, which attention dropout forbids.

    Where ``rank_qk ≠ rank_vo`` the narrower channels are padded with zeros at run time while ``pad`` is true, because
    fused kernels want one width (:func:`one_width`); no parameter is spent on it.

    Args:
        in_features, out_features: widths of the model at either end. heads: number of heads.
        rank_qk, rank_vo: channels of a head in q and k, and in v. scale: multiplies the logits.
        qkv_bias, out_bias: which biases exist. norm, gate: modules of the host that act on the concatenated heads
            (scale norm; sigmoid gate computed from x), or None.
    """

    comcat_module = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int,
        rank_qk: int,
        rank_vo: int,
        *,
        scale: float,
        qkv_bias: bool = True,
        out_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        norm: nn.Module | None = None,
        gate: nn.Module | None = None,
        pad: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.heads, self.rank_qk, self.rank_vo, self.scale, self.pad = heads, rank_qk, rank_vo, scale, pad
        factory = {"device": device, "dtype": dtype}
        # rows of qkv that are queries, keys and values, in this order
        self.widths = (heads * rank_qk, heads * rank_qk, heads * rank_vo)
        self.qkv = nn.Linear(in_features, sum(self.widths), bias=qkv_bias, **factory)
        self.attention_dropout = attention_dropout
        self.norm, self.gate = norm, gate
        self.proj = nn.Linear(heads * rank_vo, out_features, bias=out_bias, **factory)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, in) → (batch, tokens, out).

        ``attn_mask`` is boolean or additive, broadcastable to (batch, heads, tokens, tokens). Tokens may lie on a grid,
        (batch, height, width, in).
        """
        rows = x.flatten(1, -2)  # (batch, tokens, in)
        q, k, v = self.qkv(rows).split(self.widths, dim=-1)
        q, k, v = self._heads(q, self.rank_qk), self._heads(k, self.rank_qk), self._heads(v, self.rank_vo)
        if self.pad:
            q, k, v = one_width(q, k, v)
        dropout = self.attention_dropout if self.training else 0.0
        o = fused_attention(q, k, v, attn_mask, dropout, is_causal, self.scale)  # (batch, heads, tokens, rank)
        o = o[..., : self.rank_vo].transpose(1, 2).flatten(2)
        if self.norm is not None:
            o = self.norm(o)
        if self.gate is not None:
            o = o * self.gate(rows).sigmoid()
        return self.proj_drop(self.proj(o)).unflatten(1, x.shape[1:-1])

    def _heads(self, part: Tensor, rank: int) -> Tensor:
        """(batch, tokens, heads · rank) → (batch, heads, tokens, rank)"""
        return part.unflatten(-1, (self.heads, rank)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, rank_qk={self.rank_qk}, rank_vo={self.rank_vo}, scale={self.scale:.4g}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.upgrade_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def upgrade_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Read what the first saved models have, ``q_bias`` and ``v_bias`` beside a ``qkv`` without bias, as
        ``qkv.bias``.

        Changes ``state_dict``, whose names of this module begin with ``prefix``.
        """
        apart = [state_dict.pop(f"{prefix}{name}", None) for name in ("q_bias", "v_bias")]
        known = next((bias for bias in apart if bias is not None), None)
        if known is None:
            return
        q, v = (known.new_zeros(n) if b is None else b for n, b in zip(self.widths[::2], apart, strict=True))
        state_dict[f"{prefix}qkv.bias"] = torch.cat([q, known.new_zeros(self.widths[1]), v])


@torch.fx.wrap  # one node of a traced graph: what it decides on is known only when it runs
def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, heads, tokens, channels) padded with zeros to the wider of their two widths.

    A CPU falls back to the unfused kernel where widths differ. On a card models whose kernels got two widths were seen
    to give wrong results (torch 2.11, H100, bfloat16, 65 tokens; why was not found out). Its kernels also read 16 bytes
    at a time, without a look at where a view begins: where heads do not begin at such a place, they are copied.
    """
    narrow, most = min(q.shape[-1], v.shape[-1]), max(q.shape[-1], v.shape[-1])
    size = q.element_size()
    moved = q.is_cuda and (narrow * size % 16 > 0 or most * size % 16 > 0)
    if moved:
        most = (most + 7) // 8 * 8
    return _of_width(q, most, moved), _of_width(k, most, moved), _of_width(v, most, moved)


def _of_width(part: Tensor, width: int, moved: bool) -> Tensor:
    if part.shape[-1] < width:
        return F.pad(part, (0, width - part.shape[-1]))
    return part.contiguous() if moved else part


@torch.fx.wrap
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """Fused attention, in float32 where it must give gradients in bfloat16 on a CPU.

    The backward kernel of float32 is several times as fast there (torch 2.15).
    """
    if not torch.jit.is_scripting():
        wants_gradients = torch.is_grad_enabled() and q.requires_grad
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and wants_gradients:
            return _attend_in_float32(q, k, v, attn_mask, dropout, is_causal, scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )


def _attend_in_float32(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *options: Any) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    dropout, is_causal, scale = options
    with torch.autocast("cpu", enabled=False):
        o = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
    return o.to(q.dtype)


class NarrowHeads(StandsForLinear):
    """The output projection for :class:`~comcat.modules.padded.PaddedRows`: the first ``rank`` channels of each head.

    (..., heads · width) → (..., out)
    """

    def __init__(
        self, heads: int, rank: int, width: int, out_features: int, *, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.heads, self.rank, self.width = heads, rank, width
        self.linear = nn.Linear(heads * rank, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = heads * width, out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.unflatten(-1, (self.heads, self.width))[..., : self.rank].flatten(-2))

    def product(self) -> Tensor:
        heads = self.linear.weight.unflatten(-1, (self.heads, self.rank))
        return F.pad(heads, (0, self.width - self.rank)).flatten(-2)

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias


class ConcatLinear(StandsForLinear):
    """Several linear layers on one input, side by side: a fused projection whose matrices are factorised apart."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        linears: list[Any] = layers
        self.in_features, self.out_features = linears[0].in_features, sum(layer.out_features for layer in linears)
        self.biased = any(layer.bias is not None for layer in linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def product(self) -> Tensor:
        return torch.cat([layer.weight for layer in self.layers])

    @property
    def bias(self) -> Tensor | None:
        if not self.biased:
            return None
        return torch.cat([_or_zeros(layer.bias, layer.weight) for layer in self.layers])


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros([weight.shape[0]]) if bias is None else bias

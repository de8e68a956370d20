"""Low-rank attention whose queries, keys and values may come from different inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .lowrank import fused_attention, one_width


class LowRankCrossAttention(nn.Module):
    """Multi-head attention whose heads are narrower than they were, with an input each for queries, keys and values.

    ``head_i = softmax(scale · q_i k_iᵀ + mask) v_i`` and ``y = Concat(head_i) S^O + b`` with the *original* scale
    (Xiao et al. 2023, Eq. 4). A key and a value that no token gives (``extra_k``, ``extra_v``) may follow those of the
    tokens, and after them zeros.

    Args:
        features: widths of what queries, keys and values are made from. out_features: width of the output.
        heads: number of heads. rank_qk, rank_vo: channels of a head in q and k, and in v.
        scale: multiplies the logits. biases: which of q, k, v and the output have one.
        extra: whether there is a key that no token gives. zero: whether a key of zeros comes last.
    """

    comcat_module = True

    def __init__(
        self,
        features: Sequence[int],
        out_features: int,
        heads: int,
        rank_qk: int,
        rank_vo: int,
        *,
        scale: float,
        biases: Sequence[bool] = (True, False, False, True),
        extra: bool = False,
        zero: bool = False,
        attention_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.heads, self.rank_qk, self.rank_vo, self.scale, self.zero = heads, rank_qk, rank_vo, scale, zero
        self.attention_dropout = attention_dropout
        factory = {"device": device, "dtype": dtype}
        self.q = nn.Linear(features[0], heads * rank_qk, bias=biases[0], **factory)
        self.k = nn.Linear(features[1], heads * rank_qk, bias=biases[1], **factory)
        self.v = nn.Linear(features[2], heads * rank_vo, bias=biases[2], **factory)
        self.extra_k = nn.Parameter(torch.zeros(heads * rank_qk, **factory)) if extra else None
        self.extra_v = nn.Parameter(torch.zeros(heads * rank_vo, **factory)) if extra else None
        self.proj = nn.Linear(heads * rank_vo, out_features, bias=biases[3], **factory)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """query (batch, queries, features), key and value (batch, keys, features) → (batch, queries, out).

        ``mask`` is additive, broadcastable to (batch, heads, queries, keys). The attention weights (batch, heads,
        queries, keys) come second, where they are wanted.
        """
        q = self.q(query).unflatten(-1, (self.heads, self.rank_qk)).transpose(1, 2)
        k, v = self.k(key), self.v(value)
        more = 0
        if self.extra_k is not None and self.extra_v is not None:
            more += 1
            k = torch.cat([k, self.extra_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.extra_v.expand(v.shape[0], 1, -1)], dim=1)
        if self.zero:
            more += 1
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        k = k.unflatten(-1, (self.heads, self.rank_qk)).transpose(1, 2)
        v = v.unflatten(-1, (self.heads, self.rank_vo)).transpose(1, 2)
        dropout = self.attention_dropout if self.training else 0.0
        o, attention = _attend(q, k, v, mask, more, dropout, self.scale, need_weights)
        return self.proj(o.transpose(1, 2).flatten(2)), attention

    def extra_repr(self) -> str:
        return f"heads={self.heads}, rank_qk={self.rank_qk}, rank_vo={self.rank_vo}, scale={self.scale:.4g}"


@torch.fx.wrap  # one node of a traced graph: what it decides on is known only when it runs
def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, more: int, dropout: float, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention over heads (batch, heads, tokens, width), fused where no one wants its weights.

    ``mask`` says nothing of the last ``more`` keys.
    """
    if mask is not None:
        mask = F.pad(mask, (0, more))
    if need_weights:
        logits = scale * q @ k.mT
        attention = (logits if mask is None else logits + mask).softmax(-1)
        attention = F.dropout(attention, dropout)
        return attention @ v, attention
    rank_vo = v.shape[-1]
    q, k, v = one_width(q, k, v)
    return fused_attention(q, k, v, mask, dropout, False, scale)[..., :rank_vo], None

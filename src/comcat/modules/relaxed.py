"""A rank that is not decided yet: one forward stands for all candidates (COMCAT, Xiao et al. 2023, §3.2, Figure 4).

Channels in order of importance make candidates nested: candidate ``a`` keeps the first ``r_a``. The paper's mixture
``Σ_a p_a U_a S_a`` over candidates is then *one* product with a soft mask between its factors,

    Σ_a p_a U_a S_a = U diag(m) S,    m_k = Σ_{a : r_a > k} p_a    (k from 0),

so that a search costs one forward instead of one per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .lowrank import LowRankLinear


class SoftRank(nn.Module):
    """A distribution over the candidate ranks of one site, and the mask over its channels that stands for it.

    ``probabilities = softmax((logits + noise) / temperature)``: Gumbel-softmax (Jang et al. 2016) while ``noise`` is
    drawn from a Gumbel distribution, the plain softmax while it is zero. With ``rank`` set, the mask is that of this
    rank alone.

    Args:
        candidates: ranks in rising order. full_rank: channels of the site.
    """

    def __init__(self, candidates: Sequence[int], full_rank: int) -> None:
        super().__init__()
        self.candidates, self.full_rank = tuple(candidates), full_rank
        self.logits = nn.Parameter(torch.zeros(len(self.candidates)))  # α of Eq. 5
        nested = torch.arange(full_rank) < torch.tensor(self.candidates)[:, None]
        self.register_buffer("nested", nested.float(), persistent=False)  # (candidates, full_rank)
        self.register_buffer("noise", torch.zeros(len(self.candidates)), persistent=False)
        self.temperature = 1.0
        self.rank: int | None = None

    def probabilities(self) -> Tensor:
        """(candidates,)"""
        noise = self.get_buffer("noise")
        return ((self.logits + noise) / self.temperature).softmax(-1)

    def mask(self) -> Tensor:
        """How much of every channel stays, (full_rank,): falling from 1."""
        nested = self.get_buffer("nested")
        if self.rank is not None:
            return (torch.arange(self.full_rank, device=nested.device) < self.rank).to(nested)
        return self.probabilities() @ nested

    @property
    def likeliest(self) -> int:
        """The position of the candidate of largest α."""
        return int(self.logits.argmax())

    def extra_repr(self) -> str:
        return f"candidates={self.candidates}, rank={self.rank}"


class RelaxedLinear(LowRankLinear):
    """A factorised linear layer at full rank whose channels are masked by a :class:`SoftRank`.

    ``y = (c + m ⊙ (x A − c)) Bᵀ + b``: a channel that is cut stays at its mean ``c`` (rank,), which is what moves to
    the bias when the rank is decided. Every candidate is exact, and so is their mixture.

    While the rank is decided, no more than what stays is computed and learned: ``kept`` are parameters that share the
    memory of the first channels of the whole factors, so that these remain the master weights.
    """

    def __init__(self, in_features: int, out_features: int, soft: SoftRank, *, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, soft.full_rank, bias=True, device=device, dtype=dtype)
        self.soft = soft
        self.register_buffer("center", torch.zeros(soft.full_rank, device=device, dtype=dtype))
        self.kept: tuple[nn.Parameter, nn.Parameter] | None = None

    def decide(self, rank: int | None) -> None:
        """Fix the rank, or with None let the distribution speak."""
        self.soft.rank = rank
        if rank is None:
            self.kept = None
            return
        first, last = self.first.weight, self.last.weight
        self.kept = (_like(first, first.data[:rank]), _like(last, last.data[:, :rank]))

    def product(self) -> Tensor:
        return (self.last.weight * self.soft.mask().to(self.last.weight.dtype)) @ self.first.weight

    @property
    def bias(self) -> Tensor:
        center = self.get_buffer("center")
        return self.last.bias + self.last.weight @ (center * (1 - self.soft.mask().to(center.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        center, rank = self.get_buffer("center"), self.soft.rank
        if rank is not None and self.kept is not None:
            first, last = self.kept
            bias = self.last.bias + self.last.weight.detach()[:, rank:] @ center[rank:]
            # (..., rank) in between is made again on the way back, and not held: a dense layer has no such thing to
            # hold
            return checkpoint(_through, x, first, last, bias, use_reentrant=False, preserve_rng_state=False)
        mask = self.soft.mask().to(x.dtype)
        return self.last(self.first(x) * mask + center * (1 - mask))


def _like(whole: Tensor, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part, requires_grad=whole.requires_grad)


def _through(x: Tensor, first: Tensor, last: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, first), last, bias)  # (..., in) → (..., rank) → (..., out)

"""Low-rank terms on the products of a frozen attention (Xiao et al. 2023, Eq. 8), as extra channels of its heads.

Eq. 8 adds ``U_Q S_Kᵀ`` to ``W_Q W_Kᵀ`` inside the softmax and ``U_V S_O`` to ``W_V W_O`` behind it, in every head. Both
sums are concatenations:

    q⁺ = [q, x U_Q]    k⁺ = [k, x' S_K]    v⁺ = [v, x' U_V]    W_O⁺ = [W_O; S_O]

with the scale of the *original* head width. So one fused attention call does it, no d × d product is formed, and the
terms of several adapters stand side by side. Since the extra channels join after whatever acts on q and k
(normalisation, rotary embeddings), they exist there as well.

A factor is kept under the name of its side, in the shape of a linear layer's weight, head by head. ``down`` reads
tokens into the rank, ``up`` leads out of it, as logits and outputs read keys and values:

    q_up (heads · rank, in)    U_Qᵀ        v_down (heads · rank, in)    U_Vᵀ
    k_down (heads · rank, in)  S_Kᵀ        out_up (out, heads · rank)   S_Oᵀ

The second stream of a joint attention (the text in SD3 and Flux) has its own, with the prefix ``add_``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDES = {"q": "q_up", "k": "k_down", "v": "v_down", "out": "out_up"}
PRODUCTS: dict[Product, str] = {"qk": "q_up", "vo": "out_up"}
CONTEXT = "add_"
"""Prefix of the factors of a joint attention's second stream."""

Side = Literal["q", "k", "v", "out"]
Product = Literal["qk", "vo"]
Init = Literal["zero", "random"]
Extra = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Extra channels of q, k and v."""


class LowRankTerms(nn.Module):
    """One adapter's terms at one attention.

    Args:
        widths: for every factor by name, the width of what it reads (of what it writes to, for ``out_up``). What is not
            named does not exist: an attention without output projection carries no VO term.
        heads, rank: heads of the attention and extra channels of each.
        alpha: the terms are multiplied by ``alpha / rank``, as in LoRA, and by ``scale``, which can change at any time.

    ``products`` says which products carry a term: ``("qk", "vo")``, or one of them.
    """

    def __init__(
        self, widths: Mapping[str, int], heads: int, rank: int, *, alpha: float | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = 1.0
        self.products: tuple[Product, ...] = tuple(p for p, first in PRODUCTS.items() if first in widths)
        for name, width in widths.items():
            shape = (width, heads * rank) if name.endswith(SIDES["out"]) else (heads * rank, width)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @property
    def strength(self) -> float:
        """What both products are multiplied by."""
        return self.scale * self.alpha / self.rank

    @torch.no_grad()
    def reset(self, init: Init, generator: torch.Generator) -> None:
        """Fill the factors. ``"zero"``: S_K and S_O are zero, so that the terms are; ``"random"``: none is, as in the
        paper.

        Random values are uniform in ±1/√in, torch's own start for a linear layer, which the paper's code uses.
        """
        for name, factor in self.named_parameters():
            bound = factor.shape[1] ** -0.5
            # drawn in float32 on the CPU, so that a seed means the same everywhere
            values = torch.empty(factor.shape).uniform_(-bound, bound, generator=generator)
            if init == "zero" and name.endswith((SIDES["k"], SIDES["out"])):
                values.zero_()
            if not factor.is_meta:
                factor.copy_(values)

    def forward(self, side: Side, x: Tensor, prefix: str = "") -> Tensor:
        """What one factor makes of its input.

        ``"q"``, ``"k"``, ``"v"``: ``x U`` of tokens (batch, tokens, in), as (batch, tokens, heads, rank), zeros where
        this stream has no such factor. ``"out"``: ``o S_O`` of the heads' extra outputs (batch, tokens, heads, rank),
        as (batch, tokens, out).
        """
        factor: Tensor | None = getattr(self, prefix + SIDES[side], None)
        if side == "out":
            assert factor is not None, "nobody asks for an output where there is none"
            return F.linear(x.flatten(2), factor.to(x.dtype))
        if factor is None:
            return x.new_zeros(*x.shape[:-1], self.heads, self.rank)
        y = F.linear(x, factor.to(x.dtype)).unflatten(-1, (self.heads, self.rank))
        # one factor of each product bears the strength
        return y if side == "k" or self.strength == 1 else y * self.strength

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"
        return f"{' and '.join(self.products)}, {sizes}"


class ExtraChannels(nn.Module):
    """The terms of all adapters at one attention, by name, in the order in which they came."""

    comcat_module = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []  # any text can name an adapter, but not a submodule
        self.terms = nn.ModuleList()

    def add(self, name: str, terms: LowRankTerms) -> None:
        self.names.append(name)
        self.terms.append(terms)

    def remove(self, name: str) -> None:
        index = self.names.index(name)
        del self.names[index], self.terms[index]

    def named(self, name: str) -> LowRankTerms | None:
        """The terms of one adapter, or None where it has none here."""
        return self.terms[self.names.index(name)] if name in self.names else None  # type: ignore[return-value]

    def part_in(self, product: Product) -> list[LowRankTerms]:
        """The terms that have a part in a product."""
        return [t for t in self.terms if product in t.products]  # type: ignore[union-attr,misc]

    def read(self, side: Side, x: Tensor, prefix: str = "") -> Tensor | None:
        """The extra channels of q, k or v for tokens (batch, tokens, in): (batch, tokens, heads, ranks), or None if
        there are none.
        """
        read = [t(side, x, prefix) for t in self.part_in("vo" if side == "v" else "qk")]
        return torch.cat(read, dim=-1) if len(read) > 1 else read[0] if read else None

    def write(self, y: Tensor, o: Tensor | None, prefix: str = "") -> Tensor:
        """Add ``o S_O`` to the output ``y`` (batch, tokens, out); ``o`` are the extra channels of the heads' outputs
        (batch, tokens, heads, ranks). Terms without a factor for this stream add nothing.
        """
        if o is None:
            return y
        terms = self.part_in("vo")
        for term, part in zip(terms, o.split([t.rank for t in terms], dim=-1), strict=True):
            if getattr(term, prefix + SIDES["out"], None) is not None:
                y = y + term("out", part, prefix).to(y.dtype)
        return y

    @property
    def heads(self) -> int:
        return self.terms[0].heads  # type: ignore[return-value]

    def ranks(self, product: Product) -> int:
        """Extra channels of a head in a product."""
        return sum(t.rank for t in self.part_in(product))

    def factor(self, name: str) -> Tensor | None:
        """One factor of all adapters side by side, strengths included: (heads, ranks, in), or (out, heads, ranks) of
        ``out_up``; None if there is none.
        """
        channels = 1 if name.endswith(SIDES["out"]) else 0
        found = []
        for term in self.terms:
            factor = getattr(term, name, None)
            if factor is not None:
                strength = term.strength if name.endswith((SIDES["q"], SIDES["v"])) else 1.0
                found.append(strength * factor.unflatten(channels, (term.heads, term.rank)))
        return torch.cat(found, dim=channels + 1) if found else None

    def join(self, x: Tensor, extra: Tensor) -> Tensor:
        """``[x, extra]``, channels of each head (batch, tokens, heads, ·)."""
        return _join(x, extra, x.shape[-1] + extra.shape[-1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Extra, *, scale: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`attend`."""
        return attend(q, k, v, extra, scale=scale, mask=mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, extra: Extra, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One fused attention call over the channels of the frozen heads and the extra ones (Eq. 8).

    Args:
        q, k, v: (batch, tokens, heads, width), the frozen attention's.
        extra: their extra channels, (batch, tokens, heads, ranks) each or None; q and k have equally many.
        scale: multiplies the logits, 1/√width of the frozen heads. mask: boolean or additive, broadcastable to
            (batch, heads, queries, keys).

    Returns:
        The heads' outputs (batch, queries, heads, width) and, where values have extra channels, those (batch, queries,
        heads, ranks).
    """
    width = v.shape[-1]
    ranks = 0 if extra[2] is None else extra[2].shape[-1]
    padded = padded_width(width + max(0 if e is None else e.shape[-1] for e in extra), q)
    q, k, v = (_join(x, e, padded).transpose(1, 2) for x, e in zip((q, k, v), extra, strict=True))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    o = o.transpose(1, 2)  # (batch, queries, heads, padded)
    return o[..., :width], o[..., width : width + ranks] if ranks else None


def padded_width(width: int, like: Tensor) -> int:
    """One width for q, k and v, since unequal ones fall back to the slow kernel; on a GPU kernels want multiples of 8
    in 16 bit and of 4 in 32.
    """
    return -(-width // 8) * 8 if like.is_cuda else width


def _join(x: Tensor, extra: Tensor | None, width: int) -> Tensor:
    """``[x, extra, 0]`` of the given width."""
    parts = [x] if extra is None else [x, extra.to(x.dtype)]
    if missing := width - sum(p.shape[-1] for p in parts):
        parts.append(x.new_zeros(1).expand(*x.shape[:-1], missing))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else x

"""The same product in another basis: its channels become directions of its factorisation, in the host's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linalg import Factorization
from ..sites import Attention, ProductSite, Projection, part


def change_basis(model: nn.Module, site: ProductSite, found: Factorization, mean: Tensor | None) -> Tensor | None:
    """Write a product's factors, most important channel first, over the projections that hold it: A L (B R)ᵀ = A Bᵀ.

    Args:
        mean: of the heads' outputs (heads · width), of a VO product; without one, the value bias stands for it.

    Returns:
        That mean in the new basis, (heads · width,), of a VO product; None of a QK product, whose key bias becomes zero
        (a constant along keys, which softmax ignores), unless there are keys besides those of tokens.
    """
    a = site.attention
    left, right = found.left, found.right  # (heads, width, width), or the values' width
    if site.kind == "qk":
        _turn_rows(model, a, a.q, left)
        _turn_rows(model, a, a.k, right)
        bias = a.k.bias_or_none(model)
        if a.keeps_key_bias:
            _turn_(part(model, a.path).bias_k, a, right)
        elif bias is not None:
            a.k.write_(model, bias=torch.zeros_like(bias))
        return None
    bias = a.v.bias_or_none(model)
    if mean is None:
        mean = left.new_zeros(a.v.count) if bias is None else bias.detach()
    rest = _turned(mean.to(left).view(a.heads, -1), left).flatten()
    _turn_rows(model, a, a.v, left)
    if a.keeps_key_bias:
        _turn_(part(model, a.path).bias_v, a, left)
    out = part(model, a.out).weight  # (out, heads · width)
    with torch.no_grad():
        turned = torch.einsum("ohk,hkr->ohr", out.to(right).view(-1, a.heads, a.value_width), right)
        out.copy_(turned.flatten(1).view_as(out))
    return rest


def _turn_rows(model: nn.Module, a: Attention, projection: Projection, basis: Tensor) -> None:
    weight, bias = projection.weight(model), projection.bias_or_none(model)
    heads = weight.to(basis).unflatten(0, (a.heads, -1))
    turned = None if bias is None else _turned(bias.to(basis).view(a.heads, -1), basis).flatten()
    projection.write_(model, torch.einsum("hki,hkr->hri", heads, basis).flatten(0, 1), turned)


def _turn_(extra: Tensor | None, a: Attention, basis: Tensor) -> None:
    """The key, or value, that no token gives, likewise."""
    if extra is not None:
        with torch.no_grad():
            extra.copy_(_turned(extra.to(basis).view(a.heads, -1), basis).view_as(extra))


def _turned(rows: Tensor, basis: Tensor) -> Tensor:
    return torch.einsum("hk,hkr->hr", rows, basis)

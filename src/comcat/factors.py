"""From Grams to the thin weights of a site, biases included.

A *statistic* says which Grams measure the error of a site; see :class:`Statistic`. The mathematics is the same for all
of them (:func:`comcat.linalg.factorize`); what differs per kind of site is where A and B are and what becomes of the
biases:

- **QK**: logits ``= x̃ᵀ M x'`` with ``A = [W_Q; b_Q]``, ``B = W_K``. The key bias adds a constant along keys, which
  softmax ignores, unless there are keys besides those of tokens; then ``B = [W_K; b_K]``.
- **VO**: ``A = W_V``, ``Bᵀ = W_O``. Attention rows sum to one, so the value bias and the mean of what truncation loses
  move to the output bias.
- **Linear**: one factor is the identity; the decomposition happens on the narrower side.
- **Hidden units**: not a product but a choice of units with the reading weight refitted
  (:mod:`comcat.linalg.elimination`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .errors import NumericsError
from .linalg import Elimination, Factorization, eliminate, factorize, gram, refit, refit_units
from .sites import Attention, HiddenSite, LinearSite, ProductSite, Site, part

Spectrum = Factorization | Elimination
"""Every size of a site at once, best first: what the choice of sizes and the weights of each are made from."""


class Statistic(Protocol):
    """What a site's error is measured by."""

    @property
    def name(self) -> str:
        """What it is called in plans and reports; the losses predicted under ``"loss"`` are in nats a picture."""
        ...

    @property
    def zero_biases(self) -> bool:
        """Whether the attention's biases are set to zero (a baseline's flaw)."""
        ...

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        """``G_A`` and ``G_B``, (heads, k, k) for products, (k, k) for linear layers with k the narrower side.

        For hidden units the covariance C of the units (units, units) and the metric G of what they add up to (out,
        out).
        """
        ...

    def mean(self, site: Site) -> Tensor | None:
        """Mean of what enters the right factor: the heads' outputs (heads · width), the input (in), or the units."""
        ...

    def covariance(self, site: Site) -> Tensor | None:
        """Covariance of all heads' outputs (heads · width, heads · width), for the joint refit of W_O."""
        ...

    def importance(self, model: nn.Module, site: HiddenSite) -> Tensor | None:
        """Scores of hidden units (units,) where a method orders them by those; None: by elimination."""
        ...


WEAK = "by the weights alone, a weak guide: what flows through them decides what is lost (statistic 'loss')."
"""Ends a sentence about what was measured by the statistic ``weights``."""


@dataclass(frozen=True)
class Weights:
    """The weights alone, ``C = I`` on both sides: the SVD of each product, as in COMCAT (Xiao et al. 2023), but exact
    with biases.
    """

    name: str = "weights"
    zero_biases: bool = False

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        if isinstance(site, HiddenSite):
            weight = part(model, site.down).get_parameter("weight").flatten(1)
            eyes = (torch.eye(n, dtype=torch.float64, device=weight.device) for n in (site.full, site.out_features))
            return tuple(eyes)  # type: ignore[return-value]
        a, b = weight_factors(model, site)
        return _gram_or_identity(a, b)

    def mean(self, site: Site) -> Tensor | None:
        return None

    def covariance(self, site: Site) -> Tensor | None:
        return None

    def importance(self, model: nn.Module, site: HiddenSite) -> Tensor | None:
        return None


@dataclass(frozen=True)
class PaperCode(Weights):
    """The same with every bias of the attention set to zero first, as COMCAT's published code has it."""

    name: str = "paper-code"
    zero_biases: bool = True

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        if isinstance(site, HiddenSite):
            return super().grams(model, site)
        a, b = weight_factors(model, site, with_bias=False)
        return _gram_or_identity(a, b)


@dataclass(frozen=True)
class Unilateral(Weights):
    """One side of each pair is decomposed, K and O, and the other absorbs the change (UniSVD): ``G_A = I``."""

    name: str = "unilateral"

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        g_a, g_b = super().grams(model, site)
        if not isinstance(site, ProductSite):
            return g_a, g_b
        return torch.eye(site.full_rank, dtype=g_a.dtype, device=g_a.device).expand_as(g_a), g_b


@dataclass(frozen=True)
class Products:
    """Thin weights of a QK site: q (heads, rank, in), q_bias (heads, rank) or None, k (heads, rank, in).

    ``k_bias`` and ``extra``, a key that no token gives, are (heads, rank), or None where there is none to keep.
    """

    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None = None
    extra: Tensor | None = None


@dataclass(frozen=True)
class Values:
    """Thin weights of a VO site: v (heads, rank, in), v_bias (heads, rank) or None, out (out, heads · rank), out_bias
    (out); ``extra`` is the value of a key that no token gives, (heads, rank) or None.
    """

    v: Tensor
    v_bias: Tensor | None
    out: Tensor
    out_bias: Tensor
    extra: Tensor | None = None


@dataclass(frozen=True)
class Linears:
    """Thin weights of a linear site: first (rank, in), last (out, rank), bias (out)."""

    first: Tensor
    last: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Units:
    """A narrower feed-forward: the units that stay (units,), and what reads them: (out, units) and (out,)."""

    kept: Tensor
    out: Tensor
    out_bias: Tensor


def weight_factors(
    model: nn.Module, site: ProductSite | LinearSite, *, with_bias: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The factors A (…, m, k) and B (…, n, k) of a site's product in float64; None stands for the identity.

    Raises:
        NumericsError: if a weight holds NaN or infinity; the message names the site.
    """
    if isinstance(site, LinearSite):
        weight = _checked(site, part(model, site.path).get_parameter("weight")).flatten(1)
        return (None, weight) if site.in_features <= site.out_features else (weight.mT, None)
    a = site.attention
    if site.kind == "qk":
        q, k = (_per_head(_checked(site, p.weight(model)), a) for p in (a.q, a.k))  # (heads, in, width)
        bias = a.q.bias_or_none(model)
        if bias is not None and with_bias:
            q = torch.cat([q, _checked(site, bias).view(a.heads, 1, -1)], dim=1)
        key_bias = a.k.bias_or_none(model) if a.keeps_key_bias else None
        if key_bias is not None and with_bias:
            k = torch.cat([k, _checked(site, key_bias).view(a.heads, 1, -1)], dim=1)
        return q, k
    v = _per_head(_checked(site, a.v.weight(model)), a)
    out = _checked(site, part(model, a.out).get_parameter("weight"))
    return v, out.view(a.out_features, a.heads, -1).transpose(0, 1)  # (heads, out, width)


def factorize_site(model: nn.Module, site: Site, statistic: Statistic) -> Factorization:
    """Factorise a site under a statistic: all ranks at once, best first."""
    return factorize(*statistic.grams(model, site))


def decompose_site(model: nn.Module, site: Site, statistic: Statistic) -> Spectrum:
    """Every size of a site under a statistic at once: its ranks, or the order in which its hidden units go."""
    if not isinstance(site, HiddenSite):
        return factorize_site(model, site, statistic)
    for up in site.ups:
        _checked(site, up.weight(model))
    scores = statistic.importance(model, site)
    if scores is not None:
        prices, order = scores.double().sort(descending=True, stable=True)
        return Elimination(order, prices)
    covariance, metric = statistic.grams(model, site)
    return eliminate(covariance, _checked(site, part(model, site.down).get_parameter("weight").flatten(1)), metric)


def spectra(model: nn.Module, sites: Mapping[str, Site], statistic: Statistic | None = None) -> dict[str, Spectrum]:
    """Decompose every site under a statistic: the input of :func:`comcat.allocate` and :func:`comcat.apply_`."""
    statistic = Weights() if statistic is None else statistic
    return {name: decompose_site(model, site, statistic) for name, site in sites.items()}


def narrow_site(model: nn.Module, site: HiddenSite, found: Elimination, keep: int, statistic: Statistic) -> Units:
    """The best ``keep`` hidden units, with the weight and bias that read them refitted, in float64."""
    down = part(model, site.down)
    weight = down.get_parameter("weight").detach().flatten(1).double()
    kept = found.kept(keep)
    out = refit_units(statistic.grams(model, site)[0], weight, kept)
    bias = weight.new_zeros(site.out_features) if down.bias is None else down.bias.detach().double()
    mean = statistic.mean(site)
    if mean is not None and keep < site.full:
        bias = bias + weight @ mean - out @ mean[kept]
    return Units(kept, out, bias)


def truncate_site(
    model: nn.Module,
    site: ProductSite | LinearSite,
    factorization: Factorization,
    rank: int,
    statistic: Statistic,
    head_ranks: tuple[int, ...] | None = None,
    joint_refit: bool = True,
) -> Products | Values | Linears:
    """The thin weights of a site at a rank, in float64.

    Args:
        head_ranks: fewer columns for some heads; the rest of their columns are zero.
        joint_refit: whether to refit W_O over all heads where the statistic knows their covariance.
    """
    left, right = factorization.truncate(rank)
    if head_ranks is not None:
        keep = torch.arange(rank, device=left.device) < torch.tensor(head_ranks, device=left.device)[:, None]
        left, right = left * keep[:, None], right * keep[:, None]
    if isinstance(site, LinearSite):
        return _truncate_linear(model, site, left, right, statistic)
    if site.kind == "qk":
        return _truncate_qk(model, site, left, right, statistic)
    return _truncate_vo(model, site, left, right, statistic, joint_refit)


def _truncate_qk(model: nn.Module, site: ProductSite, left: Tensor, right: Tensor, statistic: Statistic) -> Products:
    a = site.attention
    q, k = (_per_head(p.weight(model).double(), a) for p in (a.q, a.k))
    bias = a.q.bias_or_none(model)
    q_bias = None
    if bias is not None:
        q_bias = torch.einsum("hk,hkr->hr", bias.double().view(a.heads, a.width), left)
        q_bias = q_bias * 0 if statistic.zero_biases else q_bias
    k_bias, extra = (None if b is None else torch.einsum("hk,hkr->hr", b.to(right), right) for b in kept_keys(model, a))
    return Products((q @ left).mT, q_bias, (k @ right).mT, k_bias, extra)


def _truncate_vo(
    model: nn.Module, site: ProductSite, left: Tensor, right: Tensor, statistic: Statistic, joint_refit: bool
) -> Values:
    a = site.attention
    out_module = part(model, a.out)
    weight = out_module.get_parameter("weight").double().flatten(1)  # (out, heads · width)
    v = _per_head(a.v.weight(model).double(), a) @ left  # (heads, in, rank)
    bias = a.v.bias_or_none(model)
    out_bias = weight.new_zeros(a.out_features) if out_module.bias is None else out_module.bias.detach().double()
    value_bias = weight.new_zeros(a.heads, a.value_width) if bias is None else bias.detach().double().view(a.heads, -1)
    covariance, mean = statistic.covariance(site), statistic.mean(site)
    if joint_refit and covariance is not None:
        basis = torch.block_diag(*left)  # (heads · width, heads · rank)
        out = refit(covariance, basis, weight.mT).mT
    else:
        out = torch.einsum("ohk,hkr->ohr", weight.view(-1, a.heads, a.value_width), right).flatten(1)
    if statistic.zero_biases:
        return Values(v.mT, None, out, out_bias * 0)
    if not a.folds_value_bias:  # attention rows may not sum to one: the bias stays with the values
        v_bias = None if bias is None else torch.einsum("hk,hkr->hr", value_bias, left)
        extra = extra_value(model, a)
        return Values(
            v.mT, v_bias, out, out_bias,
            None if extra is None else torch.einsum("hk,hkr->hr", extra.to(left), left),
        )  # fmt: skip
    # o' = (o − b_V) T, so y' = o' S + b' equals y in the mean if b' = b_O + E[o] W_O − (E[o] − b_V) T S
    mean = value_bias.flatten() if mean is None else mean.double()
    thin_mean = torch.einsum("hk,hkr->hr", mean.view(a.heads, -1) - value_bias, left).flatten()
    return Values(v.mT, None, out, out_bias + weight @ mean - out @ thin_mean)


def kept_keys(model: nn.Module, a: Attention) -> tuple[Tensor | None, Tensor | None]:
    """The key bias, where it must stay, and the key that no token gives, (heads, width) each, or None."""
    if not a.keeps_key_bias:
        return None, None
    found = (a.k.bias_or_none(model), part(model, a.path).bias_k)
    return tuple(None if t is None else t.detach().view(a.heads, a.width) for t in found)  # type: ignore[return-value]


def extra_value(model: nn.Module, a: Attention) -> Tensor | None:
    """The value of the key that no token gives, (heads, width), or None."""
    value = part(model, a.path).bias_v if a.keeps_key_bias else None
    return None if value is None else value.detach().view(a.heads, a.width)


def _truncate_linear(model: nn.Module, site: LinearSite, left: Tensor, right: Tensor, statistic: Statistic) -> Linears:
    module = part(model, site.path)
    weight = module.get_parameter("weight").double().flatten(1)  # (out, in)
    if site.in_features <= site.out_features:
        first, last = left.mT, weight @ right
    else:
        first, last = left.mT @ weight, right
    bias = weight.new_zeros(site.out_features) if module.bias is None else module.bias.detach().double()
    mean = statistic.mean(site)
    if mean is not None:
        bias = bias + weight @ mean.double() - last @ (first @ mean.double())
    return Linears(first, last, bias)


def _gram_or_identity(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    grams = [None if f is None else gram(f) for f in (a, b)]
    known = next(g for g in grams if g is not None)
    eye = torch.eye(known.shape[-1], dtype=known.dtype, device=known.device)
    return tuple(eye if g is None else g for g in grams)  # type: ignore[return-value]


def _per_head(weight: Tensor, a: Attention) -> Tensor:
    """(heads · width, in) → (heads, in, width)."""
    return weight.detach().unflatten(0, (a.heads, -1)).mT


def _checked(site: Site, weight: Tensor) -> Tensor:
    weight = weight.detach().double()
    if not torch.isfinite(weight.sum()):  # any NaN or infinity survives a sum in float64
        raise NumericsError(f"{site.name}: its weights hold NaN or infinite values")
    return weight

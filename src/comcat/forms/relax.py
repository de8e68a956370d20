"""A model whose ranks are being searched: every site at full rank, its channels in order, a soft mask over them.

Nothing of a host's forward is replaced for attention. A product's factors at full rank have the shapes of W_Q and W_K
(of W_V and W_O) themselves: they are the same product in another basis, ``W_Q W_Kᵀ = (W_Q L)(W_K R)ᵀ`` with ``L Rᵀ =
I``, so they are written into the host's own projections, and the mask acts on what the projections put out. Hidden
units are put in order in the layers that make and read them, and the mask acts on the units. Linear layers give way to
a factorised layer while the search lasts, and come back as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..factors import Linears, Spectrum, Statistic, decompose_site, truncate_site
from ..hosts import host_of
from ..hosts.mounting import exchange
from ..hosts.narrowing import reorder_
from ..linalg import Elimination, Factorization
from ..modules.relaxed import RelaxedLinear, SoftRank
from ..sites import HiddenSite, LinearSite, Projection, Sites, Undo, channels_last, part
from .basis import change_basis
from .protocol import in_place_of


@dataclass(frozen=True)
class _Masked:
    """Some channels of a projection's output, all heads together, and where they rest when cut: zero, or their mean."""

    projection: Projection
    soft: SoftRank
    heads: int
    center: Tensor | None


class Relaxation:
    """What :func:`relax_` did: a :class:`SoftRank` for every site, in order; :meth:`fold` ends it."""

    def __init__(self, model: nn.Module, soft: Mapping[str, SoftRank]) -> None:
        self.model, self.soft = model, dict(soft)
        self.linears: dict[str, RelaxedLinear] = {}
        self.centers: dict[str, Tensor] = {}
        self._undo: list[Undo] = []

    def logits(self) -> Iterator[tuple[str, nn.Parameter]]:
        """α of every site, by the site's name."""
        return ((name, s.logits) for name, s in self.soft.items())

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that is no α; of a linear layer whose rank is decided, the part that stays."""
        kept: dict[str, nn.Parameter] = {}
        for name, linear in self.linears.items():
            if linear.kept is not None:
                kept[f"{name}.first.weight"], kept[f"{name}.last.weight"] = linear.kept
        alphas = {id(s.logits) for s in self.soft.values()}
        return ((n, kept.get(n, p)) for n, p in self.model.named_parameters() if id(p) not in alphas)

    def decide(self, ranks: Mapping[str, int] | None) -> None:
        """Fix the rank of every site, or with None let the distributions speak."""
        for name, soft in self.soft.items():
            rank = None if ranks is None else ranks[name]
            if name in self.linears:
                self.linears[name].decide(rank)
            else:
                soft.rank = rank

    def sample(self, temperature: float, generator: torch.Generator | None) -> None:
        """Draw Gumbel noise for every site; without a generator there is none."""
        for soft in self.soft.values():
            soft.temperature = temperature
            noise = soft.get_buffer("noise")
            if generator is None:
                noise.zero_()
            else:
                uniform = torch.rand(len(noise), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
                noise.copy_(-torch.log(-torch.log(uniform)))

    def fold(self) -> nn.Module:
        """Give back an ordinary dense model that computes what all channels together compute now; a second call does
        nothing.
        """
        self.decide(None)
        while self._undo:
            self._undo.pop()()
        return self.model


def relax_(
    model: nn.Module,
    sites: Sites,
    candidates: Mapping[str, Sequence[int]],
    statistic: Statistic | None,
    factorizations: Mapping[str, Spectrum] | None = None,
) -> Relaxation:
    """Put every site of a model at full rank under a soft mask, in place. The function computed at full masks is the
    same.

    Args:
        candidates: ranks of every site, rising. statistic: what orders the channels; None builds the structure alone,
            for a state to be loaded into. factorizations: of these sites under this statistic, if already known.
    """
    soft = {name: SoftRank(candidates[name], site.full) for name, site in sites.items()}
    device = next(model.parameters()).device
    for s in soft.values():
        s.to(device)
    relaxation = Relaxation(model, soft)
    known = factorizations or {}
    masked: dict[str, list[_Masked]] = {}
    observed: set[str] = set()
    for name, site in sites.items():
        found = None if statistic is None else known.get(name) or decompose_site(model, site, statistic)
        if isinstance(site, HiddenSite):
            assert found is None or isinstance(found, Elimination)
            center = torch.zeros(site.full, device=device, dtype=part(model, site.down).weight.dtype)
            relaxation.centers[name] = center
            if found is not None and statistic is not None:
                _put_in_order(model, site, found, statistic, center)
            handle = model.get_submodule(site.down).register_forward_pre_hook(_mask_input(soft[name], center))
            relaxation._undo.append(handle.remove)
            continue
        assert found is None or isinstance(found, Factorization)
        if isinstance(site, LinearSite):
            relaxation.linears[name], fold = _relax_linear(model, site, soft[name], found, statistic)
            relaxation._undo.append(fold)
            continue
        a = site.attention
        if a.path not in observed:
            observed.add(a.path)
            relaxation._undo.append(host_of(a).observe(model.get_submodule(a.path)))
        center = None
        if site.kind == "vo":
            center = torch.zeros(a.v.count, device=device, dtype=part(model, a.out).weight.dtype)
            relaxation.centers[name] = center
        if found is not None and statistic is not None:
            rest = change_basis(model, site, found, statistic.mean(site))
            if center is not None and rest is not None and site.attention.folds_value_bias:
                center.copy_(rest)
        projection = a.q if site.kind == "qk" else a.v
        masked.setdefault(projection.called, []).append(_Masked(projection, soft[name], a.heads, center))
    for path, parts in masked.items():
        handle = model.get_submodule(path).register_forward_hook(_mask_output(model, parts))
        relaxation._undo.append(handle.remove)
    return relaxation


def _relax_linear(
    model: nn.Module, site: LinearSite, soft: SoftRank, found: Factorization | None, statistic: Statistic | None
) -> tuple[RelaxedLinear, Undo]:
    dense = part(model, site.path)
    weight = dense.get_parameter("weight")
    relaxed = RelaxedLinear(site.in_features, site.out_features, soft, device=weight.device, dtype=weight.dtype)
    if found is not None and statistic is not None:
        thin = truncate_site(model, site, found, site.full_rank, statistic)
        assert isinstance(thin, Linears)
        mean = statistic.mean(site)
        with torch.no_grad():
            relaxed.first.weight.copy_(thin.first)
            relaxed.last.weight.copy_(thin.last)
            relaxed.last.bias.copy_(thin.bias)
            if mean is not None:
                relaxed.get_buffer("center").copy_(thin.first @ mean.to(thin.first))
    back = exchange(model, site.path, in_place_of(dense, relaxed))

    def fold() -> None:
        back()
        with torch.no_grad():
            weight.copy_((relaxed.last.weight.double() @ relaxed.first.weight.double()).view_as(weight))
            if dense.bias is None:  # training may have made one useful: keep it
                dense.bias = nn.Parameter(relaxed.last.bias.detach().clone())
            else:
                dense.bias.copy_(relaxed.last.bias)

    return relaxed, fold


def _put_in_order(model: nn.Module, site: HiddenSite, found: Elimination, statistic: Statistic, center: Tensor) -> None:
    """Number the hidden units anew, the most important first, in the layers that make and read them."""
    order, down = found.order, part(model, site.down)
    mean = statistic.mean(site)
    with torch.no_grad():
        for up in site.ups:
            rows, bias = up.weight(model), up.bias_or_none(model)
            here = order.to(rows.device)
            up.write_(model, rows[here], None if bias is None else bias[here])
        for path in site.between:
            reorder_(part(model, path), order)
        down.weight.copy_(down.weight[:, order.to(down.weight.device)])
        if mean is not None:
            center.copy_(mean[order])


def _mask_input(soft: SoftRank, center: Tensor) -> Callable[[nn.Module, tuple], tuple]:
    """A forward pre-hook: hidden units rest at their mean as far as they are cut, ``h → h ⊙ m + c ⊙ (1 − m)``."""

    def hook(module: nn.Module, inputs: tuple) -> tuple:
        mask, last = soft.mask().to(inputs[0].dtype), channels_last(module, inputs[0])
        masked = torch.addcmul(center.to(mask) * (1 - mask), last, mask)
        return (masked if last is inputs[0] else masked.movedim(-1, 1), *inputs[1:])

    return hook


def _mask_output(model: nn.Module, parts: Sequence[_Masked]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook: ``y → y ⊙ m + rest ⊙ (1 − m)`` on the masked channels of a projection, others as they are."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        last = channels_last(module, output)
        gain, shift = output.new_ones(last.shape[-1]), output.new_zeros(last.shape[-1])
        for p in parts:
            mask = p.soft.mask().to(output.dtype).repeat(p.heads)
            rest = torch.zeros_like(mask) if p.center is None else p.center.to(output.dtype)
            if p.projection.bias is not None:  # the host adds it after the module
                bias = p.projection.bias_or_none(model)
                rest = rest if bias is None else rest - bias.to(output.dtype)
            rows = torch.arange(len(gain), device=gain.device)[p.projection.channels]
            gain, shift = gain.index_copy(0, rows, mask), shift.index_copy(0, rows, rest * (1 - mask))
        masked = torch.addcmul(shift, last, gain)
        return masked if last is output else masked.movedim(-1, 1)

    return hook

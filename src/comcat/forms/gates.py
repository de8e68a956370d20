"""A model whose channels can be closed one by one: gates on hidden units and on the channels of attention's heads.

Nothing of a host's forward is replaced. One gate acts on Q, and closes a channel of Q and of K at once, since the
logits are sums over channels; one acts on V, and closes a channel of V and of what the output projection reads. Both
act on what the projections put out. Hidden units have theirs where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..factors import Spectrum
from ..hosts import host_of
from ..linalg import Elimination, Factorization
from ..modules.gates import Gate
from ..sites import HiddenSite, ProductSite, Projection, Site, Sites, Undo, channels_last, over_maps, part

GATED = ("qk", "vo", "units")
"""Kinds of sites that have channels of their own."""


class Gates(Mapping[str, Gate]):
    """What :func:`gate_` did: a gate for every site, by its name. :meth:`remove` ends it and leaves the weights."""

    def __init__(self, gates: Mapping[str, Gate], undo: list[Undo]) -> None:
        self._gates, self._undo = dict(gates), undo

    def __getitem__(self, name: str) -> Gate:
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

    def remove(self) -> None:
        """Let the model compute without gates again. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def gate_(model: nn.Module, sites: Sites, rests: Mapping[str, Tensor | None] | None = None) -> Gates:
    """Put gates on the channels of some sites (hidden units, QK and VO products), in place; all are open.

    Args:
        rests: where the channels of a site rest when they are closed, (heads · channels,), usually their mean. Used
            where it can be folded: into a bias of the layer that reads them. Zero otherwise.
    """
    gates: dict[str, Gate] = {}
    undo: list[Undo] = []
    projected: dict[str, list[_Gated]] = {}
    observed: set[str] = set()
    for name, site in sites.items():
        rest = None if rests is None or not _can_rest(model, site) else rests.get(name)
        gates[name] = gate = _gate_of(model, site, rest)
        if isinstance(site, HiddenSite):
            undo.append(model.get_submodule(site.down).register_forward_pre_hook(_before(gate)).remove)
            continue
        assert isinstance(site, ProductSite)
        a = site.attention
        if a.path not in observed:
            observed.add(a.path)
            undo.append(host_of(a).observe(model.get_submodule(a.path)))
        projection = a.q if site.kind == "qk" else a.v
        projected.setdefault(projection.called, []).append(_Gated(projection, gate))
    for path, parts in projected.items():
        undo.append(model.get_submodule(path).register_forward_hook(_after(model, parts)).remove)
    return Gates(gates, undo)


def _can_rest(model: nn.Module, site: Site) -> bool:
    """Whether a layer's bias can take up what closed channels leave."""
    if isinstance(site, HiddenSite):
        return part(model, site.down).bias is not None
    if not isinstance(site, ProductSite) or site.kind != "vo":
        return False
    return site.attention.folds_value_bias and part(model, site.attention.out).bias is not None


def _gate_of(model: nn.Module, site: Site, rest: Tensor | None) -> Gate:
    reader = part(model, site.down if isinstance(site, HiddenSite) else site.attention.out)  # type: ignore[union-attr]
    factory = {"device": reader.weight.device, "dtype": reader.weight.dtype}
    heads = 1 if isinstance(site, HiddenSite) else site.heads
    return Gate(heads, site.full, rest=None if rest is None else rest.detach().to(**factory), **factory)


def _before(gate: Gate) -> Callable[[nn.Module, tuple], tuple]:
    """A forward pre-hook: the layer reads gated units."""

    def hook(module: nn.Module, inputs: tuple) -> tuple:
        if isinstance(module, nn.Conv2d):
            return (gate(channels_last(module, inputs[0])).movedim(-1, 1), *inputs[1:])
        return (gate(inputs[0]), *inputs[1:])

    return hook


@dataclass(frozen=True)
class _Gated:
    """Some channels of a projection's output, all heads together."""

    projection: Projection
    gate: Gate


def _after(model: nn.Module, parts: Sequence[_Gated]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook: some channels that the projection puts out are gated."""

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output = channels_last(module, output)
        for p in parts:
            rows = torch.arange(output.shape[-1], device=output.device)[p.projection.channels]
            channels = output[..., rows]
            late = p.projection.bias_or_none(model) if p.projection.bias is not None else None
            if late is None:
                channels = p.gate(channels)
            else:  # the host adds its bias after the module
                late = late.to(output.dtype)
                channels = p.gate(channels + late) - late
            output = output.index_copy(-1, rows, channels)
        return output.movedim(-1, 1) if over_maps(module) else output

    return hook


# ---------------------------------------------------------------- the end of it: weights without gates


@torch.no_grad()
def fold_(model: nn.Module, sites: Sites, gates: Mapping[str, Gate]) -> None:
    """Write gates into the weights of a model that has none, in place: it then computes what the gated one computes."""
    for name, gate in gates.items():
        site, g = sites[name], gate.opening.detach().flatten()
        if isinstance(site, HiddenSite):
            _fold_reader(part(model, site.down), gate, scale=True)
            continue
        assert isinstance(site, ProductSite)
        a = site.attention
        projection = a.q if site.kind == "qk" else a.v
        if site.kind == "vo":
            _fold_reader(part(model, a.out), gate, scale=False)
        weight, bias = projection.weight(model), projection.bias_or_none(model)
        projection.write_(model, weight * g.to(weight)[:, None], None if bias is None else bias * g.to(bias))


def _fold_reader(reader: nn.Linear, gate: Gate, *, scale: bool) -> None:
    """What closed channels leave goes to the bias of the layer that reads them; with ``scale`` g to its columns."""
    weight, g = reader.weight.flatten(1), gate.opening.detach().flatten().to(reader.weight)
    if gate.rest is not None:
        assert reader.bias is not None
        reader.bias.add_(weight @ (gate.rest.to(weight) * (1 - g)))
    if scale:
        weight.mul_(g)


def selection(site: Site, order: Tensor) -> Spectrum:
    """Channels in an order, the first to keep first, as :func:`comcat.apply_` takes them under the weights alone.

    Args:
        order: (heads, channels), a permutation of the channels of every head.
    """
    heads, channels = order.shape
    if isinstance(site, HiddenSite):
        return Elimination(order[0], order.new_zeros(channels, dtype=torch.float64))
    chosen = torch.nn.functional.one_hot(order, channels).mT.double()  # (heads, channels, place)
    return Factorization(chosen, chosen, torch.ones(heads, channels, dtype=torch.float64, device=order.device))

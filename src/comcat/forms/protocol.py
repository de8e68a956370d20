"""What a form is: one kind of thing that a site can become. A form knows how to check, cost and build itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..factors import Spectrum, Statistic, Weights, decompose_site
from ..modules.maps import OverMaps
from ..plan import SitePlan
from ..sites import Site, Undo, dense_in, is_pointwise


@dataclass(frozen=True)
class Planned:
    """A site and what it becomes."""

    site: Any
    entry: SitePlan


@dataclass(frozen=True)
class Flow:
    """What flows through a site, a picture: rows (tokens), and query–key pairs that each head compares."""

    rows: float = 0.0
    pairs: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the weights of a form are made from.

    Attributes:
        statistic: what errors are measured by. spectra: decompositions of sites under it, as far as known.
        joint_refit: refit W_O over all heads where the statistic allows it.
        fill: whether to compute weights at all; without, a form builds its structure alone.
    """

    statistic: Statistic = field(default_factory=Weights)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    joint_refit: bool = True
    fill: bool = True

    def spectrum(self, model: nn.Module, site: Site) -> Any:
        """The decomposition of a site."""
        return self.spectra.get(site.name) or decompose_site(model, site, self.statistic)


class Form(Protocol):
    """One kind of thing that sites become."""

    @property
    def name(self) -> str:
        """What plans call it."""
        ...

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of sites that can take it."""
        ...

    def check(self, planned: Planned) -> None:
        """Raise PlanError where an entry is nothing that its site can become."""
        ...

    def parameters(self, site: Any, entry: SitePlan) -> float:
        """Parameters of the site as the entry has it, padding that is stored included."""
        ...

    def macs(self, site: Any, entry: SitePlan, flow: Flow) -> float:
        """Multiply-accumulates a picture."""
        ...

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        """Make all sites of one owner what their entries say; the returned function takes it back, bit for bit."""
        ...


def factory_of(module: nn.Module) -> dict[str, Any]:
    """The device and type of a layer, for a layer to be built beside it."""
    weight = dense_in(module).weight if dense_in(module) is not None else module.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def in_place_of(layer: nn.Module, module: nn.Module) -> nn.Module:
    """A module that reads channels last as what stands where a linear layer stood, or a 1×1 convolution."""
    return OverMaps(module) if is_pointwise(dense_in(layer)) else module


def fill(target: Tensor | None, value: Tensor | None) -> None:
    """Copy a value into a parameter, whatever its type and shape, where there are both."""
    if target is None or value is None:
        return
    with torch.no_grad():
        target.copy_(value.reshape(target.shape))

"""What a budget is spent in."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..forms import Flow, macs_of, parameters_of
from ..plan import SitePlan
from ..sites import AnySite, Sites


class Cost(Protocol):
    """What a site costs as a plan has it, or as it stands (None)."""

    def __call__(self, site: AnySite, entry: SitePlan | None) -> float: ...

    def on_fewer_tokens(self, share: float) -> Cost:
        """The same where only a share of the rows flows through (those in front included)."""
        ...


@dataclass(frozen=True)
class Parameters:
    """Weights, biases and padding that are stored."""

    def __call__(self, site: AnySite, entry: SitePlan | None) -> float:
        return parameters_of(site, entry)

    def on_fewer_tokens(self, share: float) -> Parameters:
        return self


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates a picture, given what flows through each site, by name."""

    flows: Mapping[str, Flow]

    def __call__(self, site: AnySite, entry: SitePlan | None) -> float:
        return macs_of(site, entry, self.flows.get(site.name, Flow()))

    def on_fewer_tokens(self, share: float) -> Macs:
        return Macs({name: Flow(flow.rows * share, flow.pairs * share**2) for name, flow in self.flows.items()})


@dataclass(frozen=True)
class Mixed:
    """Several costs at given prices, ``Σ price · cost``."""

    priced: tuple[tuple[float, Cost], ...]

    def __call__(self, site: AnySite, entry: SitePlan | None) -> float:
        return sum(price * cost(site, entry) for price, cost in self.priced)

    def on_fewer_tokens(self, share: float) -> Mixed:
        return Mixed(tuple((price, cost.on_fewer_tokens(share)) for price, cost in self.priced))


LITTLE = 0.1
"""A share of a model's parameters below which a user is warned."""


def share_that_can_shrink(model: nn.Module, sites: Sites) -> float:
    """The parameters that a model's sites hold, as a share of all that it has."""
    layers = {path for site in sites.values() for path in site.modules}
    held = {id(p): p.numel() for path in layers for p in model.get_submodule(path).parameters()}
    return sum(held.values()) / max(1, sum(p.numel() for p in model.parameters()))


def warn_of_little(model: nn.Module, sites: Sites) -> None:
    """Warn where less than a tenth of a model can shrink, with the commonest reasons."""
    share = share_that_can_shrink(model, sites)
    if share >= LITTLE:
        return
    reasons = [reason for reason, _ in Counter(r.reason for r in sites.refused).most_common(3)]
    because = f": {'; '.join(reasons)}" if reasons else ", the rest is no attention and no linear layer"
    warnings.warn(f"only {share:.1%} of the parameters of {type(model).__name__} can shrink{because}", stacklevel=5)

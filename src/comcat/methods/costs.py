"""What a budget is spent in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..forms import Flow, macs_of, parameters_of
from ..plan import SitePlan
from ..sites import AnySite


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

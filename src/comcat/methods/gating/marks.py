"""Which channels are marked to go, by what closing each gate is predicted to lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...factors import Spectrum
from ...forms.gates import selection
from ...linalg import Elimination, Factorization
from ...modules.gates import Gate
from ...plan import Plan
from ...sites import HiddenSite, Site, Sites
from ...statistics import examples_of, show


@dataclass(frozen=True)
class Marks:
    """An order of the channels of every site, and the plan that says how many stay.

    ``orders`` holds (heads, channels) a site: the channels of each head, the first to stay first.
    """

    plan: Plan
    orders: Mapping[str, Tensor]

    def last(self, name: str) -> Tensor:
        """The marked channels of a site by head, (heads, marked): those of a column go together."""
        order, entry = self.orders[name], self.plan.sites.get(name)
        return order[:, order.shape[1] if entry is None else entry.keep :]

    def mask(self, name: str) -> Tensor:
        """Which channels are marked, (heads, channels)."""
        order = self.orders[name]
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, self.last(name), True)

    def count(self) -> int:
        """Marked channels of all sites together."""
        return sum(self.last(name).numel() for name in self.orders)

    def returned(self, before: Marks) -> int:
        """How many channels were marked before and are not now."""
        return sum(int((before.mask(n) & ~self.mask(n)).sum()) for n in self.orders)

    def selections(self, sites: Sites) -> dict[str, Spectrum]:
        """What :func:`comcat.apply_` cuts by, under the weights alone."""
        return {name: selection(sites[name], order) for name, order in self.orders.items()}


def scores(model: nn.Module, gates: Mapping[str, Gate], batches: Iterable, *, seed: int) -> dict[str, Tensor]:
    """What closing each gate by itself is predicted to lose, in nats a picture, (heads, channels) a site.

    ``½ E[(g ∂L/∂g)²]`` over pictures, the labels drawn from the model's own predictions: the diagonal of the Fisher
    information, at the distance that the gate has to go (Molchanov et al. 2019, of whole channels). It needs no labels.
    """
    totals = {name: torch.zeros_like(gate.opening, dtype=torch.float64) for name, gate in gates.items()}

    def begin(count: int) -> None:
        for gate in gates.values():
            gate.watch(count)

    def end() -> None:
        for name, gate in gates.items():
            if gate.watched is not None and gate.watched.grad is not None:
                square = gate.watched.grad.double().square().sum(0).view_as(totals[name])
                totals[name] += square * gate.opening.detach().double().square()

    home = next(model.parameters())
    labels = torch.Generator().manual_seed(seed)
    try:
        seen = show(model, examples_of(model, batches), home.device, begin, end, labels)
    finally:
        for gate in gates.values():
            gate.unwatch()
    return {name: total / (2 * seen) for name, total in totals.items()}


def ranked(sites: Sites, found: Mapping[str, Tensor]) -> tuple[dict[str, Spectrum], dict[str, Tensor]]:
    """Scores as spectra to choose by, and the orders of the channels, both from the largest score to the smallest."""
    result: dict[str, Spectrum] = {}
    orders: dict[str, Tensor] = {}
    for name, score in found.items():
        prices, orders[name] = score.sort(dim=1, descending=True, stable=True)
        result[name] = _spectrum(sites[name], prices, orders[name])
    return result, orders


def _spectrum(site: Site, prices: Tensor, order: Tensor) -> Spectrum:
    """Prices (heads, channels) of what goes: of a product half the squares of its singular values."""
    if isinstance(site, HiddenSite):
        return Elimination(order[0], prices[0])
    return Factorization(prices.new_empty(0), prices.new_empty(0), (2 * prices).sqrt())

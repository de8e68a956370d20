"""How far fewer tokens move a model's output on a few pictures, and what every share of them loses by that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...apply import apply_
from ...errors import ModelError, NumericsError
from ...hosts import find_sites
from ...hosts.classes import classes_of
from ...measure.running import call, evaluating
from ...plan import Plan, SitePlan
from ...statistics.examples import Example, examples_of
from ...statistics.losses import divergence
from ..ladders import AS_IT_IS, Choice
from .blocks import TokenLadder
from .measurements import Measurements
from .offer import Offer

MEASURED = (0.8, 0.5)
"""Shares of the tokens at which each block is tried."""


class Meter:
    """How far a plan moves a model's output on some pictures; what was measured is kept in a folder ``out``."""

    def __init__(
        self, model: nn.Module, shown: Sequence[Example], progress: bool = False, out: Path | None = None
    ) -> None:
        self.model, self.shown, self.progress = model, shown, progress
        self.measured = Measurements(out, model, shown)
        self.classes = classes_of(model)
        self.sites = find_sites(model)
        self.count = sum(example.count for example in shown)
        self.before = self._outputs()

    def loss(self, entries: Mapping[str, SitePlan], **material: Any) -> float:
        """Divergence in nats a picture with some entries of a plan applied; ``material`` goes to
        :func:`comcat.apply_`, for entries that need weights.
        """
        if not entries:
            return 0.0
        if not material and (known := self.measured.loss(entries)) is not None:
            return known
        handle = apply_(self.model, Plan(sites=entries), **{"sites": self.sites, **material})
        try:
            after = self._outputs()
        finally:
            handle.revert()
        found = sum(divergence(b, a, self.classes) for b, a in zip(self.before, after, strict=True)) / self.count
        if not math.isfinite(found):
            raise NumericsError("the model's output holds NaN or infinite values on the calibration pictures")
        if not material:
            self.measured.keep(entries, found)
        return found

    def _outputs(self) -> list[Any]:
        p = next(self.model.parameters())
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return [call(self.model, e.on(p.device, p.dtype, gradients=False)) for e in self.shown]


def token_ladders(offer: Offer, meter: Meter) -> list[TokenLadder]:
    """What every block loses at every share that is offered to it."""
    found, moved = [], not offer.sites
    tries = [
        (site, share) for site in offer.sites for share in (offer.shares(site) if offer.how == "grid" else MEASURED)
    ]
    losses = _losses(meter, [{site.name: offer.entry(site, share)} for site, share in tries])
    for site in offer.sites:
        tried = [(share, loss) for (of, share), loss in zip(tries, losses, strict=True) if of is site]
        moved = moved or any(loss != 0 for _, loss in tried)
        law = _law(tried)
        choices = [Choice({site.name: offer.entry(site, s)}, law(s), 1.0) for s in sorted(offer.shares(site))]
        found.append(TokenLadder(site, (*choices, AS_IT_IS)))
    if not moved:
        raise ModelError(
            "the model's output is the same however few tokens its blocks run on, as with a head of zeros: there is "
            "nothing to choose by; train the head first, or leave it out"
        )
    return found


def _losses(meter: Meter, tries: Sequence[Mapping[str, SitePlan]]) -> list[float]:
    """What is measured of some entries, one after the other; a KeyboardInterrupt says how far it came."""
    from tqdm import tqdm

    losses: list[float] = []
    try:
        for entries in tqdm(tries, desc="tokens", unit="try", disable=not meter.progress, leave=False):
            losses.append(meter.loss(entries))
    except KeyboardInterrupt:
        if meter.measured.path is None:
            raise
        raise KeyboardInterrupt(f"after {len(losses)} of {len(tries)} tries with fewer tokens") from None
    return losses


def _law(tried: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The loss at any share, out of some: a straight line between logarithms of what goes and what is lost."""
    gone = np.log([1 - share for share, _ in tried])
    lost = np.log([max(loss, 1e-12) for _, loss in tried])
    order = np.argsort(gone)
    gone, lost = gone[order], np.maximum.accumulate(lost[order])  # noise must not make more merging look better

    def at(share: float) -> float:
        x = math.log(1 - share)
        if x < gone[0] or len(gone) == 1:
            return float(np.exp(lost[0] + 2 * (x - gone[0])))  # small changes cost with their square
        n = min(int(np.searchsorted(gone, x)), len(gone) - 1)
        slope = (lost[n] - lost[n - 1]) / (gone[n] - gone[n - 1]) if n else 2.0
        return float(np.exp(lost[n] + slope * (x - gone[n])))

    return at


def one_of(model: nn.Module, shown: Sequence[Example]) -> Any:
    """The first picture, as the model is called with it."""
    p = next(model.parameters())
    return shown[0].first(1).on(p.device, p.dtype, gradients=False)


def shown_of(model: nn.Module, calibration: Iterable | None, pictures: int, progress: bool) -> list[Example]:
    return [] if calibration is None else list(examples_of(model, calibration, pictures))

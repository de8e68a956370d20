"""Published ways to choose hidden units, as statistics: what the closed-form elimination is compared with.

A score orders the units; what reads them is then left as it is, or refitted as ours is, so that the choice and the
refit can be told apart.

- **Magnitude**: ``‖w_j^in‖ · ‖w_j^out‖`` over a unit's rows and column (after Han et al. 2015, for whole units).
- **Taylor**: the mean over pictures of ``(Σ_tokens h_j ∂L/∂h_j)²`` (Molchanov et al. 2019, first order), the labels
  drawn from the model's own predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...factors import Statistic, Weights
from ...sites import HiddenSite, Site, Sites, part
from ...statistics import calibrate, watch_gradients


@dataclass(frozen=True)
class Scored:
    """Hidden units in the order of some scores, refitted under a statistic; see :class:`comcat.factors.Statistic`.

    Under :class:`comcat.factors.Weights` nothing is refitted: units are cut and their mean is forgotten.
    """

    name: str
    base: Statistic = field(default_factory=Weights)
    scores: Mapping[str, Tensor] | None = None
    zero_biases: bool = False

    def importance(self, model: nn.Module, site: HiddenSite) -> Tensor | None:
        return magnitudes(model, site) if self.scores is None else self.scores.get(site.name)

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        return self.base.grams(model, site)

    def mean(self, site: Site) -> Tensor | None:
        return self.base.mean(site)

    def covariance(self, site: Site) -> Tensor | None:
        return self.base.covariance(site)


def magnitudes(model: nn.Module, site: HiddenSite) -> Tensor:
    """``‖w_j^in‖ · ‖w_j^out‖`` of every unit, (units,), float64; of a gated one the rows of both its layers."""
    rows = [up.weight(model).detach().double().square().sum(1) for up in site.ups]
    column = part(model, site.down).get_parameter("weight").detach().flatten(1).double().square().sum(0)
    return (sum(rows[1:], rows[0]) * column).sqrt()


def taylor_scores(model: nn.Module, batches: Iterable, sites: Sites, *, seed: int = 0) -> dict[str, Tensor]:
    """The first-order Taylor score of every hidden unit among some sites, by site, (units,) each, float64."""
    hidden = {name: site for name, site in sites.items() if isinstance(site, HiddenSite)}
    totals = {name: torch.zeros(site.full, dtype=torch.float64) for name, site in hidden.items()}

    def add(name: str, h: Tensor, gradient: Tensor, pictures: int) -> None:
        moved = (h * gradient).reshape(pictures, -1, h.shape[-1]).sum(1)  # (pictures, units)
        totals[name] += moved.double().square().sum(0).cpu()

    seen = watch_gradients(model, batches, {site.down: name for name, site in hidden.items()}, add, seed=seed)
    return {name: total / max(seen, 1) for name, total in totals.items()}


def scored_units(
    kind: str, model: nn.Module, sites: Sites, batches: Iterable, *, refit: bool = False, seed: int = 0
) -> Scored:
    """The statistic of a baseline: ``kind`` is ``"magnitude"`` or ``"taylor"``; pictures are gone through twice if need
    be.
    """
    base = calibrate(model, batches, statistic="activation", sites=sites) if refit else Weights()
    scores = taylor_scores(model, batches, sites, seed=seed) if kind == "taylor" else None
    return Scored(kind, base, scores)

"""The statistics that methods are built on: what a calibration has seen, by site and side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..factors import Weights
from ..settings import StatisticName
from ..sites import HiddenSite, Site
from .moments import Moments

STATISTICS: tuple[StatisticName, ...] = ("weights", "activation", "loss")


@dataclass(frozen=True)
class Statistics:
    """What calibration has seen: moments per site and side.

    Attributes:
        name: ``"activation"`` or ``"loss"``. pictures: how many were seen. rows: mean rows (tokens) a picture at each
            site.
        pairs: query–key pairs a picture at each attention site.
    """

    name: str
    pictures: int
    moments: Mapping[tuple[str, str], Moments]
    rows: Mapping[str, float]
    pairs: Mapping[str, float]
    unreached: tuple[str, ...] = ()
    zero_biases: bool = False

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        """``G_A`` and ``G_B`` of a site (:class:`comcat.factors.Statistic`), shrunk towards those of the weights."""
        if isinstance(site, HiddenSite):
            return self._hidden_grams(model, site)
        prior_a, prior_b = (g if g.ndim == 3 else g[None] for g in Weights().grams(model, site))
        device = self._device(site, prior_a.device)
        g_a, g_b = self._side(site, "a", prior_a.to(device)), self._side(site, "b", prior_b.to(device))
        return (g_a[0], g_b[0]) if site.kind == "linear" else (g_a, g_b)

    def _hidden_grams(self, model: nn.Module, site: HiddenSite) -> tuple[Tensor, Tensor]:
        """The units' covariance and the metric of what they add up to; a site never reached has its weights alone."""
        units, metric = Weights().grams(model, site)
        seen, gradient = self.moments.get((site.name, "h")), self.moments.get((site.name, "g"))
        if gradient is None and self.name == "loss":
            gradient = self.moments.get((site.down, "b"))
        if seen is not None:
            units = seen.shrunk_to_diagonal()[0]
        return units, metric if gradient is None else gradient.shrunk(metric.to(gradient.outer.device)[None])[0]

    def mean(self, site: Site) -> Tensor | None:
        if isinstance(site, HiddenSite):
            seen = self.moments.get((site.name, "h"))
            return None if seen is None else seen.mean
        narrow_in = site.kind == "linear" and site.in_features <= site.out_features
        found = self.moments.get((site.name, "joint" if site.kind == "vo" else "a" if narrow_in else "mean"))
        return None if found is None else found.mean

    def covariance(self, site: Site) -> Tensor | None:
        found = self.moments.get((site.name, "joint"))
        if found is None or site.kind != "vo":
            return None
        moment = found.moment
        return found.shrunk(torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1)))[0]

    def importance(self, model: nn.Module, site: HiddenSite) -> Tensor | None:
        return None

    def _device(self, site: Site, otherwise: torch.device) -> torch.device:
        found = (m.outer.device for (name, _), m in self.moments.items() if name == site.name)
        return next(found, otherwise)  # a site never reached has its weights alone

    def _side(self, site: Site, side: Literal["a", "b"], prior: Tensor) -> Tensor:
        found = self.of(site, side)
        return prior if found is None else found.shrunk(prior)

    def of(self, site: Site, side: Literal["a", "b"]) -> Moments | None:
        """What was recorded on a side of a site, None where nothing was.

        A head's outputs are blocks of the joint moments.
        """
        joint = self.moments.get((site.name, "joint")) if side == "a" else None
        return self.moments.get((site.name, side)) if joint is None else joint.by_group()

"""What a run of pruning may cut, what that costs, and the plan for a share to save: known before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import ModelError, SettingsError
from ...factors import Spectrum, Statistic, Weights, spectra
from ...forms.basis import change_basis
from ...forms.gates import GATED
from ...hosts import find_sites
from ...linalg import Elimination, Factorization
from ...plan import MadeFor, Plan
from ...sites import HiddenSite, ProductSite, Site, Sites
from ..allocate import allocate, describe
from ..costs import Cost
from ..prepare import budget_of, calibrated, chosen_sites
from ..request import blank_spectrum
from .settings import PruneSettings

GRADIENTS = Weights(name="loss")
"""What plans are said to be made by whose scores are gradients of gates: their losses are nats a picture."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What may be cut and what it costs.

    Attributes:
        sites: hidden units and products whose channels may go. total: what the whole model costs.
    """

    model: nn.Module
    settings: PruneSettings
    sites: Sites
    total: float
    cost: Cost
    made_for: MadeFor

    def plan(self, found: Mapping[str, Spectrum], reduce: float, statistic: Statistic = GRADIENTS) -> Plan:
        """The plan of least predicted loss that saves a share. Raises BudgetError where none does."""
        s = self.settings
        return allocate(
            self.model, statistic, reduce=reduce, budget=s.budget, sites=self.sites, factorizations=found,
            multiple=s.multiple, tie=s.tie, total=self.total, cost=self.cost,
            made_for=self.made_for,
        )  # fmt: skip

    def only(self, names: Iterable[str]) -> Ground:
        """The same of some sites."""
        names = set(names)
        return replace(self, sites=self.sites.without([n for n in self.sites if n not in names]))


def survey(model: nn.Module, settings: PruneSettings, example: Tensor) -> Ground:
    """Find what may be cut, and make sure that it can save what is asked for: it takes seconds.

    Args:
        example: one picture (1, channels, height, width), to count MACs by.

    Raises:
        ModelError, SettingsError: where nothing can be cut. BudgetError: for a saving that is out of reach.
    """
    asked, whole = settings.closed_form(), find_sites(model)
    _check_kinds(settings)
    sites = chosen_sites(whole, asked).only(*GATED)
    if not len(sites):
        raise ModelError(f"nothing in {', '.join(settings.sites) or 'this model'} has channels that gates can close")
    total, cost = budget_of(model, asked, sites, Weights(), example)
    made_for = describe(model, whole, sites)
    ground = Ground(model=model, settings=settings, sites=sites, total=total, cost=cost, made_for=made_for)
    ground.plan({name: blank_spectrum(site) for name, site in sites.items()}, settings.reduce)
    return ground


def _check_kinds(settings: PruneSettings) -> None:
    if "linear" in settings.sites:
        raise SettingsError(
            f"got sites={', '.join(settings.sites)}, expected {', '.join(GATED)} or path prefixes: "
            "a linear layer has no channels of its own; those between two of them are units"
        )


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """Where the closed form begins: its spectra, the order of the channels by it, and where they rest when shut."""

    statistic: Statistic
    spectra: Mapping[str, Spectrum]
    orders: Mapping[str, Tensor]
    rests: Mapping[str, Tensor | None]


def begin_closed(model: nn.Module, ground: Ground, calibration: Iterable, *, progress: bool = False) -> ClosedForm:
    """Calibrate and decompose, and write heads in the basis of their factors, in place: the model computes the same."""
    asked = ground.settings.closed_form()
    statistic: Statistic = Weights()
    sites = ground.sites
    if asked.statistic != "weights":
        measured = calibrated(model, calibration, asked, sites, progress)
        statistic, sites = measured, sites.without(measured.unreached)
    found = spectra(model, sites, statistic)
    rests = {name: _rest(model, site, found[name], statistic) for name, site in sites.items()}
    orders = {name: order_of(site, found[name]) for name, site in sites.items()}
    return ClosedForm(statistic=statistic, spectra=found, orders=orders, rests=rests)


def _rest(model: nn.Module, site: Site, found: Spectrum, statistic: Statistic) -> Tensor | None:
    """Where the channels of a site rest; a product is written in its new basis."""
    if isinstance(site, HiddenSite):
        return statistic.mean(site)
    assert isinstance(site, ProductSite) and isinstance(found, Factorization)
    return change_basis(model, site, found, statistic.mean(site))


def order_of(site: Site, found: Spectrum) -> Tensor:
    """The channels of every head from the last to go to the first, (heads, channels); a product's are in that order."""
    if isinstance(found, Elimination):
        return found.order[None]
    heads = site.heads if isinstance(site, ProductSite) else 1
    return torch.arange(site.full, device=found.left.device).expand(heads, -1).clone()

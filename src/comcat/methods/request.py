"""What is asked of a compression, checked before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError, SettingsError
from ..factors import Spectrum, Weights
from ..forms import check_plan
from ..hosts import find_sites
from ..hosts.ordinary import check_ordinary
from ..linalg import Elimination, Factorization
from ..plan import Plan
from ..runs.watching import first_unsound
from ..sites import HiddenSite, ProductSite, Site, Sites
from .allocate import check_asked, describe
from .merging.merge import blank_tokens
from .prepare import Prepared, budget_of, chosen_sites
from .propose import propose
from .settings import CompressSettings, check_forms


def check_request(model: nn.Module, settings: CompressSettings, plan: Plan | None = None) -> None:
    """Raise where the settings do not say what to do, or where nothing can be done with the model's weights.

    Raises:
        SettingsError: without a plan, a saving or a drop. ModelError: for a model that is compressed already, unless
            the plan merges tokens and nothing else; or whose weights are not its own to read. NumericsError: for
            weights that are no numbers.
    """
    asked = (settings.reduce, settings.max_drop, settings.target_ms)
    if plan is None and not any(wish is not None for wish in asked) and settings.ranks != "energy":
        raise SettingsError(
            "say how far to go: reduce=0.5 (share to save), max_drop=1.0 (points that may be lost), "
            "target_ms=12 (with budget='latency') or a plan"
        )
    check_asked(settings.reduce if plan is None else None, settings.multiple)
    check_ordinary(model)
    check_uncompressed(model, plan)
    if (unsound := first_unsound(model.named_parameters())) is not None:
        raise NumericsError(f"{unsound} holds NaN or infinite values")


def check_uncompressed(model: nn.Module, plan: Plan | None = None) -> None:
    """Raise ModelError for a model that is compressed already, unless a plan of merges alone is to be added to it."""
    record = getattr(model, "comcat_record", None)
    done = {} if record is None else record.plan.sites
    if any(name.endswith(":tokens") for name in done):
        raise ModelError(
            "the model's blocks run on fewer tokens already; begin from the model before the merge: compress or prune "
            "it, then merge the result (comcat merge FOLDER); forms='ranks,units,tokens' (--forms) does all in one"
        )
    if done and (plan is None or not all(name.endswith(":tokens") for name in plan.sites)):
        raise ModelError(
            "the model is compressed already; begin from the original: forms='ranks,units,tokens' (--forms) does all "
            "in one; what is compressed can be tuned, and its tokens merged (comcat merge FOLDER)"
        )


def check_reach(model: nn.Module, settings: CompressSettings, example: Tensor, plan: Plan | None = None) -> Sites:
    """All sites of a model; raises what the choice would raise after calibrating.

    It takes seconds, for nothing is decomposed.

    What a model can save depends on shapes alone, so the choice is made once for spectra that are all ones.

    Args:
        example: one picture (1, channels, height, width), to count MACs by.

    Raises:
        ModelError, SettingsError: where no site may shrink. BudgetError: for a saving that is out of reach.
        PlanError, UnknownSite, UnsupportedSite: for a plan that does not fit.
    """
    whole = find_sites(model)
    if plan is not None:
        check_plan(plan, whole)
        return whole
    sites = chosen_sites(whole, settings)
    few = tuple(blank_tokens(model, example, settings.only)) if "tokens" in check_forms(settings.forms) else ()
    if settings.reduce is None or settings.ranks == "search" or settings.budget == "latency":
        return whole  # what time can be saved is known when it is measured
    statistic = Weights(name=settings.statistic)
    total, cost = budget_of(model, settings, sites, statistic, example)
    prepared = Prepared(
        sites=sites, whole=whole, statistic=statistic,
        factorizations={name: blank_spectrum(site) for name, site in sites.items()},
        total=total, made_for=describe(model, whole, sites), cost=cost,
        tokens=few,
    )  # fmt: skip
    propose(model, prepared, replace(settings, multiple=settings.multiple or 1))
    return whole


def blank_spectrum(site: Site) -> Spectrum:
    """A spectrum of a site's shape, all ones."""
    if isinstance(site, HiddenSite):
        return Elimination(order=torch.arange(site.full), prices=torch.ones(site.full))
    ones = torch.ones(*([site.heads] if isinstance(site, ProductSite) else []), site.full)
    return Factorization(left=torch.empty(0), right=torch.empty(0), singular_values=ones)

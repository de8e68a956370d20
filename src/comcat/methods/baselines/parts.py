"""What part of a model a baseline is for, and a plan that keeps the same share of every site of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...errors import BudgetError, ModelError, SettingsError
from ...hosts import find_sites
from ...plan import Plan, SitePlan
from ...sites import HiddenSite, Site, Sites
from ..allocate import describe, shrinkable
from ..choose import same_share
from ..costs import Parameters
from ..ladders import AS_IT_IS, Choice, Ladder


def mha_sites(sites: Sites) -> Sites:
    """The QK and VO products of attention."""
    return sites.only("qk", "vo")


def ffn_sites(sites: Sites) -> Sites:
    """The linear layers of feed-forwards: those that make or read hidden units (:mod:`comcat.hosts.feedforward`)."""
    layers = {path for site in sites.values() if isinstance(site, HiddenSite) for path in site.modules}
    return Sites({n: s for n, s in sites.items() if n in layers}, sites.refused)


def hidden_sites(sites: Sites) -> Sites:
    """The hidden units of feed-forwards."""
    return sites.only("units")


def same_share_plan(
    model: nn.Module,
    name: str,
    sites: Sites,
    ladder: Callable[[Site], Iterator[SitePlan]],
    reduce: float,
    total: float | None,
    **settings: Any,
) -> Plan:
    """The same share of every site, each at the costliest entry of its ladder within it."""
    check_budget(reduce, total)
    cost = Parameters()
    decisions = [
        Ladder(n, {n: s}, (s,), (*(Choice({n: entry}, 0.0, 0.0) for entry in ladder(s)), AS_IT_IS))
        for n, s in sites.items()
    ]
    tables = [decision.table(cost) for decision in decisions]
    dense = sum(table.dense for table, _ in tables)
    whole = dense if total is None else total
    most = dense - sum(float(table.costs[0]) for table, _ in tables)
    if most < reduce * whole:
        most = math.floor(most / whole * 1e4) / 1e4
        raise BudgetError(f"got reduce={reduce:g}, but these sites in this form allow at most {most:g}")
    places = same_share([table for table, _ in tables], dense - reduce * whole, "share")
    chosen = [options[place] for (_, options), place in zip(tables, places, strict=True)]
    spent = sum(float(table.costs[place]) for (table, _), place in zip(tables, places, strict=True))
    made_by = {"baseline": name, "reduce": reduce, "saved": (dense - spent) / whole, **settings}
    entries = {n: entry for choice in chosen for n, entry in choice.entries.items()}
    return Plan(sites=entries, made_by=made_by, made_for=describe(model, find_sites(model), sites))


def check_budget(reduce: float, total: float | None) -> None:
    if not 0 < reduce < 1:
        raise SettingsError(f"got reduce={reduce:g}, expected a share between 0 and 1")
    if total is not None and not total > 0:
        raise SettingsError(f"got total={total:g}, expected a number of parameters above 0")


def found_sites(model: nn.Module, sites: Sites | None) -> Sites:
    """The sites given, or all of the model's that may shrink by default: not classifier heads."""
    return shrinkable(find_sites(model)) if sites is None else sites


def some(sites: Sites, what: str) -> Sites:
    if not sites:
        raise ModelError(f"among the sites given there is no {what}")
    return sites

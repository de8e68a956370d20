"""Plans of thin factors or fewer hidden units, the same share of every site (Xiao et al. 2023, Tables 1 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ...factors import Statistic
from ...forms import largest
from ...plan import Plan, SitePlan
from ...sites import Site, Sites
from ..allocate import allocate, of_forms
from .parts import check_budget, found_sites, hidden_sites, mha_sites, same_share_plan, some


def matrix_plan(
    model: nn.Module,
    sites: Sites | None,
    reduce: float,
    total: float | None = None,
    *,
    statistic: Statistic | None = None,
) -> Plan:
    """W_Q, W_K, W_V and W_O each by its own SVD, over all heads at once (Table 1, "matrix-level").

    Of the sites given, QK and VO become small. A rank r costs ``r (in + heads · width)`` parameters a matrix, so ranks
    above about half the width of the model would save nothing. The statistic that the plan is to be applied with is
    only told in it: every matrix keeps the same share.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = some(mha_sites(found_sites(model, sites)), "attention whose products can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        limit = min(largest(site, "matrix"), site.out_features)  # W_O is (out, heads · width)
        return (SitePlan(keep=r, full=site.full_rank, form="matrix") for r in range(1, limit + 1))

    told = {} if statistic is None else {"statistic": statistic.name}
    return same_share_plan(model, "matrix", chosen, ladder, reduce, total, **told)


def product_plan(
    model: nn.Module,
    sites: Sites | None,
    reduce: float,
    total: float | None = None,
    *,
    statistic: Statistic | None = None,
) -> Plan:
    """The same share of every product (Table 1, "head-level") and linear layer (Table 4, "SVD") among the sites given.

    Apply the plan with the same statistic.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = some(of_forms(found_sites(model, sites), ("ranks",)), "site that can shrink")
    check_budget(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(
        model, statistic, reduce=reduce, rule="uniform", forms="ranks", sites=chosen, total=whole, multiple=1
    )
    return replace(plan, made_by={"baseline": "product", **plan.made_by})


def units_plan(
    model: nn.Module,
    sites: Sites | None,
    reduce: float,
    total: float | None = None,
    *,
    statistic: Statistic | None = None,
) -> Plan:
    """The same share of the hidden units of every feed-forward among the sites given.

    Apply the plan with the same statistic, which says which units go; see :mod:`comcat.methods.baselines.pruning`.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = some(hidden_sites(found_sites(model, sites)), "feed-forward whose hidden units can be chosen")
    check_budget(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(
        model, statistic, reduce=reduce, rule="uniform", forms="units", sites=chosen, total=whole, multiple=1
    )
    return replace(plan, made_by={"baseline": "units", **plan.made_by})

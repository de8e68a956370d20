"""Plans of thin factors or fewer hidden units, the same share of every site (Xiao et al. 2023, Tables 1 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import nn

from ...factors import Statistic
from ...forms import largest
from ...plan import Plan, SitePlan
from ...sites import Site, Sites
from ..allocate import allocate, of_forms
from .parts import check_budget, found_sites, mha_sites, same_share_plan, some


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


def uniform_plan(
    model: nn.Module,
    sites: Sites | None,
    reduce: float,
    total: float | None = None,
    *,
    form: Literal["ranks", "units"] = "ranks",
    statistic: Statistic | None = None,
) -> Plan:
    """The same share of every site of one form among the sites given.

    - ``"ranks"``: products (Table 1, "head-level") and linear layers (Table 4, "SVD").
    - ``"units"``: the hidden units of feed-forwards. The statistic says which of them go; see
      :mod:`comcat.methods.baselines.pruning`.

    Apply the plan with the same statistic.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    name, what = _UNIFORM[form]
    chosen = some(of_forms(found_sites(model, sites), (form,)), what)
    check_budget(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(model, statistic, reduce=reduce, rule="uniform", forms=form, sites=chosen, total=whole, multiple=1)
    return replace(plan, made_by={"baseline": name, **plan.made_by})


_UNIFORM = {
    "ranks": ("product", "site that can shrink"),
    "units": ("units", "feed-forward whose hidden units can be chosen"),
}
"""Form → what the plan calls the baseline, and what is missing where there is no such site."""

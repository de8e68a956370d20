"""A plan for a budget: what every site becomes, uniform, by energy, or where the least is predicted to be lost.

All rules turn ladders (what each option costs, what it is predicted to lose) into one choice a decision. The budget is
a share of the whole model's parameters or MACs to save.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..errors import BudgetError, SettingsError, nearest
from ..factors import Spectrum, Statistic, Weights, spectra
from ..linalg import Factorization
from ..plan import MadeFor, Plan, SitePlan, shapes_of
from ..sites import HiddenSite, LinearSite, ProductSite, Sites
from ..wrappers import bare
from .choose import least_loss, same_share
from .costs import Cost, Parameters
from .ladders import Choice, Order, idle, ladders, tail_loss
from .merging.blocks import TokenLadder, options_of_blocks
from .settings import RULES, Budget, RankRule, check_forms, check_tokens

__all__ = ["RULES", "Budget", "RankRule", "allocate", "check_asked", "describe", "shrinkable", "spectra", "tail_loss"]

_ORDERS: Mapping[str, Order] = {"waterfill": "price", "uniform": "share", "equal": "share", "energy": "energy"}


def allocate(
    model: nn.Module,
    statistic: Statistic | None = None,
    *,
    reduce: float | None = None,
    rule: RankRule = "waterfill",
    forms: Sequence[str] | str = ("ranks", "units"),
    budget: Budget = "parameters",
    sites: Sites | None = None,
    factorizations: Mapping[str, Spectrum] | None = None,
    multiple: int | None = None,
    energy: float = 0.9,
    tie: bool | None = None,
    per_head: bool = False,
    head: bool = False,
    total: float | None = None,
    cost: Cost | None = None,
    made_for: MadeFor | None = None,
    tokens: Sequence[TokenLadder] = (),
) -> Plan:
    """Choose what sites become so that the model saves a share of its cost.

    Args:
        statistic: what errors are measured by; None for the weights alone.
        reduce: share of the whole model's cost to save, in (0, 1). With rule ``"energy"`` it may be None: then every
            site keeps ``energy`` of the sum of its singular values (the paper's Figure 2).
        rule: ``"uniform"`` keeps the same share of every site (up to a step, spread in the order of the model),
            ``"equal"`` gives all QK and VO products one rank and all feed-forwards one width (what a stock checkpoint
            needs), ``"energy"`` the same share of every site's singular values, ``"waterfill"`` minimises the predicted
            loss.
        forms: what sites may become: ``"ranks"``, ``"units"`` (feed-forwards lose hidden units), ``"tokens"`` (blocks
            run on fewer tokens; with ``tokens``), or some of them.
        sites: which sites may shrink, by default all. head: whether classifier heads may, among sites that were not
            given.
        multiple: ranks and units are multiples of it (or the largest rank); by default the roundest that costs next to
            nothing, see :func:`roundest`.
        tie: give QK and VO of a layer one rank, by default unless the budget is of parameters. per_head: let heads of
            a site have ranks of their own, padded to the largest.
        total: the whole model's cost; counted if left out. cost: of a site, needed with ``budget="macs"``.
        made_for: what the plan shall say of the model, if that is known already.
        tokens: what blocks may run on and what that loses (:func:`comcat.methods.merging.meter.token_ladders`), with
            ``forms`` that name tokens.

    Returns:
        The plan; ``made_by`` says what it saves (``saved``; with ``per_head`` also ``saved_with_padding``, since stored
        ranks are padded), its ``error`` (what the rule's losses add up to: nats under the loss-aware statistic,
        otherwise a sum of shares over sites) and ``predicted_loss``.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    from ..hosts import find_sites
    from ..measure import count_parameters

    model = bare(model)
    _check(reduce, rule, multiple, energy)
    check_tokens(forms, budget, rule, statistic)
    if budget != "parameters" and cost is None:
        raise SettingsError(f"budget {budget!r} needs the cost of a site in its units: pass cost and total")
    statistic = Weights() if statistic is None else statistic
    if sites is None or made_for is None:
        whole_model = find_sites(model)
        sites = shrinkable(whole_model, head=head) if sites is None else sites
        made_for = describe(model, whole_model, sites) if made_for is None else made_for
    reached = sites.without(getattr(statistic, "unreached", ()))
    sites = of_forms(reached, check_forms(forms))
    found = spectra(model, sites, statistic) if factorizations is None else factorizations
    cost = Parameters() if cost is None else cost
    tie = budget != "parameters" if tie is None else tie
    whole = float(count_parameters(model)) if total is None else total
    if multiple is None:
        return roundest(
            lambda n: allocate(
                model, statistic, reduce=reduce, rule=rule, forms=forms, budget=budget, sites=reached,
                factorizations=found, multiple=n, energy=energy, tie=tie, per_head=per_head, total=whole, cost=cost,
                made_for=made_for, tokens=tokens,
            )
        )  # fmt: skip
    relative = statistic.name != "loss"
    decisions = ladders(
        sites, found, cost, multiple=multiple, relative=relative, order=_ORDERS[rule],
        tie="all" if rule == "equal" else "layer" if tie else "none",
    )  # fmt: skip
    tables = options_of_blocks([*decisions, *(idle(reached, sites) if tokens else [])], tokens, cost)
    dense = sum(table.dense for table, _ in tables)
    most = (dense - sum(float(table.costs[0]) for table, _ in tables)) / whole
    if reduce is not None and reduce > most + 1e-12:
        most = math.floor(most * 1e4) / 1e4
        raise BudgetError(
            f"got reduce={reduce:g}, but the sites that can shrink allow at most {most:g} of the model's {budget}"
        )
    target = None if reduce is None else dense - reduce * whole
    numbers = [table for table, _ in tables]
    if rule == "waterfill" and target is not None:
        places = least_loss(numbers, target)
    else:
        places = same_share(numbers, target, "energy" if rule == "energy" else "share", energy)
    chosen = [options[place] for (_, options), place in zip(tables, places, strict=True)]
    spent = sum(float(table.costs[place]) for (table, _), place in zip(tables, places, strict=True))
    entries = _entries(sites, chosen)
    made_by: dict[str, Any] = {
        "rule": rule,
        "statistic": statistic.name,
        "forms": list(check_forms(forms)),
        "budget": budget,
        "reduce": reduce,
        "multiple": multiple,
        "tie": tie,
        "per_head": per_head,
        "saved": (dense - spent) / whole,
        "error": sum(c.loss for c in chosen),
        "predicted_loss": None if relative else sum(c.loss for c in chosen),
    }
    if per_head:  # what is stored is padded to the largest head of a layer
        padded = _by_head(sites, entries, found)
        padding = sum(cost(sites[n], e) - cost(sites[n], entries[n]) for n, e in padded.items())
        entries, made_by["saved_with_padding"] = padded, made_by["saved"] - padding / whole
    if rule == "energy" and reduce is None:
        made_by["energy"] = energy
    return Plan(sites=entries, made_by=made_by, made_for=made_for)


def roundest(plan_with: Callable[[int], Plan]) -> Plan:
    """The plan of the largest multiple among 16, 8, 4 and 2 that costs next to nothing; kernels like round widths.

    That is at most a tenth more predicted loss than with multiples of 1, or a thousandth (of a nat, under the
    loss-aware statistic), which no measurement would show. Raises what ``plan_with`` raises for 1.
    """
    finest = plan_with(1)  # raises where even this cannot meet the budget
    for multiple in (16, 8, 4, 2):
        with suppress(BudgetError):
            plan = plan_with(multiple)
            if plan.made_by["error"] <= 1.1 * finest.made_by["error"] + 1e-3:
                return plan
    return finest


LANGUAGE = frozenset({"language_model", "lm_head"})
"""What models of pictures and text call the side that is no business of ours unless it is asked for."""


def of_vision(sites: Sites) -> Sites:
    """The sites outside a language model, where a model has others; a warning says what stays."""
    spoken = {n for n, s in sites.items() if LANGUAGE & set(s.path.split("."))}
    if not 0 < len(spoken) < len(sites):
        return sites
    path = sites[min(spoken, key=lambda n: ("language_model" not in n, n))].path.split(".")
    place = ".".join(path[: 1 + next(i for i, name in enumerate(path) if name in LANGUAGE)])
    warnings.warn(f"the language side stays as it is; only=({place!r},) shrinks it", stacklevel=6)
    return sites.without(spoken)


def shrinkable(sites: Sites, *, head: bool = False) -> Sites:
    """The sites that may shrink by default: all but classifier heads."""
    return sites if head else sites.without([n for n, s in sites.items() if isinstance(s, LinearSite) and s.classifies])


def of_forms(sites: Sites, forms: Sequence[str]) -> Sites:
    """The sites that can become one of some forms. With units alone, a feed-forward's layers have no ranks."""
    kept = {n for n, s in sites.items() if ("units" if isinstance(s, HiddenSite) else "ranks") in forms}
    return sites.without([name for name in sites if name not in kept])


def describe(model: nn.Module, all_sites: Sites, chosen: Sites) -> MadeFor:
    """Which model a plan is made for, and of which of its sites."""
    from ..models import name_of

    some = None if set(chosen) == set(all_sites) else tuple(chosen)
    return MadeFor(model=name_of(model), sites=shapes_of(all_sites), chosen=some)


def _check(reduce: float | None, rule: str, multiple: int | None, energy: float) -> None:
    if rule not in RULES:
        raise SettingsError(f"got rule {rule!r}, expected one of {', '.join(RULES)}{nearest(rule, RULES)}")
    if reduce is None and rule != "energy":
        raise SettingsError(f"rule {rule!r} needs reduce, the share to save")
    check_asked(reduce, multiple)
    if not 0 < energy <= 1:
        raise SettingsError(f"got energy={energy:g}, expected a share above 0 and up to 1")


def check_asked(reduce: float | None, multiple: int | None) -> None:
    """Raises SettingsError for a share or a multiple that nothing could meet, where they are given."""
    if reduce is not None and not 0 < reduce < 1:
        raise SettingsError(f"got reduce={reduce:g}, expected a share between 0 and 1")
    if multiple is not None and multiple < 1:
        raise SettingsError(f"got multiple={multiple}, expected at least 1")


def _entries(sites: Sites, chosen: Sequence[Choice]) -> dict[str, SitePlan]:
    """What was chosen, in the order of the model."""
    entries = {name: entry for choice in chosen for name, entry in choice.entries.items()}
    ordered = {name: entries[name] for name in sites if name in entries}
    return ordered | entries  # tokens, which are found by running the model, come last


def _by_head(sites: Sites, entries: Mapping[str, SitePlan], found: Mapping[str, Spectrum]) -> dict[str, SitePlan]:
    """The same columns spread over the heads of each site, padded to the largest."""
    spread = dict(entries)
    for name, entry in entries.items():
        spectrum = found[name]
        if isinstance(sites[name], ProductSite) and isinstance(spectrum, Factorization):
            heads = _head_ranks(spectrum, entry.keep)
            spread[name] = _with_heads(entry, max(heads), heads)
    return spread


def _with_heads(entry: SitePlan, keep: int, heads: tuple[int, ...]) -> SitePlan:
    return SitePlan(form=entry.form, keep=keep, full=entry.full, details={**entry.details, "head_ranks": heads})


def _head_ranks(found: Factorization, rank: int) -> tuple[int, ...]:
    """Spread ``heads · rank`` columns over heads by the size of their singular values, at least one each."""
    values = found.singular_values
    heads, full = values.shape
    order = values[:, 1:].square().flatten().argsort(descending=True)[: heads * (rank - 1)]
    counts = (
        torch.ones(heads, dtype=torch.long) + torch.bincount((order // (full - 1)).cpu(), minlength=heads)
        if full > 1
        else torch.ones(heads)
    )
    return tuple(int(c) for c in counts)

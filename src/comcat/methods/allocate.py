"""Ranks under a budget: uniform, by energy, or by water-filling the predicted loss.

All three turn per-site curves (what each rank costs, what it is predicted to lose) into one rank a site. The budget is a share of the whole
model's parameters or MACs to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import BudgetError, SettingsError, nearest
from ..factors import Statistic, Weights, factorize_site
from ..linalg import Factorization
from ..plan import Plan, SitePlan
from ..sites import Site, Sites

RankRule = Literal["uniform", "equal", "energy", "waterfill"]
RULES: tuple[RankRule, ...] = ("uniform", "equal", "energy", "waterfill")
Budget = Literal["parameters", "macs"]


@dataclass(frozen=True)
class Curve:
    """What a site's ranks cost and lose.

    ``ranks[i]`` costs ``costs[i]`` and is predicted to lose ``losses[i]``; the last entry, rank None, is the site left as it is.
    Ranks that cost as much as the dense site or more are not offered.
    """

    site: Site
    ranks: tuple[int | None, ...]
    costs: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def dense(self) -> float:
        return self.costs[-1]


def spectra(model: nn.Module, sites: Sites, statistic: Statistic | None = None) -> dict[str, Factorization]:
    """Factorise every site under a statistic: the input of :func:`allocate` and :func:`comcat.apply_`."""
    statistic = Weights() if statistic is None else statistic
    return {name: factorize_site(model, site, statistic) for name, site in sites.items()}


def tail_loss(singular_values: Tensor, *, relative: bool = False) -> Tensor:
    """Predicted loss of every rank 0…k: ``½ Σ_{i ≥ r} σ_i²`` summed over heads, (k + 1).

    Under the loss-aware statistic this is the predicted rise of the loss (nats a picture). Other statistics have no common unit, so
    there it is divided by the site's whole, ``relative``.
    """
    square = singular_values.double().square()
    square = square.sum(0) if square.ndim > 1 else square
    tail = torch.cat([square.flip(0).cumsum(0).flip(0), square.new_zeros(1)]) / 2
    return tail / tail[0].clamp_min(1e-300) if relative else tail


def allocate(
    model: nn.Module,
    statistic: Statistic | None = None,
    *,
    reduce: float | None = None,
    rule: RankRule = "waterfill",
    budget: Budget = "parameters",
    sites: Sites | None = None,
    factorizations: Mapping[str, Factorization] | None = None,
    multiple: int = 1,
    energy: float = 0.9,
    tie: bool = False,
    per_head: bool = False,
    total: float | None = None,
    macs: Callable[[Site, int | None], float] | None = None,
) -> Plan:
    """Choose ranks so that the model saves a share of its cost.

    Args:
        statistic: what errors are measured by; None for the weights alone.
        reduce: share of the whole model's cost to save, in (0, 1). With rule ``"energy"`` it may be None: then every site keeps ``energy``
            of the sum of its singular values (the paper's Figure 2).
        rule: ``"uniform"`` keeps the same share of every site (up to a step, spread in the order of the model), ``"equal"`` gives
            all QK and VO products one rank (what a stock checkpoint needs), ``"energy"`` the same share of every site's singular values,
            ``"waterfill"`` minimises the predicted loss.
        sites: which sites may shrink, by default all. multiple: ranks are multiples of it (or the largest possible).
        tie: give QK and VO of a layer one rank. per_head: let heads of a site have ranks of their own, padded to the largest.
        total: the whole model's cost; counted if left out. macs: cost of a site at a rank, needed with ``budget="macs"``.

    Returns:
        The plan; ``made_by`` says what it saves (``saved``; with ``per_head`` also ``saved_with_padding``, since stored ranks are padded), its
        ``error`` (what the rule's losses add up to: nats under the loss-aware statistic, otherwise a sum of shares over sites) and ``predicted_loss``.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    from ..hosts import find_sites
    from ..measure import count_parameters

    if rule not in RULES:
        raise SettingsError(f"got rule {rule!r}, expected one of {', '.join(RULES)}{nearest(rule, RULES)}")
    if reduce is None and rule != "energy":
        raise SettingsError(f"rule {rule!r} needs reduce, the share to save")
    check_asked(reduce, multiple)
    if not 0 < energy <= 1:
        raise SettingsError(f"got energy={energy:g}, expected a share above 0 and up to 1")
    statistic = Weights() if statistic is None else statistic
    sites = find_sites(model) if sites is None else sites
    sites = Sites({n: s for n, s in sites.items() if n not in getattr(statistic, "unreached", ())}, sites.refused)
    found = spectra(model, sites, statistic) if factorizations is None else factorizations
    if budget == "macs" and macs is None:
        raise SettingsError("budget 'macs' needs the cost of a site in MACs: pass macs and total")
    cost = (lambda site, rank: float(site.parameters(rank))) if macs is None else macs
    relative = statistic.name != "loss"
    curves = {n: _curve(s, found[n], multiple, cost, relative) for n, s in sites.items()}
    groups = _groups(sites, curves, "all" if rule == "equal" else "layer" if tie else "none")
    whole = float(count_parameters(model)) if total is None else total
    target = None if reduce is None else sum(c.dense for c in curves.values()) - reduce * whole
    most = sum(c.dense - min(c.costs) for c in curves.values()) / whole
    if target is not None and reduce is not None and reduce > most + 1e-12:
        raise BudgetError(
            f"got reduce={reduce:g}, but the sites that can shrink allow at most {math.floor(most * 1e4) / 1e4:g} of the model's {budget}"
        )
    if rule == "waterfill":
        assert target is not None
        chosen = _waterfill(groups, target)
    else:
        share = _by_energy(found) if rule == "energy" else _by_share
        if target is None:
            chosen = {g.names: share(g, energy) for g in groups}
        else:
            chosen = _bisect(groups, share, target)
    ranks = {n: g.ranks[chosen[g.names]] for g in groups for n in g.names}
    entries = {
        n: SitePlan(
            rank=r,
            full_rank=sites[n].full_rank,
            head_ranks=_head_ranks(found[n], r) if per_head and sites[n].kind != "linear" else None,
        )
        for n, r in ranks.items()
        if r is not None
    }
    if per_head:
        entries = {n: _padded(e) for n, e in entries.items()}
    spent = sum(g.costs[chosen[g.names]] for g in groups)
    made_by = {
        "rule": rule, "statistic": statistic.name, "budget": budget, "reduce": reduce, "multiple": multiple, "tie": tie, "per_head": per_head,
        "saved": (sum(c.dense for c in curves.values()) - spent) / whole,
        "error": sum(g.losses[chosen[g.names]] for g in groups),
        "predicted_loss": None if relative else sum(g.losses[chosen[g.names]] for g in groups),
    }  # fmt: skip
    if per_head:  # what is stored is padded to the largest head of a layer
        padding = sum(cost(sites[n], e.rank) - cost(sites[n], ranks[n]) for n, e in entries.items())
        made_by["saved_with_padding"] = made_by["saved"] - padding / whole
    if rule == "energy" and reduce is None:
        made_by["energy"] = energy
    return Plan(sites=dict(entries), made_by=made_by)


def check_asked(reduce: float | None, multiple: int | None) -> None:
    """Raises SettingsError for a share or a multiple that nothing could meet, where they are given."""
    if reduce is not None and not 0 < reduce < 1:
        raise SettingsError(f"got reduce={reduce:g}, expected a share between 0 and 1")
    if multiple is not None and multiple < 1:
        raise SettingsError(f"got multiple={multiple}, expected at least 1")


def _curve(
    site: Site, found: Factorization, multiple: int, cost: Callable[[Site, int | None], float], relative: bool
) -> Curve:
    tail = tail_loss(found.singular_values, relative=relative)
    dense = cost(site, None)
    steps = [*range(multiple, site.full_rank, multiple), site.full_rank]
    ranks = [r for r in steps if cost(site, r) < dense]
    return Curve(
        site, (*ranks, None), (*(cost(site, r) for r in ranks), dense), (*(float(tail[r]) for r in ranks), 0.0)
    )


@dataclass(frozen=True)
class _Group:
    """Sites that share one rank; usually just one."""

    names: tuple[str, ...]
    ranks: tuple[int | None, ...]
    costs: tuple[float, ...]
    losses: tuple[float, ...]
    sites: tuple[Site, ...]


def _groups(sites: Sites, curves: Mapping[str, Curve], tie: Literal["none", "layer", "all"]) -> list[_Group]:
    together: dict[str, list[str]] = {}
    for name, site in sites.items():
        key = (
            name
            if tie == "none" or site.kind == "linear"
            else site.path
            if tie == "layer"
            else f"width {site.full_rank}"
        )
        together.setdefault(key, []).append(name)
    groups = []
    for names in together.values():
        tables = [
            dict(zip(curves[n].ranks, zip(curves[n].costs, curves[n].losses, strict=True), strict=True)) for n in names
        ]
        ranks = [r for r in curves[names[0]].ranks if all(r in t for t in tables)]
        costs, losses = ([sum(t[r][i] for t in tables) for r in ranks] for i in (0, 1))
        groups.append(_Group(tuple(names), tuple(ranks), tuple(costs), tuple(losses), tuple(sites[n] for n in names)))
    return groups


def _waterfill(groups: Sequence[_Group], target: float) -> dict[tuple[str, ...], int]:
    """Least total loss whose cost is within the target: a price per unit of cost by bisection, then single steps up while they fit.

    At a price λ every site takes the rank of least ``loss + λ cost`` by itself, so the only choice left is λ (Everett's multiplier); it reaches
    the lower convex hull of the sum, and the last gap to the target, smaller than one site's step, is closed greedily.
    """

    def at(price: float) -> dict[tuple[str, ...], int]:
        return {
            g.names: min(range(len(g.ranks)), key=lambda i: (g.losses[i] + price * g.costs[i], g.costs[i]))
            for g in groups
        }

    def cost(choice: Mapping[tuple[str, ...], int]) -> float:
        return sum(g.costs[choice[g.names]] for g in groups)

    low, high = 0.0, 1e-12
    while cost(at(high)) > target and high < 1e30:
        low, high = high, high * 8
    for _ in range(100):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (middle, high) if cost(at(middle)) > target else (low, middle)
    choice = at(high)
    return _fill_up(groups, choice, target)


def _fill_up(groups: Sequence[_Group], choice: dict[tuple[str, ...], int], target: float) -> dict[tuple[str, ...], int]:
    """Spend what is left of the budget on the steps that gain most per cost."""
    room = target - sum(g.costs[choice[g.names]] for g in groups)
    while True:
        best, gain = None, 0.0
        for g in groups:
            i = choice[g.names]
            for j in range(i + 1, len(g.ranks)):
                extra = g.costs[j] - g.costs[i]
                if 0 < extra <= room + 1e-9 and (rate := (g.losses[i] - g.losses[j]) / extra) > gain:
                    best, gain = (g, j, extra), rate
        if best is None:
            return choice
        choice[best[0].names] = best[1]
        room -= best[2]


def _bisect(
    groups: Sequence[_Group], share: Callable[[_Group, float], int], target: float
) -> dict[tuple[str, ...], int]:
    """The largest common share that fits the target, then the sites one after the other a step further while they fit."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(g.costs[share(g, middle)] for g in groups) <= target
        low, high = (middle, high) if fits else (low, middle)
    choice = {g.names: share(g, low) for g in groups}
    room = target - sum(g.costs[choice[g.names]] for g in groups)
    above = {g.names: share(g, high) for g in groups}
    for g in groups:  # sites whose turn comes at exactly this share, in the order of the model
        extra = g.costs[above[g.names]] - g.costs[choice[g.names]]
        if 0 < extra <= room + 1e-9:
            choice[g.names], room = above[g.names], room - extra
    return choice


def _by_share(group: _Group, share: float) -> int:
    """The costliest rank whose cost is within a share of the dense cost; the smallest rank if none is."""
    dense = group.costs[-1]
    return max((i for i in range(len(group.ranks)) if group.costs[i] <= share * dense), default=0)


def _by_energy(found: Mapping[str, Factorization]) -> Callable[[_Group, float], int]:
    """The smallest rank that keeps a share of the sum of singular values, over heads (the paper's Figure 2)."""
    cumulative = {}
    for name, f in found.items():
        values = f.singular_values.double()
        values = values.sum(0) if values.ndim > 1 else values
        whole = values.sum()  # zero where nothing ever flows: then one column keeps all there is
        cumulative[name] = (values.cumsum(0) / whole if whole > 0 else torch.ones_like(values)).tolist()

    def share(group: _Group, energy: float) -> int:
        def kept(i: int) -> float:
            rank = group.ranks[i]
            return 1.0 if rank is None else min(cumulative[n][rank - 1] for n in group.names)

        return next(i for i in range(len(group.ranks)) if kept(i) >= energy - 1e-12)

    return share


def _head_ranks(found: Factorization, rank: int) -> tuple[int, ...]:
    """Spread ``heads · rank`` columns over the heads of a site by the size of their singular values, at least one each."""
    values = found.singular_values
    heads, full = values.shape
    order = values[:, 1:].square().flatten().argsort(descending=True)[: heads * (rank - 1)]
    counts = (
        torch.ones(heads, dtype=torch.long) + torch.bincount((order // (full - 1)).cpu(), minlength=heads)
        if full > 1
        else torch.ones(heads)
    )
    return tuple(int(c) for c in counts)


def _padded(entry: SitePlan) -> SitePlan:
    if entry.head_ranks is None:
        return entry
    return SitePlan(rank=max(entry.head_ranks), full_rank=entry.full_rank, head_ranks=entry.head_ranks)

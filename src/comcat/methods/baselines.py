"""What factorising products of heads is compared with (Xiao et al. 2023, Tables 1 and 4).

Each function proposes a plan that saves a share of the parameters of some sites, every site keeping the same share of
its own. Ranks grow together; the last steps go to the sites in the order of the model, until the next one would not
fit. So the budget is met within one rank step of one site, and ranks of equal sites differ by one step at most.

``total`` is what ``reduce`` is a share of: the parameters of all attention, of all feed-forward layers, of the whole
model. By default it is the parameters of the sites that the plan is for, biases included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from torch import nn

from ..errors import BudgetError, ModelError, SettingsError
from ..factors import PaperCode, Statistic, Unilateral, Weights
from ..forms import largest
from ..plan import Plan, SitePlan
from ..sites import HiddenSite, Site, Sites
from ..statistics import calibrate
from .allocate import allocate, describe, of_forms
from .choose import same_share
from .costs import Parameters
from .ladders import AS_IT_IS, Choice, Ladder
from .pruning import Scored, scored


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


def matrix_plan(model: nn.Module, sites: Sites | None, reduce: float, total: float | None = None) -> Plan:
    """W_Q, W_K, W_V and W_O each by its own SVD, over all heads at once (Table 1, "matrix-level").

    Of the sites given, QK and VO become small. A rank r costs ``r (in + heads · width)`` parameters a matrix, so ranks
    above about half the width of the model would save nothing.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = _only(mha_sites(_found(model, sites)), "attention whose products can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        limit = min(largest(site, "matrix"), site.out_features)  # W_O is (out, heads · width)
        return (SitePlan(keep=r, full=site.full_rank, form="matrix") for r in range(1, limit + 1))

    return _plan(model, "matrix", chosen, ladder, reduce, total)


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
    chosen = _only(of_forms(_found(model, sites), ("ranks",)), "site that can shrink")
    _check(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(model, statistic, reduce=reduce, rule="uniform", forms="ranks", sites=chosen, total=whole)
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

    Apply the plan with the same statistic, which says which units go; see :mod:`comcat.methods.pruning`.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = _only(hidden_sites(_found(model, sites)), "feed-forward whose hidden units can be chosen")
    _check(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(model, statistic, reduce=reduce, rule="uniform", forms="units", sites=chosen, total=whole)
    return replace(plan, made_by={"baseline": "units", **plan.made_by})


def tucker_plan(
    model: nn.Module, sites: Sites | None, reduce: float, total: float | None = None, *, order: int = 2
) -> Plan:
    """Linear layers in Tucker form (Table 4), from the linear sites given.

    Order 2 leaves the weight a matrix: ranks (r, r), ``r (in + out) + r²`` parameters. A higher order, an even one,
    splits either side into ``order / 2`` modes of nearly equal size (1536 → 48 · 32, 384 → 24 · 16); a prime side keeps
    one mode. Ranks are the same share of every mode.

    Raises:
        SettingsError: if the order is odd or below 2.
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    if order < 2 or order % 2:
        raise SettingsError(f"got order={order}, expected 2, 4 or another even number")
    chosen = _only(_found(model, sites).only("linear"), "linear layer that can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        out, into = (_without_ones(near_equal(n, order // 2)[::-1]) for n in (site.out_features, site.in_features))
        return (_tensor_entry(site, "tucker", out, into, ranks) for ranks in _tucker_ladder([*out, *into]))

    return _plan(model, "tucker", chosen, ladder, reduce, total, order=order)


def tensor_train_plan(
    model: nn.Module, sites: Sites | None, reduce: float, total: float | None = None, *, order: int = 2
) -> Plan:
    """Linear layers as trains of ``order`` matrices (Table 4), from the linear sites given.

    Either side is split into ``order`` modes of nearly equal size, those of ``out`` from small to large and those of
    ``in`` from large to small: pairs of about equal size, contracted the cheaper way round (1536 × 384 → pairs 32 × 24
    and 48 × 16). Pairs of 1 × 1 are left out. All bonds have one rank, or their largest possible. Order 2 is a sum of r
    Kronecker products (Van Loan and Pitsianis 1993). A train costs more work in a forward pass than the dense layer
    unless its ranks are very small, and the more so the more modes: see
    :class:`comcat.modules.tensor.TensorTrainLinear`.

    Raises:
        SettingsError: if the order is below 2.
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    if order < 2:
        raise SettingsError(f"got order={order}, expected at least 2")
    chosen = _only(_found(model, sites).only("linear"), "linear layer that can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        pairs = list(zip(near_equal(site.out_features, order), near_equal(site.in_features, order)[::-1], strict=True))
        pairs = [(o, i) for o, i in pairs if o * i > 1]
        out, into = ([pair[side] for pair in pairs] for side in (0, 1))
        ladder = _train_ladder([o * i for o, i in pairs])
        return (_tensor_entry(site, "tensor_train", out, into, ranks) for ranks in ladder)

    return _plan(model, "tensor_train", chosen, ladder, reduce, total, order=order)


_PARTS: Mapping[str, tuple[Callable[[Sites], Sites], str]] = {
    "mha": (mha_sites, "attention whose products can shrink"),
    "ffn": (ffn_sites, "feed-forward layer that can shrink"),
    "units": (hidden_sites, "feed-forward whose hidden units can be chosen"),
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to propose plans, what part of a model it is for, and the statistic to apply its plans with.

    ``baseline(model, sites, reduce, total)`` picks that part's sites itself: give it all of the model's. Where it
    ``needs_pictures``, the statistic comes from :meth:`measured`, and is given to the call as well.
    """

    about: str
    part: Literal["mha", "ffn", "units"]
    propose: Callable[..., Plan]
    statistic: Statistic = field(default_factory=Weights)
    score: str | None = None
    refits: bool = False

    @property
    def needs_pictures(self) -> bool:
        return self.refits or self.score == "taylor"

    def sites(self, sites: Sites) -> Sites:
        return _PARTS[self.part][0](sites)

    def measured(self, model: nn.Module, sites: Sites, batches: Iterable, *, seed: int = 0) -> Statistic:
        """The statistic of a baseline that looks at pictures (which are gone through twice if need be)."""
        if self.score is None:
            return self.statistic
        hidden = self.sites(sites)
        seen = calibrate(model, batches, statistic="activation", sites=hidden) if self.refits else None
        return scored(self.score, model, hidden, batches=batches, refit=seen)

    def __call__(
        self,
        model: nn.Module,
        sites: Sites | None,
        reduce: float,
        total: float | None = None,
        statistic: Statistic | None = None,
    ) -> Plan:
        chosen = _only(self.sites(_found(model, sites)), _PARTS[self.part][1])
        if self.part != "units":
            return self.propose(model, chosen, reduce, total)
        if self.needs_pictures and statistic is None:
            raise SettingsError(
                "this baseline looks at pictures: pass statistic=baseline.measured(model, sites, batches)"
            )
        return self.propose(model, chosen, reduce, total, statistic=self.statistic if statistic is None else statistic)


BASELINES: dict[str, Baseline] = {
    "matrix": Baseline(about="SVD of each attention matrix", part="mha", propose=matrix_plan),
    "product": Baseline(about="SVD of each head's product", part="mha", propose=product_plan),
    "paper-code": Baseline(
        about="SVD of each head's product, biases zeroed",
        part="mha",
        propose=partial(product_plan, statistic=PaperCode()),
        statistic=PaperCode(),
    ),
    "unilateral": Baseline(
        about="SVD of W_K and W_O of each head",
        part="mha",
        propose=partial(product_plan, statistic=Unilateral()),
        statistic=Unilateral(),
    ),
    "svd": Baseline(about="SVD of each feed-forward matrix", part="ffn", propose=product_plan),
    "tucker": Baseline(about="Tucker form of each feed-forward matrix", part="ffn", propose=tucker_plan),
    "tucker-4": Baseline(
        about="Tucker form of each feed-forward matrix as a tensor of order 4",
        part="ffn",
        propose=partial(tucker_plan, order=4),
    ),
    "tensor-train": Baseline(about="two-core train of each feed-forward matrix", part="ffn", propose=tensor_train_plan),
    "magnitude": Baseline(
        about="hidden units of small weights cut",
        part="units",
        propose=units_plan,
        statistic=Scored("magnitude"),
        score="magnitude",
    ),
    "magnitude-refit": Baseline(
        about="hidden units of small weights cut, the rest refitted",
        part="units",
        propose=units_plan,
        score="magnitude",
        refits=True,
    ),
    "taylor": Baseline(
        about="hidden units of small first-order effect on the loss cut",
        part="units",
        propose=units_plan,
        score="taylor",
    ),
    "taylor-refit": Baseline(
        about="hidden units of small first-order effect on the loss cut, the rest refitted",
        part="units",
        propose=units_plan,
        score="taylor",
        refits=True,
    ),
}
"""Baselines by name. Each entry is callable: ``BASELINES["matrix"](model, sites, 0.2)`` is a plan."""


def near_equal(number: int, parts: int) -> list[int]:
    """Split a whole number into factors about equal, ascending: each the divisor nearest to the root of what is left.

    ``near_equal(1536, 2) == [32, 48]``, ``near_equal(17, 2) == [1, 17]``.
    """
    factors = []
    for left in range(parts, 1, -1):

        def away(d: int, n: int = number, left: int = left) -> Fraction:
            return max(Fraction(d**left, n), Fraction(n, d**left))

        factors.append(min((d for d in range(1, number + 1) if number % d == 0), key=away))
        number //= factors[-1]
    return sorted([*factors, number])


def _tucker_ladder(modes: Sequence[int]) -> Iterator[list[int]]:
    """Ranks of all modes, growing at one pace from 1 to full; none more than the product of the others."""
    for share in sorted({Fraction(r, n) for n in modes for r in range(1, n + 1)}):
        ranks = [math.ceil(share * n) for n in modes]
        while True:
            whole = math.prod(ranks)
            clipped = [min(r, whole // r) for r in ranks]
            if clipped == ranks:
                break
            ranks = clipped
        yield ranks


def _train_ladder(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Ranks of all bonds, one after the other a step up from 1 to full; none more than the tensor's unfolding has."""
    limits = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]
    ranks = [1] * len(limits)
    yield list(ranks)
    for rank in range(2, max(limits, default=0) + 1):
        for k, limit in enumerate(limits):
            if rank <= limit:
                ranks[k] = rank
                yield list(ranks)


def _tensor_entry(site: Site, form: str, out: list[int], into: list[int], ranks: list[int]) -> SitePlan:
    # The largest rank is told for readers; what counts is in the shape. A bond can be wider than the weight's own rank.
    keep, shape = min(max(ranks, default=1), site.full), {"out": out, "in": into, "ranks": ranks}
    return SitePlan(keep=keep, full=site.full, form=form, details={"shape": shape})


def _plan(
    model: nn.Module,
    name: str,
    sites: Sites,
    ladder: Callable[[Site], Iterator[SitePlan]],
    reduce: float,
    total: float | None,
    **settings: Any,
) -> Plan:
    """The same share of every site, each at the costliest entry of its ladder within it."""
    _check(reduce, total)
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
    return Plan(sites=entries, made_by=made_by, made_for=describe(model, _found(model, None), sites))


def _check(reduce: float, total: float | None) -> None:
    if not 0 < reduce < 1:
        raise SettingsError(f"got reduce={reduce:g}, expected a share between 0 and 1")
    if total is not None and not total > 0:
        raise SettingsError(f"got total={total:g}, expected a number of parameters above 0")


def _found(model: nn.Module, sites: Sites | None) -> Sites:
    from ..hosts import find_sites

    return find_sites(model) if sites is None else sites


def _only(sites: Sites, what: str) -> Sites:
    if not sites:
        raise ModelError(f"among the sites given there is no {what}")
    return sites


def _without_ones(modes: list[int]) -> list[int]:
    return [n for n in modes if n > 1] or [1]

"""What factorising products of heads is compared with (Xiao et al. 2023, Tables 1 and 4).

Each function proposes a plan that saves a share of the parameters of some sites, every site keeping the same share of
its own. Ranks grow together; the last steps go to the sites in the order of the model, until the next one would not
fit. So the budget is met within one rank step of one site, and ranks of equal sites differ by one step at most.

``total`` is what ``reduce`` is a share of: the parameters of all attention, of all feed-forward layers, of the whole
model. By default it is the parameters of the sites that the plan is for, biases included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from torch import nn

from ..errors import BudgetError, ModelError, SettingsError
from ..factors import PaperCode, Statistic, Unilateral, Weights
from ..modules.tensor import shape_parameters
from ..plan import Plan, SitePlan, site_rank_limit
from ..sites import Site, Sites
from .allocate import allocate


def mha_sites(sites: Sites) -> Sites:
    """The QK and VO products of attention."""
    return sites.only("qk", "vo")


def ffn_sites(sites: Sites) -> Sites:
    """The linear layers of feed-forward networks, found by structure.

    One module holds two linear layers a → h → a, or three, a → h twice and h → a (gated); the two of a gate may be one
    layer, a → 2h. Heads, poolers and downsampling layers are none, for they have no such partner.
    """
    linears = sites.only("linear")
    together: dict[str, list[Site]] = {}
    for site in linears.values():
        together.setdefault(_nearest_company(site.path, linears), []).append(site)
    chosen = {s.name for module, group in together.items() if _is_ffn(module, group) for s in group}
    return Sites({n: s for n, s in linears.items() if n in chosen}, sites.refused)


def matrix_plan(model: nn.Module, sites: Sites | None, reduce: float, total: float | None = None) -> Plan:
    """W_Q, W_K, W_V and W_O each by its own SVD, over all heads at once (Table 1, "matrix-level").

    Of the sites given, QK and VO become small. A rank r costs ``r (in + heads · width)`` parameters a matrix, so ranks
    above about half the width of the model would save nothing.

    Raises:
        BudgetError: if the budget cannot be met; the message says the most that can be saved.
    """
    chosen = _only(mha_sites(_found(model, sites)), "attention whose products can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        limit = min(site_rank_limit(site, "matrix"), site.out_features)  # W_O is (out, heads · width)
        return (SitePlan(rank=r, full_rank=site.full_rank, form="matrix") for r in range(1, limit + 1))

    return _plan("matrix", chosen, ladder, _matrix_cost, reduce, total)


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
    chosen = _only(_found(model, sites), "site that can shrink")
    _check(reduce, total)
    whole = sum(s.parameters() for s in chosen.values()) if total is None else total
    plan = allocate(model, statistic, reduce=reduce, rule="uniform", sites=chosen, total=whole)
    return replace(plan, made_by={"baseline": "product", **plan.made_by})


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

    return _plan("tucker", chosen, ladder, _tensor_cost, reduce, total, order=order)


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

    return _plan("tensor_train", chosen, ladder, _tensor_cost, reduce, total, order=order)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to propose plans, what part of a model it is for, and the statistic to apply its plans with.

    ``baseline(model, sites, reduce, total)`` picks that part's sites itself: give it all of the model's.
    """

    about: str
    part: Literal["mha", "ffn"]
    propose: Callable[..., Plan]
    statistic: Statistic = field(default_factory=Weights)

    def sites(self, sites: Sites) -> Sites:
        return mha_sites(sites) if self.part == "mha" else ffn_sites(sites)

    def __call__(self, model: nn.Module, sites: Sites | None, reduce: float, total: float | None = None) -> Plan:
        what = "attention whose products can shrink" if self.part == "mha" else "feed-forward layer that can shrink"
        return self.propose(model, _only(self.sites(_found(model, sites)), what), reduce, total)


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
    largest = min(max(ranks, default=1), site.full_rank)
    return SitePlan(rank=largest, full_rank=site.full_rank, form=form, shape={"out": out, "in": into, "ranks": ranks})


def _tensor_cost(site: Site, entry: SitePlan) -> int:
    return shape_parameters(entry.form, entry.shape) + site.biases


def _matrix_cost(site: Site, entry: SitePlan) -> int:
    """Both matrices of a pair; their biases stay."""
    width = site.heads * site.full_rank
    return entry.rank * (site.in_features + site.out_features + 2 * width) + site.biases


def _plan(
    name: str,
    sites: Sites,
    ladder: Callable[[Site], Iterator[SitePlan]],
    cost: Callable[[Site, SitePlan], int],
    reduce: float,
    total: float | None,
    **settings: Any,
) -> Plan:
    _check(reduce, total)
    dense = sum(s.parameters() for s in sites.values())
    whole = dense if total is None else total
    steps = {n: _steps(s, ladder(s), cost) for n, s in sites.items()}
    steps = {n: found for n, found in steps.items() if found}
    chosen = _same_share(steps, {n: sites[n].parameters() for n in steps}, reduce * whole, whole)
    saved = sum(sites[n].parameters() - steps[n][i][0] for n, i in chosen.items())
    made_by = {"baseline": name, "reduce": reduce, "saved": saved / whole, **settings}
    return Plan(sites={n: steps[n][i][1] for n, i in chosen.items()}, made_by=made_by)


def _steps(site: Site, ladder: Iterator[SitePlan], cost: Callable[[Site, SitePlan], int]) -> list[tuple[int, SitePlan]]:
    """The entries of a ladder that save anything, each costlier than the one before."""
    steps: list[tuple[int, SitePlan]] = []
    for entry in ladder:
        parameters = cost(site, entry)
        if parameters >= site.parameters():
            break
        if not steps or parameters > steps[-1][0]:
            steps.append((parameters, entry))
    return steps


def _same_share(
    steps: Mapping[str, list[tuple[int, SitePlan]]], dense: Mapping[str, int], saving: float, whole: float
) -> dict[str, int]:
    """The costliest step of every site, at one share of what each costs dense, that still saves enough."""
    chosen = dict.fromkeys(steps, 0)
    saved = sum(dense[n] - steps[n][0][0] for n in steps)
    if saved < saving:
        most = math.floor(saved / whole * 1e4) / 1e4
        raise BudgetError(f"got reduce={saving / whole:g}, but these sites in this form allow at most {most:g}")
    order = {n: k for k, n in enumerate(steps)}
    events = [(steps[n][i][0] / dense[n], order[n], n, i) for n in steps for i in range(1, len(steps[n]))]
    for _, _, name, i in sorted(events):
        extra = steps[name][i][0] - steps[name][chosen[name]][0]
        if saved - extra < saving:
            break
        chosen[name], saved = i, saved - extra
    return chosen


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


def _nearest_company(path: str, linears: Sites) -> str:
    """The closest module around a linear layer that holds another one."""
    while path:
        path = path.rpartition(".")[0]
        if sum(1 for other in linears.values() if other.path.startswith(f"{path}." if path else "")) > 1:
            return path
    return path


def _is_ffn(module: str, group: Sequence[Site]) -> bool:
    if len(group) not in (2, 3):
        return False
    if not module and any("." in s.path for s in group):
        return False  # a pooler and a classifier have nothing but the model in common
    sizes = [(s.in_features, s.out_features) for s in group]
    return any(_expand_and_contract(sizes[:k] + sizes[k + 1 :], sizes[k]) for k in range(len(sizes)))


def _expand_and_contract(up: Sequence[tuple[int, int]], down: tuple[int, int]) -> bool:
    """Whether layers (in, out) make a feed-forward network: a → h, or twice, or a → 2h; and h → a."""
    (a, h), *others = up
    widths = (h,) if others else (h, h / 2)
    return all(other == (a, h) for other in others) and down[1] == a and down[0] in widths

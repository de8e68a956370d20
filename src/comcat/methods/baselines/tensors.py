"""Plans of linear layers as decomposed tensors, the same share of every site (Xiao et al. 2023, Table 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from torch import nn

from ...errors import SettingsError
from ...plan import Plan, SitePlan
from ...sites import Site, Sites
from .parts import found_sites, same_share_plan, some


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
    chosen = some(found_sites(model, sites).only("linear"), "linear layer that can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        out, into = (_without_ones(near_equal(n, order // 2)[::-1]) for n in (site.out_features, site.in_features))
        return (_tensor_entry(site, "tucker", out, into, ranks) for ranks in _tucker_ladder([*out, *into]))

    return same_share_plan(model, "tucker", chosen, ladder, reduce, total, order=order)


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
    chosen = some(found_sites(model, sites).only("linear"), "linear layer that can shrink")

    def ladder(site: Site) -> Iterator[SitePlan]:
        pairs = list(zip(near_equal(site.out_features, order), near_equal(site.in_features, order)[::-1], strict=True))
        pairs = [(o, i) for o, i in pairs if o * i > 1]
        out, into = ([pair[side] for pair in pairs] for side in (0, 1))
        ladder = _train_ladder([o * i for o, i in pairs])
        return (_tensor_entry(site, "tensor_train", out, into, ranks) for ranks in ladder)

    return same_share_plan(model, "tensor_train", chosen, ladder, reduce, total, order=order)


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


def _without_ones(modes: list[int]) -> list[int]:
    return [n for n in modes if n > 1] or [1]

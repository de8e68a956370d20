"""One choice for each of several decisions under a budget: what compress, the baselines and the search all end in.

A decision is a :class:`Table`: what each of its options costs and loses, and how much it keeps. Options exclude each
other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Measure = Literal["share", "energy"]


@dataclass(frozen=True)
class Table:
    """The options of one decision, rising in cost.

    ``costs[i]`` and ``losses[i]`` are what option i costs and loses; ``kept[i]`` is the share of its singular values
    that stays. ``dense`` is the cost of leaving things as they are.
    """

    costs: np.ndarray
    losses: np.ndarray
    kept: np.ndarray
    dense: float


def least_loss(tables: Sequence[Table], budget: float, *, spend: bool = False) -> list[int]:
    """The options of least total loss within a budget, one a table.

    At a price λ every decision takes the option of least ``loss + λ · cost`` by itself (Everett 1963): that is a corner
    of the lower convex hull of its options. So the steps between corners, over all tables, are taken in the order of
    what they gain per cost while the budget lasts; the last gap is closed by single steps.

    Args:
        budget: for the sum of costs; the cheapest options must fit.
        spend: go on where steps gain nothing (they may even hurt), until the budget is spent.
    """
    hulls = [_hull(t) for t in tables]
    choice = [hull[0] for hull in hulls]
    room = budget - sum(t.costs[i] for t, i in zip(tables, choice, strict=True))
    steps: list[tuple[float, int, int]] = []
    for n, (table, hull) in enumerate(zip(tables, hulls, strict=True)):
        if len(hull) > 1:
            heapq.heappush(steps, (-_gain(table, hull[0], hull[1]), n, 1))
    while steps:
        gain, n, corner = heapq.heappop(steps)
        if gain >= 0 and not spend:
            break
        table, hull = tables[n], hulls[n]
        extra = table.costs[hull[corner]] - table.costs[choice[n]]
        if extra > room * (1 + 1e-12) + 1e-9:
            break
        choice[n], room = hull[corner], room - extra
        if corner + 1 < len(hull):
            heapq.heappush(steps, (-_gain(table, hull[corner], hull[corner + 1]), n, corner + 1))
    return _fill_up(tables, choice, room, spend)


def same_share(tables: Sequence[Table], budget: float | None, measure: Measure, share: float = 0.0) -> list[int]:
    """The same share kept of everything: the largest that the budget allows, or a given one without a budget.

    ``"share"``: each decision takes its best option within that share of its dense cost. ``"energy"``: its cheapest
    option that keeps that share of the singular values. Decisions whose turn comes at exactly the last share follow in
    order while they fit.
    """
    pick = _within if measure == "share" else _keeping
    if budget is None:
        return [pick(t, share) for t in tables]

    def cost(choice: Sequence[int]) -> float:
        return float(sum(t.costs[i] for t, i in zip(tables, choice, strict=True)))

    low, high = 0.0, 1.0
    if cost([pick(t, high) for t in tables]) <= budget:
        low = high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost([pick(t, middle) for t in tables]) <= budget else (low, middle)
    choice, above = [pick(t, low) for t in tables], [pick(t, high) for t in tables]
    room = budget - cost(choice)
    for n, table in enumerate(tables):
        extra = table.costs[above[n]] - table.costs[choice[n]]
        if 0 < extra <= room + 1e-9:
            choice[n], room = above[n], room - extra
    return choice


def _within(table: Table, share: float) -> int:
    """The option of least loss within a share of the dense cost; the cheapest if none is."""
    count = int(np.searchsorted(table.costs, share * table.dense, side="right"))
    if count == 0:
        return 0
    losses = table.losses[:count]
    return int(np.flatnonzero(losses == losses.min())[-1])  # of equals the costliest


def _keeping(table: Table, energy: float) -> int:
    return int(np.flatnonzero(table.kept >= energy - 1e-12)[0])


def _hull(table: Table) -> list[int]:
    """Corners of the lower convex hull of (cost, loss), rising in cost: from the best of the cheapest options to the
    costliest.
    """
    corners: list[int] = []
    for i in range(len(table.costs)):
        if corners and table.costs[i] <= table.costs[corners[-1]]:
            if table.losses[i] >= table.losses[corners[-1]]:
                continue
            corners.pop()
        while len(corners) > 1 and _gain(table, corners[-2], corners[-1]) <= _gain(table, corners[-1], i):
            corners.pop()
        corners.append(i)
    return corners


def _gain(table: Table, i: int, j: int) -> float:
    return float((table.losses[i] - table.losses[j]) / max(table.costs[j] - table.costs[i], 1e-300))


def _fill_up(tables: Sequence[Table], choice: list[int], room: float, spend: bool) -> list[int]:
    """Spend what is left of the budget on the steps that gain most per cost."""

    def best_step(n: int) -> tuple[float, int] | None:
        table, i = tables[n], choice[n]
        extra = table.costs - table.costs[i]
        fits = np.flatnonzero((extra > 0) & (extra <= room + 1e-9))
        if not len(fits):
            return None
        gains = (table.losses[i] - table.losses[fits]) / extra[fits]
        best = int(gains.argmax())
        return (float(gains[best]), int(fits[best])) if spend or gains[best] > 0 else None

    while True:
        found = [(step, n) for n in range(len(tables)) if (step := best_step(n)) is not None]
        if not found:
            return choice
        (_, j), n = max(found, key=lambda item: (item[0][0], -item[1]))
        room -= tables[n].costs[j] - tables[n].costs[choice[n]]
        choice[n] = j


def in_step(tables: Sequence[Table], order: Literal["price", "share", "energy"]) -> list[tuple[int, ...]]:
    """Options of several tables that go together, from all at their cheapest to all at their costliest, one step at a
    time.

    ``"price"`` walks along the tables' hulls by what a step gains per cost, so that at every price the best options
    stand together; ``"share"`` and ``"energy"`` keep about the same share of each.
    """
    walks = [_hull(t) if order == "price" else list(range(len(t.costs))) for t in tables]
    events = []
    for n, (table, walk) in enumerate(zip(tables, walks, strict=True)):
        for at in range(1, len(walk)):
            events.append((_turn(table, walk[at - 1], walk[at], order), n, at))
    place = [walk[0] for walk in walks]
    found = [tuple(place)]
    for _, n, at in sorted(events):
        place[n] = walks[n][at]
        found.append(tuple(place))
    return found


def _turn(table: Table, i: int, j: int, order: Literal["price", "share", "energy"]) -> float:
    if order == "price":
        return -_gain(table, i, j)
    return float(table.costs[j] / table.dense if order == "share" else table.kept[j])

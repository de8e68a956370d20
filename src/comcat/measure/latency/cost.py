"""The time of a plan, as the choice asks for it: curves of every part, read between what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...plan import SitePlan
from ...sites import TokenSite


@dataclass(frozen=True)
class Curve:
    """Milliseconds of one part by width, at one number of tokens.

    ``dense`` is as it stands, ``spread`` half the distance of the quartiles.
    """

    widths: tuple[int, ...]
    milliseconds: tuple[float, ...]
    dense: float
    spread: float = 0.0

    def at(self, width: int) -> float:
        """At a width: a straight line between the measured ones and beyond them; under the least as at that one."""
        if not self.widths:
            return self.dense
        if width <= self.widths[-1]:
            return float(np.interp(width, self.widths, self.milliseconds))
        (w0, w1), (t0, t1) = ((0, 0, *v)[-2:] for v in (self.widths, self.milliseconds))
        return t1 + (t1 - t0) / (w1 - w0) * (width - w1)


@dataclass(frozen=True)
class Latency:
    """The time of a plan, as the choice asks for it: what each site costs in milliseconds a batch.

    QK and VO of an attention share its time evenly, so they are priced well where they have one rank. A token
    site costs what finding look-alikes and a mask take, less what the rest of its block saves.

    Attributes:
        curves: of each part by (its shape's key, share of the tokens). parts: each site's key.
        whole: milliseconds of the whole model as it stands. halves: sites that share their part's time with another.
    """

    curves: Mapping[tuple[str, float], Curve]
    parts: Mapping[str, str]
    whole: float
    halves: frozenset[str] = frozenset()
    share: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, site: Any, entry: SitePlan | None) -> float:
        key = self.parts.get(site.name)
        if key is None:
            return 0.0
        if isinstance(site, TokenSite):
            return 0.0 if entry is None else self._tokens(key, site.share(entry.keep))
        scale = 0.5 if site.name in self.halves else 1.0
        return scale * self._along(key, lambda curve: curve.dense if entry is None else curve.at(entry.keep))

    def on_fewer_tokens(self, share: float) -> Latency:
        return replace(self, share=share)

    def _tokens(self, key: str, share: float) -> float:
        """What finding look-alikes costs, and what the block's norms and sums cost less."""
        merging = self._along(f"{key} merging", lambda c: c.dense, share)
        rest = self._along(f"{key} rest", lambda c: c.dense, share) - self._along(f"{key} rest", lambda c: c.dense, 1.0)
        return merging + rest

    def _along(self, key: str, value: Callable[[Curve], float], share: float | None = None) -> float:
        """Between the measured numbers of tokens a straight line."""
        share = self.share if share is None else share
        known = sorted((at, value(curve)) for (name, at), curve in self.curves.items() if name == key)
        if not known:
            return 0.0
        shares, values = zip(*known, strict=True)
        if share < shares[0] and len(shares) > 1:  # go on in the same line
            slope = (values[1] - values[0]) / (shares[1] - shares[0])
            return max(0.0, values[0] + slope * (share - shares[0]))
        return float(np.interp(share, shares, values))


def curves_of(found: Mapping[str, Any]) -> dict[tuple[str, float], Curve]:
    """Curves out of single times, of which none falls with the width (:func:`rising`)."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for name, value in found.items():
        key, _, rest = name.rpartition("@")
        share, _, width = rest.partition("#")
        rows.setdefault((key, float(share)), {})[width] = value
    curves = {}
    for place, by_width in rows.items():
        dense, merged = by_width.pop("dense"), by_width.pop("merged", None)
        if merged is not None:
            over = max(0.0, merged["ms"] - dense["ms"])
            curves[place[0].removesuffix("block") + "merging", place[1]] = Curve((), (), over, merged["spread"])
        widths = sorted(map(int, by_width))
        times = rising([by_width[str(w)]["ms"] for w in widths])
        spread = float(np.median([v["spread"] for v in (dense, *by_width.values())]))
        curves[place] = Curve(tuple(widths), tuple(times), dense["ms"], spread)
    return curves


def rising(values: Sequence[float]) -> list[float]:
    """The rising sequence that is nearest to values in the sum of squares: neighbours out of order take their mean
    (Ayer et al. 1955). So noise does not make a wider part cheaper.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [mean for mean, count in pools for _ in range(count)]

"""Which blocks run on fewer tokens, and on how many: by what that does to the model's output on a few pictures.

Each block alone is run on fewer tokens, at a few shares, and the divergence of the output from the model's own is
measured (nats a picture; no labels). What several blocks lose adds up, to first order, as it does for ranks and units.
Shares between the measured ones lie on a straight line in the logarithms of what is merged and what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..apply import apply_
from ..errors import ModelError, SettingsError, nearest
from ..forms.tokens import grid_entry, token_entry
from ..grad_mode import outside_inference_mode
from ..hosts import find_sites
from ..hosts.classes import classes_of
from ..measure.running import call, evaluating
from ..plan import Plan, SitePlan
from ..settings import from_keywords
from ..sites import ProductSite, TokenSite
from ..statistics.examples import Example, examples_of
from ..statistics.losses import divergence
from ..statistics.trunk import Trunk, find_trunk
from .allocate import describe
from .blocks import TokenLadder
from .choose import Table, least_loss
from .ladders import AS_IT_IS, Choice
from .settings import DRAWN, How, MergeSettings

MEASURED = (0.8, 0.5)
"""Shares of the tokens at which each block is tried."""
OFFERED = tuple(round(1 - 0.05 * i, 2) for i in range(1, 14))
WINDOWS = ((1, 2), (2, 1), (2, 2))


@outside_inference_mode
def merge(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    example: Any = None,
    progress: bool = False,
    **settings: Any,
) -> Plan:
    """Propose a plan by which a model's blocks run on fewer tokens; :func:`comcat.apply_` applies it and takes it back.

    Args:
        calibration: batches of pictures; the schedule is chosen by the divergence measured on the first of them. None:
            tokens fall block by block, in a straight line, as in Bolya et al. 2023; ``example`` is then one picture (1,
            channels, height, width).
        settings: fields of :class:`MergeSettings`, as ``keep=0.7`` and ``how="grid"``.

    Returns:
        The plan; ``made_by`` says the schedules that were compared, and the divergence of each (nats a picture).

    Raises:
        ModelError: where the model has no trunk, or none of its blocks can run on fewer tokens; the message says why.
        SettingsError: for a share, a form or a block that cannot be.
    """
    s = from_keywords(MergeSettings, settings)
    shown = _shown(model, calibration, s.pictures, progress)
    if not shown and example is None:
        raise SettingsError("merge needs pictures: calibration, or one picture as example")
    trunk = chosen_blocks(find_trunk(model, one_of(model, shown) if shown else example), s.blocks or None)
    offered = Offer(model, trunk.sites, s.how, residual=s.residual, by=s.by)
    count = len(trunk.sites) + len(trunk.refused)
    goal = s.keep * count - len(trunk.refused)  # of blocks that cannot, all tokens run
    fewest = sum(min(offered.shares(site)) for site in trunk.sites)
    if goal < fewest - 1e-9:
        least = math.ceil((fewest + len(trunk.refused)) / count * 100) / 100
        raise SettingsError(
            f"got keep={s.keep:g}, but the blocks that can run on fewer tokens allow {least:g} at least"
        )
    schedules = offered.schedules(goal)
    made_by: dict[str, Any] = {"method": "merge", "how": s.how, "keep": s.keep, "residual": s.residual}
    if shown:
        meter = Meter(model, shown, progress)
        ladders = token_ladders(offered, meter)
        schedules["measured"] = _least(ladders, goal)
        losses = {name: meter.loss(entries) for name, entries in schedules.items()}
        best = min(losses, key=lambda name: losses[name])
        made_by |= {"pictures": meter.count, "divergences": losses}
    else:
        best = "linear"
    entries = schedules[best]
    tokens = sum(e.keep / e.full for e in entries.values()) + count - len(entries)
    made_by |= {"schedule": best, "tokens": tokens / count}
    whole = find_sites(model)
    return Plan(sites=entries, made_by=made_by, made_for=describe(model, whole, whole))


class Offer:
    """What blocks may run on in one form."""

    def __init__(
        self, model: nn.Module, sites: Sequence[TokenSite], how: How, *, residual: bool = True, by: str = "class"
    ) -> None:
        self.model, self.sites, self.how, self.residual = model, sites, how, residual
        if how == "grid" and (unknown := next((s for s in sites if s.grid is None), None)) is not None:
            raise ModelError(f"{unknown.name}: the grid of its tokens is not known; how='similar' needs none")
        self.attention = _class_attention(model, sites, by) if how == "drop" else {}

    def entry(self, site: TokenSite, share: float) -> SitePlan:
        """A site at the offered share that is next to ``share``, as a plan's entry."""
        if self.how == "grid":
            window = min(WINDOWS, key=lambda w: abs(grid_entry(site, w).keep / site.full - share))
            return grid_entry(site, window, residual=self.residual)
        return self._entry(site, min(site.full, max(1, round(share * site.full))))

    def _entry(self, site: TokenSite, keep: int) -> SitePlan:
        more = self.attention.get(site.name, {})
        return token_entry(site, self.how, keep, residual=self.residual, **more)

    def shares(self, site: TokenSite) -> tuple[float, ...]:
        """The shares at which a site can run, less than one."""
        if self.how == "grid":
            return tuple(sorted({grid_entry(site, w).keep / site.full for w in WINDOWS} - {1.0}))
        return OFFERED[::-1]

    def schedules(self, goal: float) -> dict[str, dict[str, SitePlan]]:
        """Schedules by rule whose shares add up to at most the goal: for the grid windows from the last block back
        (first pairs, then squares); else tokens that fall in a straight line from all in the first block, and the same
        share in every block.
        """
        if self.how == "grid":
            return {"linear": self._windows_from_the_end(goal)}
        return {"linear": self._counts(self._line(goal), goal), "even": self._counts([1.0] * len(self.sites), goal)}

    def _windows_from_the_end(self, goal: float) -> dict[str, SitePlan]:
        found: dict[str, SitePlan] = {}
        for window in ((1, 2), (2, 2)):
            for site in reversed(self.sites):
                if self._sum(found) <= goal + 1e-9:
                    return found
                found[site.name] = grid_entry(site, window, residual=self.residual)
        return found

    def _line(self, goal: float) -> list[float]:
        """Shares on a straight line from 1 that add up to the goal, none under the fewest offered."""
        count, low, high = len(self.sites), 0.0, 4.0
        if count == 1:
            return [goal]

        def shares(step: float) -> list[float]:
            return [max(1 - step * i / (count - 1), min(self.shares(s))) for i, s in enumerate(self.sites)]

        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(shares(middle)) > goal else (low, middle)
        return shares(high)

    def _counts(self, shares: Sequence[float], goal: float) -> dict[str, SitePlan]:
        """Tokens of each block about in these proportions, single tokens taken from the fullest blocks until the goal
        is met.
        """
        tokens = [round(share * site.full) for share, site in zip(shares, self.sites, strict=True)]
        while sum(t / site.full for t, site in zip(tokens, self.sites, strict=True)) > goal + 1e-9:
            excess = [t / site.full - share for t, site, share in zip(tokens, self.sites, shares, strict=True)]
            tokens[max(range(len(tokens)), key=lambda n: (excess[n], n))] -= 1
        pairs = zip(self.sites, tokens, strict=True)
        return {site.name: self._entry(site, max(1, t)) for site, t in pairs if t < site.full}

    def _sum(self, entries: Mapping[str, SitePlan]) -> float:
        return sum(e.keep / e.full for e in entries.values()) + len(self.sites) - len(entries)


class Meter:
    """Measures how far a plan moves a model's output on some pictures."""

    def __init__(self, model: nn.Module, shown: Sequence[Example], progress: bool = False) -> None:
        self.model, self.shown, self.progress = model, shown, progress
        self.classes = classes_of(model)
        self.sites = find_sites(model)
        self.count = sum(example.count for example in shown)
        self.before = self._outputs()

    def loss(self, entries: Mapping[str, SitePlan]) -> float:
        """Divergence in nats a picture with some entries of a plan applied."""
        if not entries:
            return 0.0
        handle = apply_(self.model, Plan(sites=entries), sites=self.sites)
        try:
            after = self._outputs()
        finally:
            handle.revert()
        return sum(divergence(b, a, self.classes) for b, a in zip(self.before, after, strict=True)) / self.count

    def _outputs(self) -> list[Any]:
        p = next(self.model.parameters())
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return [call(self.model, e.on(p.device, p.dtype, gradients=False)) for e in self.shown]


def token_ladders(offer: Offer, meter: Meter) -> list[TokenLadder]:
    """What every block loses at every share that is offered to it."""
    from tqdm import tqdm

    found = []
    with tqdm(
        total=len(offer.sites) * len(MEASURED), desc="tokens", unit="try", disable=not meter.progress, leave=False
    ) as bar:
        for site in offer.sites:
            shares = offer.shares(site) if offer.how == "grid" else MEASURED
            tried = []
            for share in shares:
                tried.append((share, meter.loss({site.name: offer.entry(site, share)})))
                bar.update()
            law = _law(tried)
            choices = [Choice({site.name: offer.entry(site, s)}, law(s), 1.0) for s in sorted(offer.shares(site))]
            found.append(TokenLadder(site, (*choices, AS_IT_IS)))
    return found


def _law(tried: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The loss at any share, out of some: a straight line between logarithms of what goes and what is lost."""
    gone = np.log([1 - share for share, _ in tried])
    lost = np.log([max(loss, 1e-12) for _, loss in tried])
    order = np.argsort(gone)
    gone, lost = gone[order], np.maximum.accumulate(lost[order])  # noise must not make more merging look better

    def at(share: float) -> float:
        x = math.log(1 - share)
        if x < gone[0] or len(gone) == 1:
            return float(np.exp(lost[0] + 2 * (x - gone[0])))  # small changes cost with their square
        n = min(int(np.searchsorted(gone, x)), len(gone) - 1)
        slope = (lost[n] - lost[n - 1]) / (gone[n] - gone[n - 1]) if n else 2.0
        return float(np.exp(lost[n] + slope * (x - gone[n])))

    return at


def _least(ladders: Sequence[TokenLadder], goal: float) -> dict[str, SitePlan]:
    """The entries of least loss whose shares add up to the goal."""
    tables = []
    for ladder in ladders:
        shares = np.array([ladder.share(c) for c in ladder.choices])
        losses = np.array([c.loss for c in ladder.choices])
        tables.append(Table(shares, losses, np.ones_like(shares), 1.0))
    places = least_loss(tables, goal)
    chosen = [ladder.choices[i] for ladder, i in zip(ladders, places, strict=True)]
    return {name: entry for choice in chosen for name, entry in choice.entries.items()}


def measured_tokens(model: nn.Module, batches: Iterable, *, progress: bool = False) -> list[TokenLadder]:
    """What a model's blocks lose on fewer tokens, those that look alike merged, measured on the first pictures.

    Raises ModelError where the model has no trunk or no block of it can run on fewer tokens.
    """
    shown = _shown(model, batches, DRAWN, progress)
    trunk = chosen_blocks(find_trunk(model, one_of(model, shown)), None)
    return token_ladders(Offer(model, trunk.sites, "similar"), Meter(model, shown, progress))


def blank_tokens(model: nn.Module, example: Any) -> list[TokenLadder]:
    """The same ladders as if every share lost the same, to see what can be saved, before anything is measured."""
    trunk = chosen_blocks(find_trunk(model, example), None)
    offer = Offer(model, trunk.sites, "similar")
    return [
        TokenLadder(
            s, (*(Choice({s.name: offer.entry(s, share)}, 1 - share, 1.0) for share in offer.shares(s)), AS_IT_IS)
        )
        for s in trunk.sites
    ]


def chosen_blocks(trunk: Trunk, blocks: Sequence[str] | None) -> Trunk:
    """A trunk of some blocks. Raises ModelError where none can run on fewer tokens, SettingsError for unknown ones."""
    if not trunk.sites:
        reasons = "; ".join(map(str, trunk.refused[:2]))
        raise ModelError(f"no block of this model can run on fewer tokens: {reasons}")
    if blocks is None:
        return trunk
    known = {site.path: site for site in trunk.sites}
    for path in blocks:
        if path not in known:
            raise SettingsError(f"got block {path!r}{nearest(path, known)}; expected some of {', '.join(known)}")
    return Trunk(tuple(known[p] for p in known if p in blocks), (), trunk.tokens, trunk.patches)


def _class_attention(model: nn.Module, sites: Sequence[TokenSite], by: str) -> dict[str, dict[str, Any]]:
    """Where each block's queries and keys come from, for choosing tokens by the class token's attention."""
    if by == "random":
        return {site.name: {"by": "random"} for site in sites}
    if not sites[0].prefix:
        raise ModelError("the model has no class token whose attention could choose; by='random' needs none")
    products = {s.path: s for s in find_sites(model).values() if isinstance(s, ProductSite) and s.kind == "qk"}
    found = {}
    for site in sites:
        product = next((s for path, s in products.items() if path.startswith(f"{site.path}.")), None)
        if product is None:
            raise ModelError(f"{site.path}: its class attention cannot be read, as it has no plain QK product")
        a = product.attention
        inside = {key: p.path.removeprefix(f"{site.path}.") for key, p in (("query", a.q), ("key", a.k))}
        found[site.name] = {
            "query": [inside["query"], a.q.start, a.q.stop],
            "key": [inside["key"], a.k.start, a.k.stop],
            "heads": a.heads,
            "scale": a.scale,
        }
    return found


def one_of(model: nn.Module, shown: Sequence[Example]) -> Any:
    """The first picture, as the model is called with it."""
    p = next(model.parameters())
    return shown[0].first(1).on(p.device, p.dtype, gradients=False)


def _shown(model: nn.Module, calibration: Iterable | None, pictures: int, progress: bool) -> list[Example]:
    return [] if calibration is None else list(examples_of(model, calibration, pictures))

"""A plan by which blocks run on fewer tokens: the best of some schedules, by what was measured."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ...errors import ModelError, SettingsError, nearest
from ...files import home_path
from ...grad_mode import outside_inference_mode
from ...hosts import find_sites
from ...hosts.blocks import reduced_blocks
from ...plan import Plan, SitePlan
from ...settings import from_keywords
from ...sites import is_within
from ...statistics.trunk import Trunk, find_trunk
from ...wrappers import bare
from ..allocate import describe
from ..choose import Table, least_loss
from ..ladders import AS_IT_IS, Choice
from ..settings import DRAWN, MergeSettings
from .blocks import TokenLadder
from .meter import Meter, one_of, shown_of, token_ladders
from .offer import Offer


@outside_inference_mode
def merge(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    example: Any = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Plan:
    """Propose a plan by which a model's blocks run on fewer tokens; :func:`comcat.apply_` applies it and takes it back.

    Args:
        calibration: batches of pictures; the schedule is chosen by the divergence measured on the first of them. None:
            tokens fall block by block, in a straight line, as in Bolya et al. 2023; ``example`` is then one picture (1,
            channels, height, width).
        out: a folder in which what was measured is kept, so that the same call after a stop measures only the rest.
        settings: fields of :class:`MergeSettings`, as ``keep=0.7`` and ``how="grid"``. With ``keep=1`` nothing is
            measured, and the plan changes nothing.

    Returns:
        The plan; ``made_by`` says the schedules that were compared, and the divergence of each (nats a picture).

    Raises:
        ModelError: where the model has no trunk, or none of its blocks can run on fewer tokens; the message says why.
        SettingsError: for a share, a form or a block that cannot be.
    """
    s, model = from_keywords(MergeSettings, settings), bare(model)
    if not s.blocks:
        _check_unmerged(model)
    if s.keep == 1:
        return _of_all_tokens(model, s)
    shown = shown_of(model, calibration, s.pictures, progress)
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
        meter = Meter(model, shown, progress, None if out is None else home_path(out))
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


def _check_unmerged(model: nn.Module) -> None:
    """Raise ModelError where blocks run on fewer tokens already: a share of all tokens would not count them."""
    merged = reduced_blocks(model)
    if merged:
        raise ModelError(
            f"blocks of the model run on fewer tokens already, the first {next(iter(merged))}; take the merges back "
            "by handle.revert() and merge anew, or name other blocks, blocks=(…)"
        )


def _of_all_tokens(model: nn.Module, s: MergeSettings) -> Plan:
    """The plan by which every block runs on all tokens; there is nothing to measure."""
    made_by = {"method": "merge", "how": s.how, "keep": 1.0, "residual": s.residual, "schedule": "none", "tokens": 1.0}
    whole = find_sites(model)
    return Plan(sites={}, made_by=made_by, made_for=describe(model, whole, whole))


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


def measured_tokens(
    model: nn.Module, batches: Iterable, *, only: Sequence[str] = (), progress: bool = False
) -> tuple[tuple[TokenLadder, ...], Meter]:
    """What a model's blocks lose on fewer tokens, those that look alike merged, measured on the first pictures, and
    what measured it.

    Args:
        only: path prefixes of the blocks that may; by default all.

    Raises ModelError where the model has no trunk or no block of it can run on fewer tokens, SettingsError where
    ``only`` names none of them.
    """
    shown = shown_of(model, batches, DRAWN, progress)
    trunk = blocks_under(chosen_blocks(find_trunk(model, one_of(model, shown)), None), only)
    meter = Meter(model, shown, progress)
    return tuple(token_ladders(Offer(model, trunk.sites, "similar"), meter)), meter


def blank_tokens(model: nn.Module, example: Any, only: Sequence[str] = ()) -> list[TokenLadder]:
    """The same ladders as if every share lost the same, to see what can be saved, before anything is measured."""
    trunk = blocks_under(chosen_blocks(find_trunk(model, example), None), only)
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


def blocks_under(trunk: Trunk, only: Sequence[str]) -> Trunk:
    """A trunk of the blocks under some path prefixes; without any, as it is.

    Raises SettingsError where no block is.
    """
    if not only:
        return trunk
    sites = tuple(s for s in trunk.sites if any(is_within(s.path, p) for p in only))
    if not sites:
        paths = [site.path for site in trunk.sites]
        raise SettingsError(
            f"got only={', '.join(only)} and forms with tokens, which names no whole block{nearest(only[0], paths)}; "
            f"expected some of {', '.join(paths)}, or forms without tokens"
        )
    return replace(trunk, sites=sites)

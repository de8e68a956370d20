"""Every budget from one calibration: what a model loses along the whole way from all of it to little."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..apply import apply_
from ..errors import BudgetError, SettingsError
from ..factors import Weights
from ..forms import Flow, site_for
from ..measure import count_macs, count_parameters, evaluate
from ..measure.latency import Latency, measure_latency
from ..plan import Plan
from ..sites import HiddenSite, Sites, block_of
from ..statistics import Statistics
from ..wrappers import bare
from .allocate import allocate, of_forms
from .budgets.savings import saved_share
from .costs import Cost, Macs, Parameters
from .prepare import Prepared, kept, prepare
from .propose import propose
from .request import check_request
from .settings import CompressSettings, check_forms

RIVAL_SHARES = (0.3, 0.5, 0.7)
"""How far along the way the plans go that stand beside ours."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan on the way.

    Attributes:
        reduce: share of the budget that was asked to be saved. loss: predicted, nats a picture (None: in no such unit).
        parameters, macs, milliseconds: of the whole model; milliseconds None where time was not measured.
        measured: agreement, top-1 and divergence on held-out pictures, where they were measured.
        parts: per part of the model, by its block, what stays of all: ``{"qk": [24, 64], "units": [768, 1536], …}``.
    """

    reduce: float
    loss: float | None
    parameters: float
    macs: float
    milliseconds: float | None = None
    measured: Mapping[str, float | None] | None = None
    parts: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """The way of one model.

    Attributes:
        dense: the model as it stands. points: rising in what is saved. rivals: plans of other rules, by their name.
        budget: what the way is along. pictures: that calibration and the measurements saw.
    """

    dense: Point
    points: tuple[Point, ...]
    rivals: Mapping[str, tuple[Point, ...]]
    budget: str
    settings: Mapping[str, Any]
    pictures: tuple[int, int]
    latency: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explore(
    model: nn.Module,
    calibration: Iterable,
    held_out: Iterable | None = None,
    *,
    points: int = 30,
    measured: int = 10,
    time: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Exploration:
    """Plans for every budget, from one calibration.

    Args:
        calibration: batches of pictures. held_out: batches to measure agreement (and top-1, where there are labels) on.
        points: how many budgets. measured: on how many of them agreement is measured.
        time: measure milliseconds of the model's parts as well, also where time is not the budget.
        settings: fields of :class:`~comcat.methods.settings.CompressSettings`, but for ``reduce``.

    Raises:
        SettingsError: for settings that do not fit. BudgetError: where nothing can be saved.
    """
    from tqdm import tqdm

    if points < 2 or measured < 0:
        raise SettingsError(f"got points={points} and measured={measured}, expected at least 2 and at least 0")
    chosen = CompressSettings(**{**settings, "reduce": 0.5})
    if chosen.ranks == "search":
        raise SettingsError("got ranks='search', which trains for every budget; expected a rule")
    model = bare(model)
    check_request(model, chosen)
    calibration = kept(calibration)
    held_out = None if held_out is None else kept(held_out)
    prepared = prepare(model, calibration, chosen, progress=progress)
    gauge = _Gauge(model, prepared, chosen, time, progress)
    plans = _plans(model, prepared, chosen, points, progress)
    at = set(np.linspace(0, len(plans) - 1, min(measured, len(plans))).round().astype(int)) if held_out else set()
    rivals = _rivals(model, prepared, chosen, calibration, max(reduce for reduce, _ in plans), progress)
    found, beside = [], {name: [] for name in rivals}
    with tqdm(
        total=len(at) + sum(map(len, rivals.values())), desc="measuring", disable=not progress, leave=False
    ) as bar:
        for i, (reduce, plan) in enumerate(plans):
            said = gauge.measured(plan, prepared, held_out) if i in at else None
            bar.update(i in at)
            found.append(gauge.point(reduce, plan, prepared, said))
        for name, ways in rivals.items():
            for reduce, plan, theirs in ways:
                said = None if held_out is None else gauge.measured(plan, theirs, held_out)
                beside[name].append(gauge.point(reduce, plan, theirs, said, loss=False))
                bar.update()
    seen = prepared.statistic.pictures if isinstance(prepared.statistic, Statistics) else 0
    return Exploration(
        dense=gauge.dense, points=tuple(found), rivals={n: tuple(p) for n, p in beside.items()}, budget=chosen.budget,
        settings={k: v for k, v in asdict(chosen).items() if k != "reduce"}, pictures=(seen, gauge.judged),
        latency=None if gauge.latency is None else dict(gauge.latency.facts),
    )  # fmt: skip


def _plans(
    model: nn.Module, prepared: Prepared, settings: CompressSettings, points: int, progress: bool
) -> list[tuple[float, Plan]]:
    """Plans for rising savings, to the largest that is in reach."""
    from tqdm import tqdm

    def plan_for(reduce: float) -> Plan | None:
        try:  # time is predicted here; the command corrects it by a measurement
            of = replace(settings, reduce=reduce)
            return propose(model, prepared, of, corrects=False)
        except BudgetError:
            return None

    low, high = 0.0, 1.0
    for _ in range(10):  # the largest saving in reach, to a thousandth
        middle = (low + high) / 2
        low, high = (middle, high) if _reaches(model, prepared, settings, middle) else (low, middle)
    if low == 0.0:
        raise BudgetError(f"nothing of the model's {settings.budget} can be saved")
    shares = [round(float(s), 3) for s in np.linspace(0.05, low, points)] if low > 0.1 else [round(low, 3)]
    bar = tqdm(shares, desc="plans", unit="plan", disable=not progress, leave=False)
    return [(reduce, plan) for reduce in bar if (plan := plan_for(reduce)) is not None]


def _reaches(model: nn.Module, prepared: Prepared, settings: CompressSettings, reduce: float) -> bool:
    try:
        propose(model, prepared, replace(settings, reduce=reduce, multiple=settings.multiple or 16), corrects=False)
    except BudgetError:
        return False
    return True


def _rivals(
    model: nn.Module, prepared: Prepared, settings: CompressSettings, calibration: Iterable, most: float, progress: bool
) -> dict[str, list[tuple[float, Plan, Prepared]]]:
    """The same share kept of everything, and that by the singular values of the weights alone."""
    found: dict[str, list[tuple[float, Plan, Prepared]]] = {"uniform": [], "SVD of the weights": []}
    sites = of_forms(prepared.sites, ("ranks",))
    plain = replace(prepared, statistic=Weights(), sites=sites, factorizations={}, tokens=())
    for share in RIVAL_SHARES:
        for name, theirs, forms in (("uniform", prepared, settings.forms), ("SVD of the weights", plain, "ranks")):
            forms = ",".join(f for f in check_forms(forms) if f != "tokens") or "ranks"
            try:
                plan = allocate(
                    model, theirs.statistic, reduce=share * most, rule="uniform", forms=forms, budget=settings.budget,
                    sites=theirs.sites, factorizations=theirs.factorizations or None, multiple=settings.multiple or 8,
                    total=theirs.total, cost=theirs.cost, made_for=theirs.made_for, tie=False,
                )  # fmt: skip
            except BudgetError:
                continue
            found[name].append((share * most, plan, theirs))
    return {name: ways for name, ways in found.items() if ways}


class _Gauge:
    """What plans cost and do."""

    def __init__(
        self, model: nn.Module, prepared: Prepared, settings: CompressSettings, time: bool, progress: bool
    ) -> None:
        if prepared.example is None:
            raise SettingsError("explore needs calibration pictures")
        self.model, self.judged = model, 0
        self.reference = copy.deepcopy(model)
        self.parameters = float(count_parameters(model))
        self.macs = float(count_macs(model, prepared.example))
        self.mac_cost: Cost = prepared.cost if isinstance(prepared.cost, Macs) else _macs(model, prepared)
        self.latency = prepared.cost if isinstance(prepared.cost, Latency) else None
        if time and self.latency is None:
            self.latency = measure_latency(
                model, prepared.sites, prepared.example, tokens=[t.site for t in prepared.tokens],
                batch=settings.batch, compile=settings.compiled, quick=settings.quick, progress=progress,
            )  # fmt: skip
        self.dense = self._point(0.0, 0.0, {}, prepared, None)

    def point(
        self,
        reduce: float,
        plan: Plan,
        prepared: Prepared,
        measured: Mapping[str, float | None] | None,
        loss: bool = True,
    ) -> Point:
        return self._point(reduce, plan.made_by.get("predicted_loss") if loss else None, plan.sites, prepared, measured)

    def _point(self, reduce: float, loss: float | None, entries: Any, prepared: Prepared, measured: Any) -> Point:
        def left(cost: Cost, whole: float) -> float:
            return whole * (1 - saved_share(entries, prepared, cost, whole))

        latency = self.latency
        return Point(
            reduce=reduce, loss=loss, parameters=left(Parameters(), self.parameters),
            macs=left(self.mac_cost, self.macs),
            milliseconds=None if latency is None else left(latency, latency.whole), measured=measured,
            parts=_parts(entries, prepared.sites),
        )  # fmt: skip

    def measured(self, plan: Plan, prepared: Prepared, held_out: Any) -> dict[str, float | None]:
        """Agreement, top-1 and divergence of a plan on held-out pictures."""
        handle = apply_(
            self.model, plan, prepared.statistic, sites=prepared.sites, factorizations=prepared.factorizations or None
        )
        try:
            said = evaluate(self.model, held_out, against=self.reference)
        finally:
            handle.revert()
        self.judged = said.count
        found = {"agreement": said.agreement, "top1": said.top1, "divergence": said.divergence, "cosine": said.cosine}
        return {name: value for name, value in found.items() if value is not None}


def _macs(model: nn.Module, prepared: Prepared) -> Macs:
    statistic: Any = prepared.statistic
    if not isinstance(statistic, Statistics):
        from ..statistics import calibrate

        example: Tensor = prepared.example  # type: ignore[assignment]
        statistic = calibrate(model, [example], statistic="activation", sites=prepared.sites)
    flows = {n: Flow(statistic.rows.get(n, 0.0), statistic.pairs.get(n, 0.0)) for n in prepared.sites}
    return Macs(flows)


def _parts(entries: Any, sites: Sites) -> dict[str, dict[str, tuple[int, int]]]:
    """What stays of every part, by block; parts that stay whole are told as well, but for layers of a feed-forward that
    is told by its hidden units.
    """
    hidden = {path for s in sites.values() if isinstance(s, HiddenSite) for path in s.modules}
    layered = {s.name for s in sites.values() if isinstance(s, HiddenSite) and any(p in entries for p in s.modules)}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    name: Callable[[str, str], str] = lambda path, kind: kind if kind != "linear" else path.rpartition(".")[2]  # noqa: E731
    for site in sites.values():
        if site.name in layered or (site.name in hidden and site.name not in entries):
            continue
        entry = entries.get(site.name)
        part = name(site.path, site.kind)
        found.setdefault(block_of(site.path), {})[part] = (site.full if entry is None else entry.keep, site.full)
    for key, entry in entries.items():
        if key not in sites:
            site = site_for(key, entry, sites)
            found.setdefault(site.path, {})["tokens"] = (entry.keep, entry.full)
    return found

"""The whole way from a model and some pictures to a smaller model: calibrate, propose a plan, apply it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..calibration import StatisticName, Statistics, calibrate, pictures_of
from ..errors import BudgetError, DataError, ModelError, NumericsError, SettingsError, nearest
from ..factors import Statistic, Weights
from ..grad_mode import outside_inference_mode
from ..hosts import find_sites
from ..hosts.ordinary import check_ordinary
from ..linalg import Factorization
from ..measure import count_macs, count_parameters, evaluate
from ..plan import Handle, Plan, apply_
from ..record import Record
from ..runs.watching import first_unsound
from ..settings import LARGEST_SEED, check_types, expect, from_keywords
from ..sites import Site, Sites
from .allocate import Budget, RankRule, allocate, check_asked, spectra

MULTIPLES = (16, 8, 4, 2)
TOLERATED, NEGLIGIBLE = 1.1, 1e-3
"""How much more predicted loss rounder ranks may cost: a tenth, or a thousandth of a nat, which no measurement would show."""


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What to compress and how; the command line and recipes are made from these fields."""

    reduce: float | None = None
    """Share of the whole model's cost to save, for example 0.5."""
    max_drop: float | None = None
    """Instead of reduce: save as much as loses at most so many points on held-out pictures (top-1, or agreement without labels)."""
    budget: Budget = "parameters"
    """What cost is: parameters or macs (multiply-accumulates)."""
    statistic: StatisticName = "loss"
    """What errors are measured by: the weights alone (the paper), activations, or their effect on the loss."""
    ranks: RankRule | Literal["search"] = "waterfill"
    """How ranks are chosen: the same share everywhere, one rank for all products, the same share of singular values, least predicted loss, or by search on training pictures."""
    energy: float = 0.9
    """Share of the singular values to keep with ranks 'energy' where neither reduce nor max_drop is given."""
    multiple: int | None = None
    """Round ranks to multiples of it; by default the largest of 16, 8, 4, 2 that costs at most a tenth (or 0.001 nats) more predicted loss than 1; kernels like round widths."""
    tie: bool | None = None
    """Give QK and VO of a layer one rank; by default with a MACs budget, where fused attention pads both to one width anyway."""
    per_head: bool = False
    """Let the heads of a layer have ranks of their own, padded to the largest."""
    joint_refit: bool = True
    """After truncation, refit the output projection over all heads at once."""
    sequential: bool = False
    """Calibrate block after block on the model whose earlier blocks are already small."""
    only: tuple[str, ...] = ()
    """Kinds (qk, vo, linear) or path prefixes (blocks.3) that may shrink; by default all."""
    pictures: int = 512
    """How many pictures to calibrate on."""
    seed: int = 0
    """Seed of the choice of pictures and of sampled labels."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.reduce is not None and self.max_drop is not None:
            raise SettingsError("got both reduce and max_drop, expected one of them")
        expect(self, "max_drop", above=0)
        expect(self, "pictures", "multiple", least=1)
        expect(self, "reduce", above=0, below=1)
        expect(self, "energy", above=0, most=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that rank choice needs, found once: sites, what was measured, and the factorisation of every site."""

    sites: Sites
    statistic: Statistic
    factorizations: Mapping[str, Factorization]
    total: float
    macs: Callable[[Site, int | None], float] | None = None
    example: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What :func:`compress_` did: the handle to take it back, and what it was based on."""

    handle: Handle
    plan: Plan
    prepared: Prepared
    notes: tuple[str, ...] = field(default=())


@outside_inference_mode
def compress(
    model: nn.Module,
    calibration: Iterable | None = None,
    *,
    held_out: Iterable | None = None,
    plan: Plan | None = None,
    progress: bool = False,
    **settings: Any,
) -> nn.Module:
    """A smaller copy of a model; the model itself is untouched.

    Args:
        calibration: batches of pictures (batch, channels, height, width), with or without labels, which are ignored. Not needed with ``statistic="weights"``
            and a parameter budget.
        held_out: batches to measure the drop on, with ``max_drop``: training pictures that the calibration did not see, never the evaluation set.
        plan: ranks to use instead of choosing them, for example what :func:`comcat.search` found.
        settings: fields of :class:`CompressSettings`; without a plan at least ``reduce`` or ``max_drop``.

    Returns:
        An ordinary module with ``comcat_record``, ready for :func:`comcat.save`.
    """
    chosen = from_keywords(CompressSettings, settings)
    check_ordinary(model)
    small = copy.deepcopy(model)
    compress_(small, calibration, chosen, held_out=held_out, plan=plan, progress=progress)
    return small


@outside_inference_mode
def compress_(
    model: nn.Module,
    calibration: Iterable | None,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    plan: Plan | None = None,
    progress: bool = False,
) -> Compressed:
    """Compress a model in place; see :func:`compress`. With a ``plan``, ranks are the plan's and only weights are computed."""
    if plan is None and settings.reduce is None and settings.max_drop is None and settings.ranks != "energy":
        raise SettingsError(
            "say how far to go: reduce=0.5 (share to save), max_drop=1.0 (points that may be lost) or a plan"
        )
    if plan is None and settings.ranks == "search":
        raise SettingsError(
            "ranks='search' needs training pictures: plan = comcat.search(model, pictures, …), then compress with that plan"
        )
    check_asked(settings.reduce if plan is None else None, settings.multiple)
    check_ordinary(model)
    record = getattr(model, "comcat_record", None)
    if record is not None and record.plan.sites:
        raise ModelError("the model is compressed already, and its factors are no sites; begin from the original")
    if (unsound := first_unsound(model.named_parameters())) is not None:
        raise NumericsError(f"{unsound} holds NaN or infinite values")
    calibration = None if calibration is None else _kept(calibration)
    before = origin_or_none(model)
    prepared = prepare(model, calibration, settings, progress=progress)
    notes: list[str] = []
    if plan is None:
        plan = propose(model, prepared, settings, held_out=held_out, notes=notes)
    if settings.sequential:
        handle = _apply_sequentially(model, plan, prepared, calibration, settings, progress)
    else:
        handle = apply_(
            model,
            plan,
            prepared.statistic,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            joint_refit=settings.joint_refit,
        )
    record = Record(plan=plan, settings=asdict(settings), **before)
    model.comcat_record = record  # type: ignore[assignment]
    return Compressed(handle=handle, plan=plan, prepared=prepared, notes=tuple(notes))


def prepare(
    model: nn.Module, calibration: Iterable | None, settings: CompressSettings, *, progress: bool = False
) -> Prepared:
    """Find the sites, calibrate, factorise and count: everything that does not depend on the budget's size."""
    sites = find_sites(model)
    if settings.only:
        chosen = sites.only(*settings.only)
        if not len(chosen):
            known = {"qk", "vo", "linear", *(s.path for s in sites.values())}
            raise SettingsError(f"only={', '.join(settings.only)} leaves no site{nearest(settings.only[0], known)}")
        sites = chosen
    if not len(sites):
        raise ModelError("nothing in this model can shrink: " + "; ".join(map(str, sites.refused[:3])))
    example = None
    if calibration is not None:
        calibration = _kept(calibration)
        example = _first_picture(calibration)
    if settings.statistic == "weights":
        statistic: Statistic = Weights()
    else:
        if calibration is None:
            raise SettingsError(
                f"statistic {settings.statistic!r} needs calibration pictures; without any, say statistic='weights'"
            )
        statistic = _calibrated(model, calibration, settings, sites, progress)
        sites = Sites({n: s for n, s in sites.items() if n not in statistic.unreached}, sites.refused)
    total = float(count_parameters(model))
    macs: Callable[[Site, int | None], float] | None = None
    if settings.budget == "macs":
        if example is None:
            raise SettingsError("budget 'macs' needs calibration pictures, at least one")
        total = float(count_macs(model, example))
        flow = (
            statistic
            if isinstance(statistic, Statistics)
            else calibrate(model, [example], statistic="activation", sites=sites)
        )

        def macs_of(site: Site, rank: int | None) -> float:
            return site.macs(rank, flow.rows.get(site.name, 0.0), flow.pairs.get(site.name, 0.0))

        macs = macs_of

    return Prepared(
        sites=sites,
        statistic=statistic,
        factorizations=spectra(model, sites, statistic),
        total=total,
        macs=macs,
        example=example,
    )


def propose(
    model: nn.Module,
    prepared: Prepared,
    settings: CompressSettings,
    *,
    held_out: Iterable | None = None,
    notes: list[str] | None = None,
) -> Plan:
    """Ranks for the budget; with ``max_drop``, the largest saving whose measured drop on held-out pictures stays within it."""

    def plan_with(reduce: float | None, multiple: int) -> Plan:
        return allocate(
            model,
            prepared.statistic,
            reduce=reduce,
            rule=settings.ranks,  # type: ignore[arg-type]  # a search never comes here
            budget=settings.budget,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            multiple=multiple,
            energy=settings.energy,
            tie=settings.budget == "macs" if settings.tie is None else settings.tie,
            per_head=settings.per_head,
            total=prepared.total,
            macs=prepared.macs,
        )

    def plan_for(reduce: float | None) -> Plan:
        if settings.multiple is not None:
            return plan_with(reduce, settings.multiple)
        finest = plan_with(reduce, 1)  # raises where even this cannot meet the budget
        for multiple in MULTIPLES:
            with suppress(BudgetError):
                plan = plan_with(reduce, multiple)
                if plan.made_by["error"] <= TOLERATED * finest.made_by["error"] + NEGLIGIBLE:
                    return plan
        return finest

    if settings.max_drop is None:
        return plan_for(settings.reduce)
    if held_out is None:
        raise SettingsError(
            "max_drop needs held_out: pictures to measure the drop on, from the training data and apart from the calibration's"
        )
    return _largest_within(model, prepared, settings, plan_for, held_out, [] if notes is None else notes)


def _largest_within(
    model: nn.Module,
    prepared: Prepared,
    settings: CompressSettings,
    plan_for: Callable[[float | None], Plan],
    held_out: Iterable,
    notes: list[str],
) -> Plan:
    """Bisect the saving to a hundredth; the measured drop is what decides, the prediction only orders ranks within a saving."""
    assert settings.max_drop is not None
    held_out, reference = _kept(held_out), copy.deepcopy(model)
    dense = evaluate(model, held_out)

    def drop(plan: Plan) -> float:
        handle = apply_(
            model,
            plan,
            prepared.statistic,
            sites=prepared.sites,
            factorizations=prepared.factorizations,
            joint_refit=settings.joint_refit,
        )
        try:
            measured = evaluate(model, held_out, against=None if dense.top1 is not None else reference)
        finally:
            handle.revert()
        if dense.top1 is not None and measured.top1 is not None:
            return dense.top1 - measured.top1
        if measured.agreement is not None:
            return 100.0 - measured.agreement
        if measured.cosine is not None:
            return 100.0 * (1 - measured.cosine)
        raise DataError("max_drop needs a model whose output can be compared")

    best: Plan | None = None
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        try:
            plan = plan_for(middle)
        except BudgetError:
            high = middle
            continue
        if drop(plan) <= settings.max_drop:
            best, low = plan, middle
        else:
            high = middle
    if best is None:
        raise BudgetError(
            f"got max_drop={settings.max_drop:g}, but saving as little as 1 % already loses more on the held-out pictures"
        )
    what = "top-1" if dense.top1 is not None else "agreement"
    notes.append(
        f"max_drop was measured as {what} on {dense.count} held-out pictures that neither calibration nor evaluation saw"
    )
    return replace(best, made_by={**best.made_by, "max_drop": settings.max_drop, "held_out": dense.count})


def _calibrated(
    model: nn.Module, calibration: Iterable, settings: CompressSettings, sites: Sites, progress: bool
) -> Statistics:
    """Calibrate some sites as the settings say."""
    return calibrate(
        model,
        calibration,
        statistic=settings.statistic,
        sites=sites,
        limit=settings.pictures,
        seed=settings.seed,
        progress=progress,
    )


def _apply_sequentially(
    model: nn.Module,
    plan: Plan,
    prepared: Prepared,
    calibration: Iterable | None,
    settings: CompressSettings,
    progress: bool,
) -> Handle:
    """Apply a plan block after block, each calibrated on the model whose earlier blocks are already small."""
    if settings.statistic == "weights" or calibration is None:
        raise SettingsError("sequential calibration needs a statistic of activations or of the loss, and pictures")
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in plan.sites.items():
        groups.setdefault(block_of(prepared.sites[name].path), {})[name] = entry
    handles: list[Handle] = []
    try:
        for entries in groups.values():
            # paths of later sites do not move while earlier blocks change, so the sites found at the start stay good
            sites = Sites({n: prepared.sites[n] for n in entries}, prepared.sites.refused)
            statistic = _calibrated(model, calibration, settings, sites, progress)
            handles.append(apply_(model, Plan(sites=entries), statistic, sites=sites, joint_refit=settings.joint_refit))
    except BaseException:
        for handle in reversed(handles):
            handle.revert()
        raise
    return Handle(model, plan, [h.revert for h in handles])  # type: ignore[list-item]


def block_of(path: str) -> str:
    """The block that a path belongs to: up to its last number, ``layers.0.blocks.1`` of ``layers.0.blocks.1.attn``."""
    match = re.match(r"(.*(?:^|\.)\d+)\.", path)
    return match.group(1) if match else path


def origin_or_none(model: nn.Module) -> dict[str, Any]:
    """Where a model comes from and how pictures are prepared for it, as far as it can be told."""
    from ..models import class_names_of, origin_of, preprocess_of

    try:
        origin = origin_of(model)
    except ModelError:
        return {}
    names = class_names_of(model)
    try:
        preprocess = preprocess_of(model).to_dict()
    except ModelError:
        preprocess = None
    return {"origin": origin.to_dict(), "preprocess": preprocess, "class_names": names}


def _kept(batches: Iterable) -> Iterable:
    """Batches that can be gone through more than once: an iterator that would be spent is read into a list."""
    return list(batches) if isinstance(batches, Iterator) else batches


def _first_picture(calibration: Iterable) -> Tensor:
    for batch in calibration:
        return pictures_of(batch)[:1]
    raise DataError("no pictures to calibrate on: got an empty iterable")

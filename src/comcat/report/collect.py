"""Gathers what the report shows from a model before and after."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..factors import Spectrum as Decomposed
from ..factors import weight_factors
from ..forms import parameters_of
from ..linalg import product_singular_values
from ..measure import Evaluation, Timing, count_macs, count_parameters, environment, peak_memory, ratio, size_on_disk
from ..methods.allocate import tail_loss
from ..methods.compress import Compressed
from ..plan import Plan
from ..record import Results
from ..sites import Attention, HiddenSite, Kind, LinearSite, ProductSite, Site, Sites
from . import units
from .data import ReportData, SiteRow, Spectrum
from .history import search_facts, search_series, tuning_facts, tuning_series

_STRUCTURE = ("parameters", "size_bytes", "macs")
"""Metrics that tuning does not change, and that need no pictures of one's own."""


def collect(
    before: nn.Module,
    after: nn.Module,
    done: Compressed,
    *,
    title: str,
    model: str,
    command: str | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluations: tuple[Evaluation | None, Evaluation | None] = (None, None),
    compressed: Evaluation | None = None,
    timings: Mapping[str, Timing] | None = None,
    compiled: Mapping[str, Timing] | None = None,
    notes: tuple[str, ...] = (),
) -> ReportData:
    """Everything the report shows, computed or taken from measurements already made.

    The search is told from the plan, tuning from the record of ``after``.

    Args:
        before, after: the model as it was and as it is; ``before`` must be a copy, since ``done`` was applied in place.
        evaluations: of ``before`` and ``after``; the second against the first, for agreement.
        compressed: where ``after`` was tuned, the evaluation on the same pictures of what it was before that; against
            ``before``, so that the rise of the loss can be told from what tuning won back.
        timings, compiled: with the keys ``"before"`` and ``"after"``.
    """
    plan, prepared = done.plan, done.prepared
    evaluated, tuning = evaluations[1], _tuning_of(after)
    measured = evaluated if tuning is None else compressed
    final = _metrics(after, prepared.example, evaluated, timings, compiled, "after")
    curves, facts = _history(plan, tuning)
    agreement: dict[str, float | None] = {}
    if evaluated is not None:
        agreement = {
            "agreement": evaluated.agreement,
            "cosine": evaluated.cosine,
            "divergence": evaluated.divergence,
            "count": evaluated.count,
        }
    return ReportData(
        title=title, model=model, created=datetime.now(UTC).isoformat(timespec="seconds"), command=command,
        settings={**(settings or {}), **_plan_settings(plan)}, environment=environment(),
        before=_metrics(before, prepared.example, evaluations[0], timings, compiled, "before"),
        between={} if tuning is None else _structure(final) | _accuracy(compressed),
        after=final, agreement=agreement, predicted_loss=plan.made_by.get("predicted_loss"),
        measured_loss=None if measured is None else measured.divergence,
        sites=site_rows(plan, prepared.sites, prepared.factorizations if prepared.statistic.name == "loss" else None),
        spectra=tuple(weight_spectra(before, prepared.sites)), curves=curves, facts=facts,
        notes=(*notes, *done.notes, *_speed_note(timings)),
    )  # fmt: skip


def collect_tuning(
    tuned: nn.Module,
    *,
    title: str,
    model: str,
    command: str | None = None,
    settings: Mapping[str, Any] | None = None,
    example: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> ReportData:
    """The report of a model that :func:`comcat.tune` returned, from its record alone: evaluations, curves, and where it
    came from.

    Args:
        model: what a person calls the student. example: one picture (1, channels, height, width), to count MACs and
            memory by.

    Raises:
        SettingsError: if the model was not tuned.
    """
    record, tuning = getattr(tuned, "comcat_record", None), _tuning_of(tuned)
    if record is None or tuning is None:
        raise SettingsError("the model has no record of a tuning run: give one that comcat.tune returned")
    costs = _metrics(tuned, example, None, None, None, "after")
    student = _structure(costs) | _accuracy(tuning.get("before"))
    original = _structure(record.results.before)
    curves, facts = _history(record.plan, tuning)
    return ReportData(
        title=title, model=model, created=datetime.now(UTC).isoformat(timespec="seconds"), command=command,
        settings={**(settings or {}), **_plan_settings(record.plan)}, environment=environment(),
        before=original or student, between=student if original else {}, after=costs | _accuracy(tuning.get("after")),
        agreement={}, predicted_loss=None, measured_loss=None, sites=(), spectra=(), curves=curves, facts=facts,
        notes=(*notes, *_compression_note(record.results)),
    )  # fmt: skip


def site_rows(plan: Plan, sites: Sites, factorizations: Mapping[str, Decomposed] | None = None) -> tuple[SiteRow, ...]:
    """What a plan makes of each site, and what was refused; with factorisations under the loss-aware statistic, its
    predicted loss.
    """
    rows, hidden = [], _told_by_others(plan, sites)
    for name, site in sites.items():
        if name in hidden:
            continue
        entry = plan.sites.get(name)
        rank = None if entry is None else entry.keep
        predicted = None
        if factorizations is not None:
            predicted = 0.0 if rank is None else float(tail_loss(factorizations[name])[rank])
        rows.append(
            SiteRow(
                name=name,
                kind=site.kind,
                rank=rank,
                full_rank=site.full,
                parameters_before=site.parameters(),
                parameters_after=round(parameters_of(site, entry)),
                predicted_loss=predicted,
                note="" if rank is not None else _why_dense(site),
            )
        )
    rows += [
        SiteRow(
            name=r.name,
            kind=_kind(r.name),
            rank=None,
            full_rank=0,
            parameters_before=0,
            parameters_after=0,
            predicted_loss=None,
            note=r.reason,
        )
        for r in sites.refused
    ]
    return tuple(rows)


def weight_spectra(model: nn.Module, sites: Sites) -> list[Spectrum]:
    """Singular values of every head's W_Q, W_K, W_V, W_O and of its products (the paper's Figures 1 and 2)."""
    spectra: list[Spectrum] = []
    for site in sites.values():
        if not isinstance(site, ProductSite):
            continue
        a = site.attention
        left, right = weight_factors(model, site, with_bias=False)
        assert left is not None and right is not None
        names = ("W_Q", "W_K", "QK") if site.kind == "qk" else ("W_V", "W_O", "VO")
        values = (torch.linalg.svdvals(left), torch.linalg.svdvals(right), product_singular_values(left, right))
        costs = (a.in_features + a.width, site.out_features + a.width, a.in_features + site.out_features)
        spectra += [s for n, v, c in zip(names, values, costs, strict=True) for s in _by_head(a, n, v, c)]
    return spectra


def _by_head(a: Attention, matrix: str, values: Tensor, cost: int) -> list[Spectrum]:
    return [
        Spectrum(layer=a.path, matrix=matrix, head=h, singular_values=tuple(v.tolist()), parameters_per_rank=cost)
        for h, v in enumerate(values)
    ]


def _why_dense(site: Site) -> str:
    if isinstance(site, LinearSite):
        return (
            f"stays dense: factors cost less only up to rank {site.break_even} of {site.full_rank}, and the budget "
            "did not ask for that"
        )
    return "stays as it is: the budget is better spent elsewhere"


def _kind(name: str) -> Kind:
    kind = name.rpartition(":")[2]
    return kind if kind in ("qk", "vo", "units") else "linear"


def _told_by_others(plan: Plan, sites: Sites) -> set[str]:
    """Sites without a row of their own: a feed-forward is told by its hidden units, or by its layers where these became
    small.
    """
    left = set()
    for name, site in sites.items():
        if isinstance(site, HiddenSite):
            ranked = any(path in plan.sites for path in site.modules)
            left |= {name} if ranked else set(site.modules)
    return left


def _metrics(
    model: nn.Module,
    example: Tensor | None,
    evaluated: Evaluation | None,
    timings: Mapping[str, Timing] | None,
    compiled: Mapping[str, Timing] | None,
    key: str,
) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {"parameters": count_parameters(model), "size_bytes": size_on_disk(model)}
    if example is not None:
        p = next(model.parameters())
        example = example.to(device=p.device, dtype=p.dtype)
        numbers["macs"] = count_macs(model, example)
        numbers["peak_memory_bytes"] = peak_memory(model, example)
    numbers |= _accuracy(evaluated)
    if timings is not None:
        numbers |= {"latency_s": timings[key].median_s, "throughput": timings[key].throughput}
    if compiled is not None:
        numbers["compiled_latency_s"] = compiled[key].median_s
    return numbers


def _structure(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: numbers[key] for key in _STRUCTURE if key in numbers}


def _accuracy(evaluated: Evaluation | Mapping[str, Any] | None) -> dict[str, float | None]:
    """What an evaluation says by itself; the cosine only where it is told without classes."""
    if evaluated is None:
        return {}
    if isinstance(evaluated, Evaluation):
        return {"top1": evaluated.top1, "top5": evaluated.top5, "loss": evaluated.loss}
    return {key: evaluated[key] for key in ("top1", "top5", "loss", "cosine") if key in evaluated}


def _plan_settings(plan: Plan) -> dict[str, Any]:
    """How the plan was made, without the curve of its search and the choices of its gates."""
    made_by = dict(plan.made_by)
    if "search" in made_by:
        made_by["search"] = made_by["search"]["settings"]
    if "gates" in made_by:
        made_by["gates"] = made_by["gates"]["start"]
    return {f"plan.{k}": v for k, v in made_by.items()}


def _tuning_of(model: nn.Module) -> Mapping[str, Any] | None:
    """The result of the tuning that a model carries with it, if it made a step."""
    record = getattr(model, "comcat_record", None)
    result = None if record is None else record.results.tuning
    return result if result and result["curve"] else None


def _history(
    plan: Plan, tuning: Mapping[str, Any] | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, str]]]:
    """Curves and facts of how the model came about."""
    curves, facts = {}, {}
    if "search" in plan.made_by:
        name = "Search of ranks"
        curves[name], facts[name] = search_series(plan.made_by["search"]), search_facts(plan.made_by)
    if tuning is not None:
        curves["Tuning"], facts["Tuning"] = tuning_series(tuning), tuning_facts(tuning)
    return curves, facts


def _compression_note(results: Results) -> tuple[str, ...]:
    """Accuracy around compression, which may have been measured on other pictures and so has no place in the table."""
    old, new = results.before.get("top1"), (results.untuned or results.after).get("top1")
    if old is None or new is None:
        return ()
    return (
        f"When the model was compressed, top-1 went from {units.percent(old)} to {units.percent(new)}, maybe on other "
        "pictures.",
    )


def _speed_note(timings: Mapping[str, Timing] | None) -> tuple[str, ...]:
    if timings is None:
        return ()
    median, low, high = ratio(timings, "before", "after")
    one = timings["before"]
    return (
        f"Speed-up {median:.2f}× (quartiles {low:.2f}–{high:.2f}), eager, batch {one.batch_size}, {one.repeats} "
        "interleaved rounds.",
    )

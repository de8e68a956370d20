"""Gathers what the report shows from a model before and after."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..factors import weight_factors
from ..linalg import product_singular_values
from ..measure import (
    Evaluation,
    Timing,
    count_macs,
    count_parameters,
    environment,
    peak_memory,
    ratio,
    size_on_disk,
    unsteady,
)
from ..methods.compress import Compressed
from ..models.stored import precision_of, source_bytes
from ..plan import Plan
from ..record import Results
from ..sites import Attention, ProductSite, Sites
from . import wording
from .data import ReportData, Spectrum
from .history import search_facts, search_series, tuning_facts, tuning_series
from .overlays import shown_pictures
from .rows import site_rows

_STRUCTURE = ("parameters", "size_bytes", "macs")
"""Metrics that tuning does not change, and that need no pictures of one's own."""


def collect(
    before: nn.Module,
    after: nn.Module,
    done: Compressed,
    *,
    model: str,
    title: str | None = None,
    command: str | None = None,
    settings: Mapping[str, Any] | None = None,
    judged_on: str | None = None,
    evaluations: tuple[Evaluation | None, Evaluation | None] = (None, None),
    compressed: Evaluation | None = None,
    timings: Mapping[str, Timing] | None = None,
    compiled: Mapping[str, Timing] | None = None,
    shown: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> ReportData:
    """Everything the report shows, computed or taken from measurements already made.

    The search is told from the plan, tuning from the record of ``after``.

    Args:
        before, after: the model as it was and as it is; ``before`` must be a copy, since ``done`` was applied in place.
        model: what a person calls it. title: of the page; by default the model's short name and what was done.
        judged_on: in words, the pictures that it was evaluated on.
        evaluations: of ``before`` and ``after``; the second against the first, for agreement.
        compressed: where ``after`` was tuned, the evaluation on the same pictures of what it was before that; against
            ``before``, so that the rise of the loss can be told from what tuning won back.
        timings, compiled: with the keys ``"before"`` and ``"after"``.
        shown: pictures (count, channels, height, width) on which the page shows the tokens that ran as one.
    """
    plan, prepared = done.plan, done.prepared
    evaluated, tuning = evaluations[1], _tuning_of(after)
    measured = evaluated if tuning is None else compressed
    final = _metrics(after, prepared.example, evaluated, timings, compiled, "after")
    curves, facts = _history(plan, tuning)
    speed = _speed(timings)
    disturbed = unsteady(speed["low"], speed["high"]) if speed else ""
    agreement: dict[str, float | None] = {}
    if evaluated is not None:
        agreement = {
            "agreement": evaluated.agreement,
            "cosine": evaluated.cosine,
            "divergence": evaluated.divergence,
            "count": evaluated.count,
        }
    return ReportData(
        title=title or f"{wording.short_name(model)}, compressed", model=model, created=_now(), command=command,
        settings={**(settings or {}), **_plan_settings(plan)}, environment=environment(),
        before=_metrics(before, prepared.example, evaluations[0], timings, compiled, "before"),
        between={} if tuning is None else _structure(final) | _accuracy(compressed),
        after=final, agreement=agreement, predicted_loss=plan.made_by.get("predicted_loss"),
        measured_loss=None if measured is None else measured.divergence,
        sites=site_rows(plan, prepared.whole, prepared), spectra=tuple(weight_spectra(before, prepared.whole)),
        curves=curves, facts=facts, judged_on=judged_on, speed=speed,
        pictures=() if shown is None else shown_pictures(before, after, shown),
        notes=(*notes, *done.notes, *([disturbed] if disturbed else ())),
    )  # fmt: skip


def collect_tuning(
    tuned: nn.Module,
    *,
    model: str,
    title: str | None = None,
    command: str | None = None,
    settings: Mapping[str, Any] | None = None,
    judged_on: str | None = None,
    example: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> ReportData:
    """The report of a model that :func:`comcat.tune` returned, from its record alone: evaluations, curves, its origin.

    Args:
        model: what a person calls the student. title: of the page. judged_on: in words, the pictures of the
            evaluations. example: one picture (1, channels, height, width), to count MACs and memory by.

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
        title=title or f"{wording.short_name(model)}, tuned", model=model, created=_now(), command=command,
        settings={**(settings or {}), **_plan_settings(record.plan)}, environment=environment(),
        before=original or student, between=student if original else {}, after=costs | _accuracy(tuning.get("after")),
        agreement={}, predicted_loss=None, measured_loss=None, sites=(), spectra=(), curves=curves, facts=facts,
        judged_on=judged_on, notes=(*notes, *_compression_note(record.results)),
    )  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
        costs = (a.in_features + site.full, site.out_features + site.full, a.in_features + site.out_features)
        spectra += [s for n, v, c in zip(names, values, costs, strict=True) for s in _by_head(a, n, v, c)]
    return spectra


def _by_head(a: Attention, matrix: str, values: Tensor, cost: int) -> list[Spectrum]:
    return [
        Spectrum(layer=a.path, matrix=matrix, head=h, singular_values=tuple(v.tolist()), parameters_per_rank=cost)
        for h, v in enumerate(values)
    ]


def _metrics(
    model: nn.Module,
    example: Tensor | None,
    evaluated: Evaluation | None,
    timings: Mapping[str, Timing] | None,
    compiled: Mapping[str, Timing] | None,
    key: str,
) -> dict[str, float | None]:
    size = source_bytes(model) if key == "before" else None  # the file itself, where there is one
    size = size_on_disk(model, dtype=precision_of(model)) if size is None else size
    numbers: dict[str, float | None] = {"parameters": count_parameters(model), "size_bytes": size}
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
        f"When the model was compressed, top-1 went from {wording.percent(old)} to {wording.percent(new)}, "
        "maybe on other pictures.",
    )


def _speed(timings: Mapping[str, Timing] | None) -> dict[str, float]:
    """How many times as fast: median and quartiles of the rounds' paired ratios."""
    if timings is None:
        return {}
    median, low, high = ratio(timings, "before", "after")
    one = timings["before"]
    return {"median": median, "low": low, "high": high, "batch_size": one.batch_size, "rounds": one.repeats}

"""Gathers what the report shows from a model before and after."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import weight_factors
from ..linalg import product_singular_values
from ..measure import Evaluation, Timing, count_macs, count_parameters, environment, peak_memory, ratio, size_on_disk
from ..methods.allocate import tail_loss
from ..methods.compress import Compressed
from ..plan import planned_parameters
from ..sites import Attention, Kind, Site, Sites
from .data import ReportData, SiteRow, Spectrum


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
    timings: Mapping[str, Timing] | None = None,
    compiled: Mapping[str, Timing] | None = None,
    notes: tuple[str, ...] = (),
) -> ReportData:
    """Everything the report shows, computed or taken from measurements already made.

    Args:
        before, after: the model as it was and as it is; ``before`` must be a copy, since ``done`` was applied in place.
        evaluations: of ``before`` and ``after``; the second against the first, for agreement. timings, compiled: with the keys
            ``"before"`` and ``"after"``.
    """
    plan, prepared = done.plan, done.prepared
    evaluated = evaluations[1]
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
        settings={**(settings or {}), **{f"plan.{k}": v for k, v in plan.made_by.items()}}, environment=environment(),
        before=_metrics(before, prepared.example, evaluations[0], timings, compiled, "before"),
        after=_metrics(after, prepared.example, evaluations[1], timings, compiled, "after"),
        agreement=agreement, predicted_loss=plan.made_by.get("predicted_loss"), measured_loss=None if evaluated is None else evaluated.divergence,
        sites=_rows(done), spectra=tuple(weight_spectra(before, prepared.sites)),
        notes=(*notes, *done.notes, *_speed_note(timings)),
    )  # fmt: skip


def weight_spectra(model: nn.Module, sites: Sites) -> list[Spectrum]:
    """Singular values of every head's W_Q, W_K, W_V, W_O and of its products (the paper's Figures 1 and 2)."""
    spectra: list[Spectrum] = []
    for site in sites.values():
        a = site.attention
        if a is None:
            continue
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


def _rows(done: Compressed) -> tuple[SiteRow, ...]:
    plan, prepared = done.plan, done.prepared
    loss_aware = prepared.statistic.name == "loss"
    rows = []
    for name, site in prepared.sites.items():
        entry = plan.sites.get(name)
        rank = None if entry is None else entry.rank
        predicted = None
        if loss_aware:
            predicted = 0.0 if rank is None else float(tail_loss(prepared.factorizations[name].singular_values)[rank])
        rows.append(
            SiteRow(
                name=name,
                kind=site.kind,
                rank=rank,
                full_rank=site.full_rank,
                parameters_before=site.parameters(),
                parameters_after=planned_parameters(site, entry),
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
        for r in prepared.sites.refused
    ]
    return tuple(rows)


def _why_dense(site: Site) -> str:
    if site.kind == "linear":
        return f"stays dense: factors cost less only up to rank {site.break_even} of {site.full_rank}, and the budget did not ask for that"
    return "stays as it is: the budget is better spent elsewhere"


def _kind(name: str) -> Kind:
    return "qk" if name.endswith(":qk") else "vo" if name.endswith(":vo") else "linear"


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
    if evaluated is not None:
        numbers |= {"top1": evaluated.top1, "top5": evaluated.top5, "loss": evaluated.loss}
    if timings is not None:
        numbers |= {"latency_s": timings[key].median_s, "throughput": timings[key].throughput}
    if compiled is not None:
        numbers["compiled_latency_s"] = compiled[key].median_s
    return numbers


def _speed_note(timings: Mapping[str, Timing] | None) -> tuple[str, ...]:
    if timings is None:
        return ()
    median, low, high = ratio(timings, "before", "after")
    one = timings["before"]
    return (
        f"Speed-up {median:.2f}× (quartiles {low:.2f}–{high:.2f}), eager, batch {one.batch_size}, {one.repeats} interleaved rounds.",
    )

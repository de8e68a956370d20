"""The page itself: what it says about the data, and the file it goes to."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from comcat.errors import ComcatError
from comcat.files import write_text
from comcat.report import units
from comcat.report.data import ReportData, SiteRow
from comcat.report.figures import (
    figure_curves,
    figure_parameters_for_energy,
    figure_ranks,
    figure_spectra,
    parameters_for_energy,
    rank_panels,
)
from comcat.report.svg import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NARROW = 3.8  # inches: a figure for a phone, drawn so that its text keeps its size there


def render(data: ReportData) -> str:
    """The report as one HTML page that loads nothing and runs no script.

    Raises ComcatError if Jinja2 is missing, or matplotlib where there is something to draw.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ComcatError("a report needs Jinja2; install it with: pip install 'comcat[report]'") from error
    source = files("comcat.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        data=data,
        created=_readable_time(data.created),
        tiles=_tiles(data),
        metrics=_metrics(data),
        agreement=_agreement(data.agreement),
        losses=_losses(data),
        columns=_columns(data),
        figures=_figures(data),
        sections=_sections(data),
        sites=_sites(data.sites),
        dense=_dense(data.sites),
        settings=_flat(data.settings),
        environment=_flat(data.environment),
    )


def write(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Writes the page to ``path``, folders included: whole, or not at all.

    Raises what ``render`` raises, and StoreError if the file cannot be written.
    """
    write_text(path, render(data))


def _tiles(data: ReportData) -> list[dict[str, str]]:
    """The headline numbers."""
    tiles = []
    for key in ("parameters", "macs"):
        how, old, new = units.METRICS[key], data.before.get(key), data.after.get(key)
        if (text := units.change(old, new, how)) and old != new:
            detail = f"{units.cell(old, how)} → {units.cell(new, how)}"
            tiles.append({"label": how.label, "value": text, "detail": detail})
    for key in ("throughput", "latency_s", "compiled_latency_s"):
        how, old, new = units.METRICS[key], units.number(data.before.get(key)), units.number(data.after.get(key))
        if old and new:
            factor = new / old if key == "throughput" else old / new
            detail = f"{how.label.lower()} {units.cell(old, how)} → {units.cell(new, how)}"
            tiles.append({"label": "Speed-up", "value": f"{factor:.2f}×", "detail": detail})
            break
    how, new = units.METRICS["top1"], units.number(data.after.get("top1"))
    old = units.number(_earlier(data, "top1"))
    if old is not None and new is not None:
        value = f"{old:.2f} → {units.cell(new, how)}"
        tiles.append({"label": how.label, "value": value, "detail": units.change(old, new, how)})
    elif new is not None:
        tiles.append({"label": how.label, "value": units.cell(new, how), "detail": "after compression"})
    how, same = units.AGREEMENT["agreement"], units.number(data.agreement.get("agreement"))
    if same is not None:
        count = units.number(data.agreement.get("count"))
        images = f", {units.plain(count)} images" if count else ""
        detail = f"same top-1 as the original{images}"
        tiles.append({"label": "Agreement", "value": units.cell(same, how), "detail": detail})
    return tiles


def _columns(data: ReportData) -> list[str]:
    """The headings of the table of numbers."""
    return ["Before", "Compressed", "Tuned"] if data.between else ["Before", "After"]


def _earlier(data: ReportData, key: str) -> float | None:
    """What a metric was before everything, or before tuning where nobody knows more."""
    first = data.before.get(key)
    return data.between.get(key) if first is None else first


def _metrics(data: ReportData) -> list[dict[str, Any]]:
    """The rows of the table of numbers: the known ones first, in their order."""
    states = [data.before, data.between, data.after] if data.between else [data.before, data.after]
    given = {key: None for state in states for key in state}
    keys = [key for key in units.METRICS if key in given] + [key for key in given if key not in units.METRICS]
    rows = []
    for key in keys:
        how, old, new = units.metric(key), _earlier(data, key), data.after.get(key)
        row = {
            "label": how.label,
            "cells": [units.cell(state.get(key), how) for state in states],
            "change": units.change(old, new, how),
            "ratio": units.ratio(old, new, how),
        }
        if any(row["cells"]):
            rows.append(row)
    return rows


def _agreement(agreement: Mapping[str, Any]) -> list[tuple[str, str]]:
    hows = {key: units.AGREEMENT.get(key) or units.metric(key) for key in [*units.AGREEMENT, *agreement]}
    shown = ((how.label, units.cell(agreement.get(key), how)) for key, how in hows.items())
    return [(label, text) for label, text in shown if text]


def _losses(data: ReportData) -> dict[str, Any] | None:
    """Predicted and measured rise of the loss as bars of at most 100 %."""
    given = {"Predicted": data.predicted_loss, "Measured": data.measured_loss}
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return None
    finite = {name: units.number(value) or 0.0 for name, value in values.items()}
    largest = max(finite.values())
    plain = units.Metric(label="")
    rows = [
        {
            "name": name,
            "text": units.cell(value, plain),
            "width": round(100 * max(finite[name], 0) / largest, 1) if largest > 0 else 0,
        }
        for name, value in values.items()
    ]
    ratio = ""
    if len(finite) == 2 and min(finite.values()) > 0:
        ratio = f"The measured rise is {finite['Measured'] / finite['Predicted']:.2f} times the predicted one."
    return {"rows": rows, "ratio": ratio}


def _figures(data: ReportData) -> dict[str, Any]:
    """Every figure in a wide and a narrow form, with its caption."""
    figures: dict[str, Any] = {}
    two, one = {"columns": 2}, {"columns": 1, "width": _NARROW}
    if data.sites:
        caption = _ranks_caption(data.sites)
        figures["ranks"] = _picture("ranks", "Bar charts", caption, partial(figure_ranks, data.sites), two, one)
    spectra = [spectrum for spectrum in data.spectra if any(spectrum.singular_values)]
    if spectra:
        caption = (
            "Singular values summed from the largest on, as a share of their sum. A row is one head of one layer. "
            "The sooner a row turns yellow, the fewer ranks hold what matters; the black marks stand at 90\u00a0%."
        )
        draw = partial(figure_spectra, spectra)
        figures["spectra"] = _picture("spectra", "Heatmaps", caption, draw, {"columns": 3}, two | {"width": _NARROW})
    if counts := parameters_for_energy(spectra, 0.9):
        caption = "Parameters needed to hold 90\u00a0% of the sum of the singular values, by layer." + _saving(counts)
        draw = partial(figure_parameters_for_energy, spectra)
        figures["energy"] = _picture("energy", "Line charts", caption, draw, two, one)
    return figures


def _sections(data: ReportData) -> list[dict[str, Any]]:
    """Curves and facts by name: a figure, a table, or both."""
    sections = []
    for position, name in enumerate(dict.fromkeys([*data.curves, *data.facts])):
        series, facts = data.curves.get(name), data.facts.get(name)
        panels = len({entry.get("y_label") for entry in series or ()})
        picture = None
        if series:
            wide = {"columns": 3, "width": 9.6} if panels > 1 else {}
            draw, kind = partial(figure_curves, series), "Line charts" if panels > 1 else "Line chart"
            picture = _picture(f"curve{position}", kind, name, draw, wide, {"columns": 1, "width": _NARROW})
        if picture or facts:
            sections.append(
                {"name": name, "picture": picture, "small": panels < 2, "facts": list((facts or {}).items())}
            )
    return sections


def _picture(
    name: str, kind: str, caption: str, draw: Callable[..., "Figure"], wide: dict[str, Any], narrow: dict[str, Any]
) -> dict[str, Any]:
    """A figure in two forms, one of which the page shows, with its caption; kind and caption describe it in words."""
    from markupsafe import Markup  # comes with Jinja2

    label = f"{kind}: {caption}"
    forms = {"wide": wide, "narrow": narrow}
    svgs = {form: to_svg(draw(**size), prefix=f"{name}-{form}", label=label) for form, size in forms.items()}
    # matplotlib has escaped the text inside, to_svg the label.
    return {"caption": caption} | {form: Markup(svg) for form, svg in svgs.items()}


def _ranks_caption(sites: Sequence[SiteRow]) -> str:
    kept = []
    for title, rows in rank_panels(sites).items():
        shrunk = [row for row in rows if row.rank is not None]
        full = sum(row.full_rank for row in shrunk)
        if full:
            kept.append(f"{title or 'other layers'} {100 * sum(row.rank or 0 for row in shrunk) / full:.0f}\u00a0%")
    shares = f" Share of the full rank kept at the sites that shrank: {', '.join(kept)}." if kept else ""
    return "The rank kept at each site; the outline is the full rank." + shares


def _saving(counts: Mapping[str, Mapping[str, float]]) -> str:
    """How the products compare with their matrices over all layers that have both."""
    said = []
    for product, pair in (("QK", "W_Q+W_K"), ("VO", "W_V+W_O")):
        both = counts.get(product, {}).keys() & counts.get(pair, {}).keys()
        joint, apart = (sum(counts[name][layer] for layer in both) for name in (product, pair)) if both else (0, 0)
        if joint and apart:
            change = units.share(apart, joint)
            said.append(f" {product} needs {units.scaled(joint)}, its matrices apart {units.scaled(apart)} ({change}).")
    return "".join(said)


def _sites(sites: Sequence[SiteRow]) -> dict[str, Any]:
    """The table of all sites; columns nobody filled are left out."""
    loss = units.Metric(label="")
    rows = [
        {
            "name": site.name,
            "kind": site.kind.upper() if site.kind != "linear" else "linear",
            "rank": "dense" if site.rank is None else units.plain(float(site.rank)),
            "full_rank": units.plain(float(site.full_rank)),
            "before": units.plain(float(site.parameters_before)),
            "after": units.plain(float(site.parameters_after)),
            "change": units.share(site.parameters_before, site.parameters_after),
            "loss": units.cell(site.predicted_loss, loss),
            "note": site.note,
        }
        for site in sites
    ]
    before, after = (sum(getattr(site, f"parameters_{when}") for site in sites) for when in ("before", "after"))
    return {
        "rows": rows,
        "has_loss": any(row["loss"] for row in rows),
        "has_note": any(row["note"] for row in rows),
        "before": units.plain(float(before)),
        "after": units.plain(float(after)),
        "change": units.share(before, after),
    }


def _dense(sites: Sequence[SiteRow]) -> list[dict[str, Any]]:
    """Sites that stayed dense, by reason."""
    reasons: dict[str, list[str]] = {}
    for site in sites:
        if site.rank is None:
            reasons.setdefault(site.note or "the plan leaves them as they are", []).append(site.name)
    return [{"reason": reason, "names": names} for reason, names in reasons.items()]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of a dotted name and a text."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name}.")
        else:
            rows.append((name, _setting(value)))
    return rows


def _setting(value: Any) -> str:
    """One setting as text, exact to the last digit."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and units.number(value) is None:
        return "not finite"
    if isinstance(value, list | tuple | Mapping):
        if not value:
            return "empty"
        if all(isinstance(item, str | int | float | type(None)) for item in value) and not isinstance(value, Mapping):
            return ", ".join(_setting(item) for item in value)
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _readable_time(created: str) -> str:
    """``2026-11-03T14:20:11+00:00`` as ``2026-11-03 14:20 UTC``; anything else as it stands."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = " UTC" if moment.utcoffset() == timedelta(0) else ""
    return (moment.replace(tzinfo=None) if zone else moment).isoformat(sep=" ", timespec="minutes") + zone

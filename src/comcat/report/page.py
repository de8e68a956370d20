"""The page itself: what it says about the data, and the file it goes to."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from comcat.errors import ComcatError
from comcat.files import write_text
from comcat.report import tables, wording
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

_TINY = 0.01  # nats
_NARROW = 3.8  # inches: a figure for a phone, drawn so that its text keeps its size there


def render(data: ReportData) -> str:
    """The report as one HTML page that loads nothing and runs no script.

    Without matplotlib it has its tables alone, and says so. Raises ComcatError if Jinja2 is missing.
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
        undrawn=not _can_draw() and bool(data.sites or data.spectra or data.curves),
        shown=_shown(data),
        blocks=tables.blocks(data.sites),
        sites=tables.site_table(data.sites),
        stayed=tables.stayed(data.sites),
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
        how, old, new = wording.METRICS[key], data.before.get(key), data.after.get(key)
        if (text := wording.change(old, new, how)) and old != new:
            detail = f"{wording.cell(old, how)} → {wording.cell(new, how)}"
            tiles.append({"label": how.label, "value": text, "detail": detail})
    tiles += _speed_tile(data)
    on = f" on {data.judged_on}" if data.judged_on else ""
    how, new = wording.METRICS["top1"], wording.number(data.after.get("top1"))
    old = wording.number(_earlier(data, "top1"))
    if old is not None and new is not None:
        value = f"{old:.2f} → {wording.cell(new, how)}"
        tiles.append({"label": how.label, "value": value, "detail": f"{wording.change(old, new, how)}{on}"})
    elif new is not None:
        tiles.append({"label": how.label, "value": wording.cell(new, how), "detail": f"after compression{on}"})
    how, same = wording.AGREEMENT["agreement"], wording.number(data.agreement.get("agreement"))
    if same is not None:
        count = wording.number(data.agreement.get("count"))
        images = f", {wording.counted(count, 'image')}" if count else ""
        pixels = ", pixel by pixel" if any(seen.maps for seen in data.pictures) else ""
        detail = f"same prediction as the original{pixels}{images}"
        tiles.append({"label": "Agreement", "value": wording.cell(same, how), "detail": detail})
    return tiles


def _speed_tile(data: ReportData) -> list[dict[str, str]]:
    """How many times as fast: the median over rounds, in each of which both were timed; else the ratio of medians."""
    if median := wording.number(data.speed.get("median")):
        low, high = (f"{data.speed[end]:.2f}" for end in ("low", "high"))
        batch, rounds = (float(data.speed[key]) for key in ("batch_size", "rounds"))
        detail = f"quartiles {low}–{high}, batch {wording.plain(batch)}, {wording.counted(rounds, 'round')}"
        return [{"label": "Speed-up", "value": f"{median:.2f}×", "detail": detail}]
    for key in ("throughput", "latency_s", "compiled_latency_s"):
        how, old, new = wording.METRICS[key], wording.number(data.before.get(key)), wording.number(data.after.get(key))
        if old and new:
            factor = new / old if key == "throughput" else old / new
            detail = f"{how.label.lower()} {wording.cell(old, how)} → {wording.cell(new, how)}"
            return [{"label": "Speed-up", "value": f"{factor:.2f}×", "detail": detail}]
    return []


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
    keys = [key for key in wording.METRICS if key in given] + [key for key in given if key not in wording.METRICS]
    rows = []
    for key in keys:
        how, old, new = wording.metric(key), _earlier(data, key), data.after.get(key)
        row = {
            "label": how.label,
            "cells": [wording.cell(state.get(key), how) for state in states],
            "change": wording.change(old, new, how),
            "ratio": wording.ratio(old, new, how),
        }
        if key in ("latency_s", "throughput") and data.speed:  # one figure of speed, one definition: that of the tile
            row |= {"change": "", "ratio": wording.times(data.speed["median"], ("slower", "faster"))}
        if any(row["cells"]):
            rows.append(row)
    return rows


def _agreement(agreement: Mapping[str, Any]) -> list[tuple[str, str]]:
    hows = {key: wording.AGREEMENT.get(key) or wording.metric(key) for key in [*wording.AGREEMENT, *agreement]}
    shown = ((how.label, wording.cell(agreement.get(key), how)) for key, how in hows.items())
    return [(label, text) for label, text in shown if text]


def _losses(data: ReportData) -> dict[str, Any] | None:
    """Predicted and measured rise of the loss as bars of at most 100 %."""
    given = {"Predicted": data.predicted_loss, "Measured": data.measured_loss}
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return None
    finite = {name: wording.number(value) or 0.0 for name, value in values.items()}
    largest = max(finite.values())
    plain = wording.Metric(label="")
    rows = [
        {
            "name": name,
            "text": wording.cell(value, plain),
            "width": round(100 * max(finite[name], 0) / largest, 1) if largest > 0 else 0,
        }
        for name, value in values.items()
    ]
    return {"rows": rows, "said": _compared(finite)}


def _compared(rises: Mapping[str, float]) -> str:
    """Predicted and measured rise of the loss against each other; of tiny ones a ratio says nothing."""
    if len(rises) < 2 or min(rises.values()) <= 0:
        return ""
    if max(rises.values()) < _TINY:
        return f"Both are tiny: {_TINY:g} nats make the original's own answer one per cent less likely."
    return f"The measured rise is {rises['Measured'] / rises['Predicted']:.2f} times the predicted one."


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _figures(data: ReportData) -> dict[str, Any]:
    """Every figure in a wide and a narrow form, with its caption."""
    figures: dict[str, Any] = {}
    if not _can_draw():
        return figures
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


def _shown(data: ReportData) -> dict[str, Any]:
    """What is said of the pictures of tokens."""
    blocks = [block for seen in data.pictures for block in seen.blocks]
    return wording.shown({site.form for site in data.sites}, blocks, any(seen.maps for seen in data.pictures))


def _sections(data: ReportData) -> list[dict[str, Any]]:
    """Curves and facts by name: a figure, a table, or both."""
    sections = []
    for position, name in enumerate(dict.fromkeys([*data.curves, *data.facts])):
        series, facts = data.curves.get(name), data.facts.get(name)
        panels = len({entry.get("y_label") for entry in series or ()})
        picture = None
        if series and _can_draw():
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
        shrunk = [row for row in rows if row.form is not None]
        full = sum(row.full for row in shrunk)
        if full:
            name = title.lower() if title in ("Hidden units", "Tokens") else title or "other layers"
            kept.append(f"{name} {100 * sum(row.keep or 0 for row in shrunk) / full:.0f}\u00a0%")
    shares = f" Share kept at the sites that shrank: {', '.join(kept)}." if kept else ""
    return f"{_what_is_kept(sites)} at each site; the outline is all that there was." + shares


def _what_is_kept(sites: Sequence[SiteRow]) -> str:
    """Ranks, hidden units and tokens, as far as a figure of these sites shows them."""
    kinds = {site.kind if site.kind in ("units", "tokens") else "ranks" for site in sites if site.full}
    if kinds <= {"ranks"}:
        return "The rank kept"
    said = [
        word for kind, word in (("ranks", "ranks"), ("units", "hidden units"), ("tokens", "tokens")) if kind in kinds
    ]
    text = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"{text[:1].upper()}{text[1:]} kept"


def _saving(counts: Mapping[str, Mapping[str, float]]) -> str:
    """How the products compare with their matrices over all layers that have both."""
    said = []
    for product, pair in (("QK", "W_Q+W_K"), ("VO", "W_V+W_O")):
        both = counts.get(product, {}).keys() & counts.get(pair, {}).keys()
        joint, apart = (sum(counts[name][layer] for layer in both) for name in (product, pair)) if both else (0, 0)
        if joint and apart:
            change = wording.share(apart, joint)
            said.append(
                f" {product} needs {wording.scaled(joint)}, its matrices apart {wording.scaled(apart)} ({change})."
            )
    return "".join(said)


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
    if isinstance(value, float) and wording.number(value) is None:
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

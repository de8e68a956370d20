"""The figures of the report, each a ``matplotlib.figure.Figure`` that any script can save; pyplot is never imported.

They follow COMCAT (Xiao et al., ICML 2023): its Figure 1 (spectra), Figure 2 (parameters for a share of the singular
values) and Figures 8 and 9 (ranks, here with hidden units); Figures 6 and 7 are curves (:mod:`comcat.report.history`).
Sizes are in inches. All raise ComcatError without matplotlib and SettingsError if there is nothing to draw.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING, Any

from comcat.errors import SettingsError
from comcat.report.data import SiteRow, Spectrum, rank_for_energy
from comcat.report.svg import GREY, LIGHT, drawing
from comcat.report.wording import in_order, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
_COLORS, _DASHES = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY), ("-", "--", ":")
_TITLES = {"QK": "QK = W_Q W_Kᵀ", "VO": "VO = W_V W_O"}
_FAMILIES = {"QK": ("W_Q", "W_K"), "VO": ("W_V", "W_O")}
_TICKS = 16  # names along an axis, at most
_COLUMNS = 64  # steps in which a heatmap draws the share of the rank


def figure_spectra(spectra: Sequence[Spectrum], *, columns: int = 3, width: float = 9.6) -> "Figure":
    """COMCAT's Figure 1: heatmaps of the cumulative singular values, a panel a matrix or product.

    A row is one head of one layer, a column a share of the rank, the colour the share of the sum of the singular
    values that so many hold. A black mark stands where the share reaches 90 %.
    """
    order = ("W_Q", "W_K", "QK", "W_V", "W_O", "VO") if columns == 3 else ("W_Q", "W_K", "W_V", "W_O", "QK", "VO")
    places = {layer: place for place, layer in enumerate(dict.fromkeys(s.layer for s in spectra))}
    rows = [s for s in spectra if any(s.singular_values)]
    rows.sort(key=lambda s: (places[s.layer], -1 if s.head is None else s.head))
    panels = {name: panel for name in order if (panel := [s for s in rows if s.matrix == name])}
    _expect(panels, "spectra")
    tallest = max(len(rows) for rows in panels.values())
    layers = max(len({row.layer for row in rows}) for rows in panels.values())
    height = 0.7 + min(max(1.2, 0.15 * min(layers, _TICKS), 0.0135 * tallest), 6.0)
    with drawing():
        figure, axes = _grid(len(panels), columns, width, height, extra=0.7)
        for axis, (name, rows) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(
                [_cumulative(row.singular_values) for row in rows],
                extent=(0, 100, len(rows), 0),
                aspect="auto",
                interpolation="none",
                cmap="viridis",
                vmin=0,
                vmax=1,
            )
            ninety = [100 * rank_for_energy(row.singular_values, 0.9) / len(row.singular_values) for row in rows]
            # One line with gaps: a path for every row would triple the size of the page.
            edges = [edge for row in range(len(rows)) for edge in (row, row + 1, float("nan"))]
            axis.plot([x for share in ninety for x in (share,) * 3], edges, color="black", lw=1, solid_capstyle="butt")
            axis.set_title(_TITLES.get(name, name))
            axis.set_xticks([0, 25, 50, 75, 100], ["0", "", "50", "", "100 %"])
            _label_layers(axis, [row.layer for row in rows])
        figure.supxlabel("share of the rank", fontsize=9)
        figure.supylabel("layer, and within it the heads", fontsize=9)
        bar = figure.colorbar(image, ax=axes, location="top", aspect=50, shrink=0.7, pad=0.02)
        bar.set_label("share of the sum (black: 90 %)")
        bar.set_ticks([0, 0.25, 0.5, 0.75, 0.9, 1], labels=["0", "25 %", "50 %", "", "90 %", ""])
        bar.ax.axvline(0.9, color="black", lw=0.8)
    return figure


def figure_parameters_for_energy(
    spectra: Sequence[Spectrum], energy: float = 0.9, *, columns: int = 2, width: float = 9.6
) -> "Figure":
    """COMCAT's Figure 2: parameters that hold the share ``energy`` of the singular values, by layer.

    One panel compares W_Q + W_K with QK, the other W_V + W_O with VO, each summed over the heads of a layer.
    """
    counts = parameters_for_energy(spectra, energy)
    panels = {product: pair for product, pair in _FAMILIES.items() if counts.get(product) or counts.get("+".join(pair))}
    _expect(panels, "spectra")
    with drawing():
        figure, axes = _grid(len(panels), columns, width, 2.5, extra=0.35)
        for axis, (product, pair) in zip(axes, panels.items(), strict=True):
            apart, joint = counts.get("+".join(pair), {}), counts.get(product, {})
            layers = [layer for layer in dict.fromkeys(s.layer for s in spectra) if layer in apart or layer in joint]
            for name, values, color, marker, dashes in (
                (f"{pair[0]} and {pair[1]} apart", apart, _VERMILLION, "s", "--"),
                (f"the product {product}", joint, _BLUE, "o", "-"),
            ):
                if values:
                    heights = [values.get(layer, float("nan")) for layer in layers]
                    axis.plot(range(len(layers)), heights, label=name, color=color, marker=marker, ls=dashes)
            axis.set_title(" against ".join([", ".join(pair)] * bool(apart) + [product] * bool(joint)))
            axis.set_ylim(0, 1.08 * max(*apart.values(), *joint.values(), 1))
            axis.yaxis.set_major_formatter(lambda value, _: scaled(value))
            axis.grid(axis="y")
            _thin_ticks(axis, _short(layers))
            axis.set_xlabel("layer")
            axis.legend(loc="best")
        figure.supylabel(f"parameters for {energy * 100:.4g} %", fontsize=9)
    return figure


def parameters_for_energy(spectra: Iterable[Spectrum], energy: float) -> dict[str, dict[str, float]]:
    """Parameters that hold the share ``energy`` of the singular values, summed over heads: name → layer → count.

    The names are ``"W_Q+W_K"``, ``"W_V+W_O"`` (only layers that have both matrices), ``"QK"`` and ``"VO"``.
    """
    single: dict[str, dict[str, float]] = {}
    for spectrum in spectra:
        cost = rank_for_energy(spectrum.singular_values, energy) * spectrum.parameters_per_rank
        layers = single.setdefault(spectrum.matrix, {})
        layers[spectrum.layer] = layers.get(spectrum.layer, 0) + cost
    counts = {}
    for product, (left, right) in _FAMILIES.items():
        if product in single:
            counts[product] = single[product]
        first, second = single.get(left, {}), single.get(right, {})
        if both := {layer: cost + second[layer] for layer, cost in first.items() if layer in second}:
            counts[f"{left}+{right}"] = both
    return counts


def figure_ranks(sites: Sequence[SiteRow], *, columns: int = 2, width: float = 9.6) -> "Figure":
    """COMCAT's Figures 8 and 9, with hidden units: what every site keeps as a bar, all that it had as the outline.

    Sites that differ by a layer number alone share a panel; linear layers that have no like share the last one.
    """
    panels = rank_panels(sites)
    _expect(panels, "sites")
    alone = panels.pop("", [])
    slots = len(panels) + bool(alone)
    with drawing():
        figure, axes = _grid(slots, columns, width, max(1.8, 0.6 + 0.3 * len(alone)), extra=0.4)
        for position, (axis, (title, rows)) in enumerate(zip(axes, panels.items(), strict=False)):
            places, names = _along_the_blocks(rows, sites)
            _bars(axis.bar, rows, 0.8, places)
            axis.set_title(_text(title))
            axis.grid(axis="y")
            axis.set_xlim(-0.6, len(names) - 0.4)
            _thin_ticks(axis, _short(names))
            axis.set_xlabel("layer" if position + columns >= len(panels) else "")
            axis.set_ylabel(rows[0].kind if rows[0].kind in ("units", "tokens") else "rank")
        if alone:
            axis = axes[-1]
            _bars(axis.barh, alone, 0.35, range(len(alone)))
            for place, row in enumerate(alone):  # inside: long names would squeeze every panel
                axis.text(0, place - 0.22, " " + _text(row.name), va="bottom", fontsize=8)
            axis.set_title("Other layers")
            axis.grid(axis="x")
            axis.set_yticks([])
            axis.set_ylim(len(alone) - 0.7, -0.8)
            axis.set_xlabel("rank")
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def rank_panels(sites: Iterable[SiteRow]) -> dict[str, list[SiteRow]]:
    """Sites by the panel that shows them; the title ``""`` is for linear layers that have no like."""
    patterns: dict[str, list[SiteRow]] = {}
    for site in (site for site in sites if site.full):  # what was refused has nothing to draw
        patterns.setdefault(_numbers_out(site.name), []).append(site)
    alone = [rows[0] for rows in patterns.values() if len(rows) == 1 and rows[0].kind == "linear"]
    groups = {name: rows for name, rows in patterns.items() if len(rows) > 1 or rows[0].kind != "linear"}
    titles = {name: _panel_title(name, rows[0].kind) for name, rows in groups.items()}
    order = {"qk": 0, "vo": 1, "linear": 2, "units": 3, "tokens": 4}
    panels = {}
    for name, rows in sorted(groups.items(), key=lambda group: order[group[1][0].kind]):
        twins = [other.split(".") for other in groups if titles[other] == titles[name]]
        shared = set(twins[0]).intersection(*twins)
        differing = ".".join(part for part in name.split(".") if part not in shared)
        title = f"{titles[name]}, {differing}" if len(twins) > 1 else titles[name]
        panels[name if title in panels else title] = rows
    return panels | ({"": alone} if alone else {})


def _numbers_out(path: str) -> str:
    """``blocks.3.attn`` → ``blocks.*.attn``."""
    return re.sub(r"(^|\.)\d+(?=[.:]|$)", r"\1*", path)


def _panel_title(pattern: str, kind: str) -> str:
    """``QK``, ``Hidden units``, or of linear layers what follows the last layer number, ``mlp.fc1``."""
    titles = {"units": "Hidden units", "tokens": "Tokens", "linear": pattern.rpartition("*.")[2]}
    return titles.get(kind, kind.upper())


def figure_curves(series: Sequence[dict[str, Any]], *, columns: int = 3, width: float = 6.4) -> "Figure":
    """Lines through the series of one entry of ``ReportData.curves``, a panel for every ``"y_label"``; None is a gap.

    A label has one colour in all panels; a ``"reference"`` is grey and dashed.
    """
    _expect(series, "series")
    panels: dict[str, list[dict[str, Any]]] = {}
    for entry in series:
        panels.setdefault(str(entry.get("y_label") or ""), []).append(entry)
    labels = list(dict.fromkeys(e["label"] for e in series if e.get("label") and not e.get("reference")))
    alone = len(panels) == 1
    with drawing():
        figure, axes = _grid(len(panels), columns, width, 0.3 * width + 1 if alone else 2.5, extra=0 if alone else 0.4)
        for position, (axis, (title, entries)) in enumerate(zip(axes, panels.items(), strict=True)):
            for place, entry in enumerate(entries):
                _line(axis, entry, labels.index(entry["label"]) if entry.get("label") in labels else place)
            (axis.set_ylabel if alone else axis.set_title)(_text(title))
            if position + columns >= len(panels):
                axis.set_xlabel(_text(next((e["x_label"] for e in entries if e.get("x_label")), "")))
            axis.grid()
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if handles and alone:
            axes[0].legend(loc="best")
        elif handles:
            fitting = int(width / (0.6 + 0.075 * max(map(len, handles))))
            figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, fitting))
    return figure


def _line(axis: "Axes", entry: dict[str, Any], style: int) -> None:
    """One series; points are marked where there are few, or no others beside them."""
    x, y = ([float("nan") if value is None else value for value in entry[key]] for key in ("x", "y"))
    label = _text(entry["label"]) if entry.get("label") else None
    if entry.get("reference"):
        axis.plot(x, y, label=label, color=GREY, ls="--", lw=1)
        return
    there = [False, *map(isfinite, y), False]
    few = sum(there) <= 25
    marks = [i for i in range(len(y)) if there[i + 1] and (few or not (there[i] or there[i + 2]))]
    turn, color = divmod(style, len(_COLORS))
    axis.plot(
        x, y, label=label, color=_COLORS[color], ls=_DASHES[turn % len(_DASHES)], marker="o", markevery=marks, ms=3.5
    )


def _grid(count: int, columns: int, width: float, height: float, *, extra: float) -> tuple["Figure", list["Axes"]]:
    """A figure of ``count`` panels of that height each, with ``extra`` for what they share."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, rows * height + extra), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _along_the_blocks(rows: Sequence[SiteRow], sites: Sequence[SiteRow]) -> tuple[Sequence[int], list[str]]:
    """Where a panel's bars stand, and the names along its axis: all blocks of its kind, so that panels compare."""
    pattern = _numbers_out(rows[0].block)
    blocks = in_order(site.block for site in sites if site.block and _numbers_out(site.block) == pattern)
    if len({row.block for row in rows}) < len(rows) or not {row.block for row in rows} <= set(blocks):
        return range(len(rows)), [row.name for row in rows]
    return [blocks.index(row.block) for row in rows], blocks


def _bars(draw: Any, rows: Sequence[SiteRow], thick: float, places: Sequence[int]) -> None:
    kept = [row.keep or 0 for row in rows]
    whole = [row.full if row.form is None else 0 for row in rows]
    draw(places, kept, thick, color=_BLUE, label="kept")
    if any(whole):
        draw(places, whole, thick, color=LIGHT, edgecolor="#a0a0a0", hatch="////", lw=0, label="stays as it is")
    draw(places, [row.full for row in rows], thick, fill=False, edgecolor=GREY, lw=0.8, label="all there was")


def _cumulative(values: Sequence[float]) -> list[float]:
    """The share of the sum that each of ``_COLUMNS`` equal shares of the rank holds, interpolated between ranks."""
    sums = [0.0, *accumulate(values)]
    shares = []
    for step in range(1, _COLUMNS + 1):
        whole, part = divmod(step * len(values), _COLUMNS)
        rest = part / _COLUMNS * values[whole] if part else 0.0
        shares.append((sums[whole] + rest) / sums[-1])
    return shares


def _label_layers(axis: "Axes", layers: Sequence[str]) -> None:
    """A tick in the middle of the rows of each layer, where there is room."""
    starts = [row for row, layer in enumerate(layers) if row == 0 or layers[row - 1] != layer]
    names = _short([layers[start] for start in starts])
    ticks: dict[float, str] = {}
    for name, start, end in zip(names, starts, [*starts[1:], len(layers)], strict=True):
        middle = (start + end) / 2
        if not ticks or middle - max(ticks) >= 0.99 * len(layers) / _TICKS:
            ticks[middle] = name
    axis.set_yticks(list(ticks), list(ticks.values()))


def _thin_ticks(axis: "Axes", names: Sequence[str]) -> None:
    """Names under the places 0, 1, …, as many as fit."""
    step = -(-sum(max(3, len(name) + 2) for name in names) // (3 * _TICKS))
    axis.set_xticks(range(0, len(names), step), names[::step])


def _short(names: Sequence[str]) -> list[str]:
    """Names of layers by their numbers, ``blocks.3.attn`` → ``3``, with the words that differ if the numbers clash."""
    parts = [re.split(r"[.:]", name) for name in names]
    shared = set(parts[0]).intersection(*parts)
    numbers = [[part for part in name if part.isdigit()] for name in parts]
    words = [
        [p if p.isdigit() else p.split("_")[0][:6] for p in name if p.isdigit() or p not in shared] for name in parts
    ]
    for candidate in (numbers, words):
        if all(candidate) and len({tuple(name) for name in candidate}) == len(set(names)):
            return [_text(".".join(name)) for name in candidate]
    return [_text(name if len(name) <= 16 else "…" + name[-15:]) for name in names]


def _text(text: str) -> str:
    """Text that matplotlib draws as it stands: a dollar sign starts no formula."""
    return str(text).replace("$", r"\$")


def _expect(things: Any, what: str) -> None:
    if not things:
        raise SettingsError(f"there are no {what} to draw")

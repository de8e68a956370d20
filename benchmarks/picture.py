"""Draws the pictures of README and the page of results from the committed results.

``docs/real-weights.svg`` is what README opens with: what is left of a real model's accuracy, against what is left of
its parameters and of its time, one line a method. A method or a panel without a committed result is not drawn.
Parameters are judged by ``real_weights.py``, time by ``real/times.py``. ``docs/paper-tables.svg`` has COMCAT's Tables 1
and 4 as they come out on the small CIFAR transformer, ``docs/paper-figure6.svg``, ``…7.svg`` and ``…s89.svg`` its
figures of searches.

python benchmarks/picture.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE, PAPER = DOCS / "real-weights.svg", DOCS / "paper-tables.svg"
METHODS = {
    "ranks + units": ("ranks and hidden units (ours)", "a"),
    "ranks": ("ranks alone (ours)", "b"),
    "SVD-LLM": ("SVD whitened by inputs (SVD-LLM)", "f"),
    "product + svd": ("SVD of the weights", "c"),
    "tokens alike": ("merging of look-alikes", "d"),
    "product + magnitude": ("pruning without refit", "e"),
}
PAPER_METHODS = {
    "loss waterfill": ("ranks by the loss (ours)", "a"),
    "weights uniform": ("SVD of heads or matrices, exact", "b"),
    "paper code uniform": ("the paper's code, biases zeroed", "d"),
    "matrix-level SVD": ("matrix-level SVD", "c"),
    "Tucker": ("Tucker", "f"),
    "tensor train": ("tensor train", "e"),
}
PAPER_TABLES = {
    "mha": "Table 1: top-1, %, attention alone shrinks",
    "ffn": "Table 4: top-1, %, feed-forwards alone",
}
SAID = "What a DINOv2-small keeps of its accuracy when it is made smaller, nothing tuned"
PAPER_SAID = "COMCAT's Tables 1 and 4 on a small transformer trained on CIFAR-10, nothing tuned: not ImageNet"
TASKS = {"classifier": "top-1, %", "saliency": "IoU with the dense model's mask, %"}
WIDTH, PANEL, HEIGHT, LEFT, TOP, GAP = 760, 320, 190, 46, 92, 62
STYLE = """text{font:12px system-ui,sans-serif;fill:#1f2328}.dim{fill:#59636e}.title{font-weight:600}
.grid{stroke:#d1d9e0;stroke-width:1}.line{fill:none;stroke-width:2}.bar{stroke-width:1.2}
.a{stroke:#0969da}.b{stroke:#bc4c00}.c{stroke:#6e7781}.d{stroke:#1a7f37}.e{stroke:#8250df}
.f{stroke:#0e8a9a}.dot.f{fill:#0e8a9a}
.dot.a{fill:#0969da}.dot.b{fill:#bc4c00}.dot.c{fill:#6e7781}.dot.d{fill:#1a7f37}.dot.e{fill:#8250df}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.dim{fill:#9198a1}.grid{stroke:#3d444d}
.a{stroke:#4493f8}.b{stroke:#f0883e}.c{stroke:#9198a1}.d{stroke:#3fb950}.e{stroke:#ab7df8}
.f{stroke:#39c5cf}.dot.f{fill:#39c5cf}
.dot.a{fill:#4493f8}.dot.b{fill:#f0883e}.dot.c{fill:#9198a1}.dot.d{fill:#3fb950}.dot.e{fill:#ab7df8}}"""


@dataclass(frozen=True)
class Point:
    """What is left of the model, of its accuracy, and the standard deviation of that over seeds, all in %."""

    left: float
    score: float
    spread: float


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``lines``: by method, from the dense model on."""

    title: str
    across: str
    lines: dict[str, list[Point]]


def main() -> None:
    for path, content in pictures().items():
        path.write_text(content)
        print(f"wrote {path}")


def pictures() -> dict[Path, str]:
    """Every picture by its path, from the results that are committed."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/*.json"))]
    drawn = {PICTURE: svg(panels(found), SAID, METHODS), PAPER: svg(paper_panels(found), PAPER_SAID, PAPER_METHODS)}
    searches = {DOCS / f"{r['benchmark']}.svg": search_figure(r) for r in found if r["benchmark"] in SEARCHES}
    return drawn | searches


SEARCHES = {
    "paper-figure6": "COMCAT's Figure 6 on a small transformer trained on CIFAR-10: not ImageNet",
    "paper-figure7": "COMCAT's Figure 7 on a small transformer trained on CIFAR-10: not ImageNet",
    "paper-figures89": "COMCAT's Figures 8 and 9 on a small transformer trained on CIFAR-10: not ImageNet",
}
KINDS = {
    "attn:qk": "QK", "attn:vo": "VO", "mlp:units": "hidden units", "mlp.fc1": "first of the feed-forward",
    "mlp.fc2": "second",
}  # fmt: skip
POINTS = 24
"""Points of a line, at most."""


def search_figure(r: dict[str, Any]) -> str:
    """Figure 6, 7, or 8 and 9 from its result."""
    drawn = _ranks(r) if "series" not in r else _curves(r)
    names = dict.fromkeys(name for panel in drawn for name in panel.lines)
    methods = {name: (name, kind) for name, kind in zip(names, "abdecf", strict=False)}
    return svg(drawn, SEARCHES[r["benchmark"]], methods)


def _curves(r: dict[str, Any]) -> list[Panel]:
    """Lines of a search and of tuning. Parameters in millions become a share of all, epochs a share of one."""
    panels: dict[str, Panel] = {}
    for s in r["series"]:
        title, across, up, along = s["y_label"], s["x_label"], 1.0, 1.0
        if title == "loss":
            continue
        if title.startswith("parameters"):
            title, up = "parameters, % of all", 100 / r["rows"]["as it was"][0]
        if across == "epoch":
            across, along = "pictures seen, % of an epoch", 100.0
        known = [Point(along * x, up * y, 0.0) for x, y in zip(s["x"], s["y"], strict=True) if y is not None]
        thin = known[:: -(-len(known) // POINTS)]
        panel = panels.setdefault(title, Panel(title, across, {}))
        panel.lines[s["label"]] = thin if thin[-1] is known[-1] else [*thin, known[-1]]
    return list(panels.values())


def _ranks(r: dict[str, Any]) -> list[Panel]:
    """What every block keeps of its ranks and units, a line a kind of layer."""
    panel = Panel("ranks and units kept, % of all", "block", {})
    for name, (kept, full) in r["rows"].items():
        block, _, kind = name.rpartition("blocks.")[2].partition(".")
        if kind in KINDS:
            share = 100.0 if kept is None else 100 * kept / full
            panel.lines.setdefault(KINDS[kind], []).append(Point(int(block), share, 0.0))
    return [panel]


def paper_panels(results: Sequence[dict[str, Any]]) -> list[Panel]:
    """Tables 1 and 4, a panel each: the first result that has the part, without units."""
    found = []
    for part, title in PAPER_TABLES.items():
        for r in results:
            rows = [x for x in r["rows"] if x["part"] == part] if r["benchmark"].startswith("accuracy") else []
            flat = [
                ({"method": m, "reduce": x["reduce"], "mean": v["mean"], "std": v.get("std")}, 100 * (1 - x["reduce"]))
                for x in rows for m, v in x["top1"].items() if m in PAPER_METHODS
            ]  # fmt: skip
            if flat:
                lines = _lines(r["dense_top1"], iter(flat), PAPER_METHODS)
                found.append(Panel(title, "parameters of that part left, %", lines))
                break
    return found


def panels(results: Sequence[dict[str, Any]]) -> list[Panel]:
    """Panels that have at least one line: a row a task, parameters before time."""
    found = []
    for task, title in TASKS.items():
        scored = [r for r in results if r["benchmark"].startswith("real-") and r["task"] == task and not _tuned(r)]
        if not scored:
            continue
        dense = scored[0]["dense"]["score"]
        rows = [x for r in scored if r["judged"] == scored[0]["judged"] for x in r["rows"] if x["method"] in METHODS]
        times = {
            (x["method"], x["reduce"]): 100 / x["speed_up"]
            for r in results if r["benchmark"] == f"forward-{task}" for x in r["rows"]
        }  # fmt: skip
        whole = scored[0]["parameters"]
        sizes = [(x, 100 * x["runs"][0]["parameters"] / whole) for x in rows]
        by_size = _lines(dense, ((x, left) for x, left in sizes if left < 99.5))  # fewer tokens save none
        by_time = _lines(dense, ((x, times[key]) for x in rows if (key := (x["method"], x["reduce"])) in times))
        found.append(Panel(title, "parameters left, %", by_size))
        found.append(Panel(title, "time of a forward left, %", by_time))
    return [p for p in found if p.lines]


def _tuned(r: dict[str, Any]) -> bool:
    return bool(r["settings"].get("tune"))


def _lines(
    dense: float, rows: Iterable[tuple[dict[str, Any], float]], methods: Iterable[str] = METHODS
) -> dict[str, list[Point]]:
    lines: dict[str, dict[float, Point]] = {}
    for x, left in rows:
        lines.setdefault(x["method"], {}).setdefault(x["reduce"], Point(left, x["mean"], x["std"] or 0.0))
    start = Point(100, dense, 0.0)
    return {m: [start, *(p for _, p in sorted(lines[m].items()))] for m in methods if m in lines}


def svg(drawn: Sequence[Panel], said: str, methods: dict[str, tuple[str, str]]) -> str:
    """Panels two in a row under one legend, readable on light and dark ground."""
    rows = (len(drawn) + 1) // 2
    height = TOP + rows * (HEIGHT + GAP)
    shown = [m for m in methods if any(m in p.lines for p in drawn)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"',
        f' aria-label="{escape(said)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="18">{escape(said)}</text>',
    ]
    for i, method in enumerate(shown):
        name, kind = methods[method]
        x, y = LEFT + (i % 3) * 232, 40 + (i // 3) * 18
        parts += [
            f'<path class="line {kind}" d="M{x} {y - 4}h20"/>',
            f'<circle class="dot {kind}" cx="{x + 10}" cy="{y - 4}" r="3"/>',
            f'<text x="{x + 26}" y="{y}">{escape(name)}</text>',
        ]
    for i, panel in enumerate(drawn):
        parts.append(_panel(panel, methods, LEFT + (i % 2) * (PANEL + LEFT + 14), TOP + (i // 2) * (HEIGHT + GAP)))
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, methods: dict[str, tuple[str, str]], x0: float, y0: float) -> str:
    points = [p for line in panel.lines.values() for p in line]
    low, high = _ticks(min(p.score - p.spread for p in points), max(p.score + p.spread for p in points))
    first, last = _ticks(min(p.left for p in points), max(p.left for p in points))

    def x(left: float) -> float:
        return round(x0 + (left - first) / (last - first) * PANEL, 1)

    def y(score: float) -> float:
        return round(y0 + HEIGHT - (score - low) / (high - low) * HEIGHT, 1)

    parts = [f'<text class="dim" x="{x0}" y="{y0 - 8}">{escape(panel.title)}</text>']
    for tick in range(low, high + 1, _step(low, high)):
        parts.append(f'<path class="grid" d="M{x0} {y(tick)}h{PANEL}"/>')
        parts.append(f'<text class="dim" x="{x0 - 6}" y="{y(tick) + 4}" text-anchor="end">{tick}</text>')
    for tick in range(first, last + 1, _step(first, last)):
        parts.append(f'<text class="dim" x="{x(tick)}" y="{y0 + HEIGHT + 17}" text-anchor="middle">{tick}</text>')
    middle = x0 + PANEL / 2
    parts.append(
        f'<text class="dim" x="{middle}" y="{y0 + HEIGHT + 34}" text-anchor="middle">{escape(panel.across)}</text>'
    )
    for method, line in panel.lines.items():
        kind = methods[method][1]
        way = "L".join(f"{x(p.left)} {y(p.score)}" for p in line)
        parts.append(f'<path class="line {kind}" d="M{way}"/>')
        for p in line:
            if p.spread:
                parts.append(
                    f'<path class="bar {kind}" d="M{x(p.left)} {y(p.score - p.spread)}V{y(p.score + p.spread)}"/>'
                )
            parts.append(f'<circle class="dot {kind}" cx="{x(p.left)}" cy="{y(p.score)}" r="3"/>')
    return "\n".join(parts)


def _step(low: float, high: float) -> int:
    return next(s for s in (5, 10, 20, 25, 50, 100) if (high - low) / s <= 7 or s == 100)


def _ticks(low: float, high: float) -> tuple[int, int]:
    step = _step(low, high)
    return int(low // step) * step, int(-(-high // step)) * step


if __name__ == "__main__":
    main()

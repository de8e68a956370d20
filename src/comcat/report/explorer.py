"""The page with a slider: every budget of a model on one screen. It loads nothing and needs no network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..errors import ComcatError, counted
from ..files import write_text

BUDGETS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "time"}
_AXES = {"parameters": "parameters", "macs": "macs", "latency": "milliseconds"}


def render_explorer(
    way: Mapping[str, Any], *, model: str, command: Callable[[float], str], notes: Sequence[str] = ()
) -> str:
    """The page as one text.

    Args:
        way: :meth:`comcat.methods.exploring.Exploration.to_dict`. command: what to type for a saving.

    Raises ComcatError if Jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ComcatError("the page needs Jinja2; install it with: pip install 'comcat[report]'") from error
    source = files("comcat.report").joinpath("explorer.html.j2").read_text(encoding="utf-8")
    points = [{**_rounded(p), "command": command(p["reduce"])} for p in way["points"]]
    data = {
        "points": points,
        "dense": _rounded(way["dense"]),
        "rivals": {name: [_rounded(p) for p in ways] for name, ways in way["rivals"].items()},
        "budget": way["budget"],
        "budgets": BUDGETS,
        "axis": _AXES[way["budget"]],
    }
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    calibrated, judged = way["pictures"]
    byline = f"One calibration on {counted(calibrated, 'picture')}, {counted(len(points), 'plan')}" + (
        f"; agreement measured on {counted(judged, 'other')}" if judged else ""
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=f"{model}: every budget", byline=byline + _timed_on(way.get("latency")), points=points,
        start=len(points) // 2, data=Markup(written), notes=list(notes), heads=_heads(way), rows=_rows(way, points),
    )  # fmt: skip


def write_explorer(path: str | os.PathLike[str], page: str) -> None:
    """Write the page: whole, or not at all."""
    write_text(path, page)


def _timed_on(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return "."
    return (
        f". Milliseconds are of a batch of {facts['batch']} in {facts['dtype']} on {facts['device']}, "
        f"{facts['threads']} threads."
    )


def _rounded(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with as many digits as are shown, so that the page stays small."""

    def few(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, Mapping):
            return {k: few(v) for k, v in value.items()}
        return [few(v) for v in value] if isinstance(value, list | tuple) else value

    return few(dict(point))


def _heads(way: Mapping[str, Any]) -> list[str]:
    heads = ["saved", "parameters (M)", "MACs (G)"]
    return [*heads, *(["ms"] if way["dense"]["milliseconds"] is not None else []), "predicted loss", "measured"]


def _rows(way: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    found = []
    for p in points:
        said = p["measured"] or {}
        shown = next((f"{said[k]:.1f} % {k}" for k in ("top1", "agreement") if k in said), "")
        row = [f"{100 * p['reduce']:.1f} %", f"{p['parameters'] / 1e6:.2f}", f"{p['macs'] / 1e9:.2f}"]
        row += [f"{p['milliseconds']:.2f}"] if p["milliseconds"] is not None else []
        found.append([*row, "" if p["loss"] is None else f"{p['loss']:.4g}", shown.replace("top1", "top-1")])
    return found

"""A self-contained HTML page of pictures side by side, numbers and a curve."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import write_text


@dataclass(frozen=True)
class Sheet:
    """Pictures in a row, with a line above, a figure beside that, and captions below where there are any."""

    title: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()
    figure: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom."""

    title: str
    lead: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()
    """Headline numbers: label, value, detail."""
    sheets: Sequence[Sheet] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    """Title, head and rows."""
    curves: Sequence[Mapping[str, Any]] = ()
    """Lines of one figure, as :func:`comcat.report.figure_curves` takes them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_page(page: Page, path: Path) -> Path:
    """Write the page to a file, whole or not at all.

    Raises:
        StoreError: if it cannot be written.
    """
    write_text(path, render_page(page))
    return path


def render_page(page: Page) -> str:
    """The page as HTML that loads nothing and runs no script."""
    from jinja2 import Environment, StrictUndefined

    source = files("comcat.diffusion.draw").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sheets = [
        {
            "title": s.title,
            "figure": s.figure,
            "pictures": [_inline(p) for p in s.pictures],
            "captions": list(s.captions),
        }
        for s in page.sheets
    ]
    return environment.from_string(source).render(page=page, sheets=sheets, curve=_curve(page.curves))


def _inline(image: Image.Image) -> dict[str, Any]:
    """A picture as a data URI; small ones are shown enlarged, in sharp pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    small = max(image.size) < 96
    return {
        "source": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        "width": image.width * 3 if small else image.width,
        "sharp": image.height < 96,
    }


def _curve(curves: Sequence[Mapping[str, Any]]) -> Any:
    if not curves:
        return ""
    from markupsafe import Markup

    from ...report import figure_curves
    from ...report.svg import to_svg

    figure = figure_curves([dict(c) for c in curves])
    return Markup(to_svg(figure, prefix="curve", label="Line chart of the training loss"))

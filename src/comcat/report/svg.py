"""How figures look, and how they become part of a page."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from comcat.errors import ComcatError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, LIGHT = "#6b6b6b", "#e4e4e4"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "svg.hashsalt": "comcat",  # the same report twice is the same bytes
}


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's own settings are, which come back afterwards."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ComcatError("figures need matplotlib; install it with: pip install 'comcat[report]'") from error
    with style.context(["default", _STYLE]):
        yield


def to_svg(figure: "Figure", *, prefix: str, label: str) -> str:
    """The figure as an ``<svg>`` element for a page, described by ``label``; ``prefix`` keeps its ids from clashing.

    Raises ComcatError without matplotlib.
    """
    buffer = StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not know
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    seen: set[str] = set()

    def own(match: re.Match[str]) -> str:
        """The id, if something refers to it and it is the first of its name: matplotlib repeats equal definitions."""
        name = match[1]
        if name not in used or name in seen:
            return ""
        seen.add(name)
        return f' id="{prefix}-{name}"'

    def own_ids(tag: re.Match[str]) -> str:
        text = tag[0].replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
        return re.sub(r'\sid="([^"]*)"', own, text)

    svg = re.sub(r"<[a-zA-Z][^<>]*>", own_ids, svg)  # tags only: what stands between them is text
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)

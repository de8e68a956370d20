"""COMCAT's figures and tables that need a search and tuning, as they come out on a small transformer."""

from __future__ import annotations

from typing import Any

from common import rows_of, where

TITLES = {
    "paper-figure6": "Figure 6: ranks by search against the same share everywhere",
    "paper-figure7": "Figure 7: exponents β of the cost",
    "paper-figures89": "Figures 8 and 9: the ranks of every layer as the search finds them",
    "paper-table2": "Table 2: searched, then tuned",
    "paper-table3": "Table 3: before and after, with the time of a forward",
}
DRAWN = {"paper-figure6": "paper-figure6.svg", "paper-figure7": "paper-figure7.svg",
    "paper-figures89": "paper-figures89.svg"}  # fmt: skip
"""The pictures of a result, which ``picture.py`` draws in docs/."""


def paper(r: dict[str, Any]) -> str:
    """A figure or table: what was done, its picture, its rows without those that others have published."""
    title = TITLES[r["benchmark"]]
    parts = [f"**{title}.** {_asked(r)}On the small CIFAR transformer and in minutes: not the paper's models, not "
        "ImageNet; one seed and few pictures, so that differences of a point or two say nothing."]  # fmt: skip
    if r["benchmark"] in DRAWN:
        parts.append(f"![{title}, on the small CIFAR transformer, not on ImageNet]({DRAWN[r['benchmark']]})")
    if "images/s" in r["columns"]:
        parts[0] += " Both models took turns, on a machine that did other work beside."
    rows = [[name, *values] for name, values in r["rows"].items() if "published" not in name]
    return "\n\n".join([*parts, rows_of(["", *r["columns"]], rows), where(r)])


def _asked(r: dict[str, Any]) -> str:
    """The search and the tuning in words, as far as a result has them."""
    settings = r.get("settings") or {}
    settings = settings if "rounds" in settings or "search" in settings else next(iter(settings.values()), {})
    search, tune = settings.get("search", settings), settings.get("tune")
    if "rounds" not in search:
        return ""
    steps = f"{search['rounds']} rounds of {search['rank_steps']} steps on the ranks and {search['weight_steps']} on "
    told = f"A blind search for −{100 * search['reduce']:g} % of the parameters: {steps}the weights, "
    told += f"{search['batch_size']} pictures a step, over {search['forms'].replace(',', ' and ')}, by the weights. "
    if tune:
        count = f"{r['pictures']:,} pictures" if "pictures" in r else "the training pictures"
        told += f"Tuning: {tune['epochs']:g} epoch of {count}, the dense model being the teacher. "
    return told

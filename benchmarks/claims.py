"""Figures that README, docs and CHANGELOG state, and the committed result that each one rounds.

``claims.json`` beside this file is a list. An entry names a page and the words that stand there (``says``). Then come
either ``figures``, or, for numbers that nobody measured, why they are none (``exempt``). ``settings`` are numbers in
the words that say what was measured, not what came out. A figure has

- ``shown``, as it stands in the words, and ``number``, where that is no numeral;
- ``result``, a path below ``results/``, and ``at``, the way to the value in it. Steps of a way are a key; a number,
  ``"*"`` or ``"4:"`` in a list; or ``{"method": "ranks", "reduce": 0.5}``, the entries of a list that have these
  values, or one of a list of values;
- ``over`` and ``less``, ways to what the value is divided by or what is taken from it; ``factor``, which multiplies it;
- ``take``, which of several values is meant: ``min``, ``max`` or ``mean``;
- ``holds``: ``rounds`` (the default: the value rounds to the figure), ``at least``, ``at most``, or ``about`` (within a
  tenth).

python benchmarks/claims.py          # prints every figure beside its value; exits with 1 where one does not hold
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = ("README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
GENERATED = ("docs/results.md", "docs/families.md")
"""Pages written from the results whole, by ``summarise.py`` and ``families.py``."""

_NUMBER = r"(?:[−+-]?\d[\d,]*(?:\.\d+)?)"
_WORD = r"\b(?:two|three|four|five|six|seven|eight|nine|ten|fifteen|sixteen|twenty|thirty|fifty|hundred|twice|half)"
_UNIT = r"(?:%|×(?!\s*\d)|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|points?\b|times\b|[kMG]i?B\b|megabytes?\b|nats\b)"
_AND = r"\s*(?:,|to|or|and|–|-)\s*"
FIGURE = re.compile(
    rf"(?:{_NUMBER}|{_WORD})(?:{_AND}(?:{_NUMBER}|{_WORD}))*\s*{_UNIT}"  # with a unit
    # or with decimals, that are no release of something
    r"|(?<![\w.§])(?<!SD )(?<!Python )(?<!Diffusion )(?<!CUDA )(?<!torch )(?<!timm )\d+\.\d+(?:\s*×)?(?![.\w])"
)


def claims() -> list[dict[str, Any]]:
    """All entries of ``claims.json``."""
    return json.loads((HERE / "claims.json").read_text())


def words_of(page: str) -> str:
    """A page's text in one line, without code, spans of code and addresses of links."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?m)^( {4}|\t).*$", "", re.sub(r"(?m)^(?=[-|#])", "\n", text))
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def without_code(words: str) -> str:
    """Words without what stands between backticks: names and commands."""
    return re.sub(r"`[^`]*`", lambda m: " " * len(m[0]), words)


def value_of(figure: dict[str, Any]) -> float:
    """What the committed result says."""
    result = json.loads((HERE / "results" / figure["result"]).read_text())
    values = list(_walk(result, figure["at"]))
    for other, combine in (("over", lambda a, b: a / b), ("less", lambda a, b: a - b)):
        if other in figure:
            against = list(_walk(result, figure[other]))
            against = against * len(values) if len(against) == 1 else against
            values = [combine(a, b) for a, b in zip(values, against, strict=True)]
    take = figure.get("take")
    if take is None and len(values) != 1:
        raise LookupError(f"{figure['result']}: {figure['at']} names {len(values)} values, expected one")
    taken = {None: min, "min": min, "max": max, "mean": lambda v: sum(v) / len(v)}[take](values)
    return float(taken) * figure.get("factor", 1)


def _walk(node: Any, way: Sequence[Any]) -> Iterator[Any]:
    if not way:
        yield node
        return
    step, rest = way[0], way[1:]
    if isinstance(node, dict) or isinstance(step, int):
        chosen = [node[step]]
    elif isinstance(step, dict):
        chosen = [x for x in node if all(x[k] in (v if isinstance(v, list) else [v]) for k, v in step.items())]
    else:
        first, _, last = ("", "", "") if step == "*" else step.partition(":")
        chosen = node[int(first or 0) : int(last) if last else None]
    for child in chosen:
        yield from _walk(child, rest)


def number_of(figure: dict[str, Any]) -> float:
    """The figure as a number."""
    return float(figure["number"] if "number" in figure else figure["shown"].replace("−", "-").replace(",", ""))


def holds(figure: dict[str, Any]) -> bool:
    """Whether the committed value bears the figure out."""
    stated, value, rule = number_of(figure), value_of(figure), figure.get("holds", "rounds")
    if rule != "rounds":
        return {"at least": value >= stated, "at most": value <= stated,
                "about": abs(value - stated) <= 0.1 * abs(stated)}[rule]  # fmt: skip
    exponent = (
        Decimal(str(figure.get("number", figure["shown"].replace("−", "-").replace(",", "")))).as_tuple().exponent
    )
    return abs(value - stated) <= 0.5 * 10 ** int(exponent) * (1 + 1e-6)


def unexplained(entry: dict[str, Any]) -> str:
    """What is left of an entry's words without its figures and settings: no number should be."""
    left = without_code(entry["says"])
    parts = [f["shown"] for f in entry.get("figures", [])] + entry.get("settings", [])
    for part in sorted(parts, key=len, reverse=True):
        if part not in left:
            raise LookupError(f"{entry['page']}: {part!r} does not stand in {entry['says']!r}")
        left = left.replace(part, " ", 1)
    return left


def unclaimed(page: str) -> list[str]:
    """Figures on a page that no entry covers, with the words around them."""
    words = words_of(page)
    covered: list[tuple[int, int]] = []
    for entry in (e for e in claims() if e["page"] == page):
        covered += [m.span() for m in re.finditer(re.escape(entry["says"]), words)]
    found = [
        m for m in FIGURE.finditer(without_code(words)) if not any(a <= m.start() and m.end() <= b for a, b in covered)
    ]
    return [f"{words[max(0, m.start() - 60) : m.start()]}>>{m[0]}<<{words[m.end() : m.end() + 40]}" for m in found]


def main() -> int:
    wrong = 0
    for entry in claims():
        for figure in entry.get("figures", []):
            good = holds(figure)
            wrong += not good
            told = f"{figure['shown']} ← {value_of(figure):.6g} {figure['result']}"
            print(f"{'   ' if good else '!! '}{entry['page']}: {told}")
    for page in PAGES:
        for words in [] if page in GENERATED else unclaimed(page):
            wrong += 1
            print(f"?? {page}: {words}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

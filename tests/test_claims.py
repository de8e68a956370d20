"""What README, docs and CHANGELOG say in figures stands in the committed results, and the page of results is theirs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A script of the benchmarks as a module, leaving no trace in ``sys``."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[module]


claims = script("claims")
ENTRIES = claims.claims()


def test_the_page_of_results_is_written_from_the_results() -> None:
    summarise = script("summarise")
    assert summarise.PAGE.read_text() == summarise.page(), "run `make results`"


def test_the_picture_is_drawn_from_the_results() -> None:
    for path, content in script("picture").pictures().items():
        assert path.read_text() == content, "run `make results`"


def test_a_line_stands_where_its_result_says() -> None:
    picture = script("picture")

    def row(method: str, reduce: float, mean: float, parameters: int) -> dict:
        return {"method": method, "reduce": reduce, "mean": mean, "std": 1.0, "runs": [{"parameters": parameters}]}

    real = {
        "benchmark": "real-classifier", "task": "classifier", "judged": 10, "parameters": 1000, "settings": {"tune": 0},
        "dense": {"score": 80.0},
        "rows": [row("ranks", 0.5, 60.0, 500), row("ranks", 0.2, 75.0, 800), row("tokens alike", 0.5, 70.0, 1000)],
    }  # fmt: skip
    tuned = {**real, "settings": {"tune": 5}, "rows": [row("ranks + units", 0.5, 79.0, 500)]}
    times = {"benchmark": "forward-classifier", "rows": [{"method": "tokens alike", "reduce": 0.5, "speed_up": 2.0}]}
    by_size, by_time = picture.panels([real, tuned, times])
    assert [(p.left, p.score) for p in by_size.lines["ranks"]] == [(100, 80.0), (80.0, 75.0), (50.0, 60.0)]
    assert set(by_size.lines) == {"ranks"} and set(by_time.lines) == {"tokens alike"}
    assert [(p.left, p.score) for p in by_time.lines["tokens alike"]] == [(100, 80.0), (50.0, 70.0)]
    drawn = ElementTree.fromstring(picture.svg([by_size, by_time], picture.SAID, picture.METHODS))
    assert sum("L" in e.get("d", "") for e in drawn.iter()) == 2, "two lines through points, beside the legend's"
    assert "prefers-color-scheme:dark" in picture.svg([by_size], picture.SAID, picture.METHODS)


def test_the_papers_tables_are_two_panels_of_the_small_transformer() -> None:
    picture = script("picture")
    row = {"part": "mha", "reduce": 0.4, "top1": {"matrix-level SVD": {"mean": 50.0}, "other": {"mean": 1.0}}}
    (panel,) = picture.paper_panels([{"benchmark": "accuracy-mha", "dense_top1": 80.0, "rows": [row]}])
    assert [(p.left, p.score) for p in panel.lines["matrix-level SVD"]] == [(100, 80.0), (60.0, 50.0)]
    assert set(panel.lines) == {"matrix-level SVD"} and panel.title.startswith("Table 1")
    assert len(picture.paper_panels([json.loads(p.read_text()) for p in sorted(picture.RESULTS.glob("*/*.json"))])) == 2


def test_the_papers_searches_are_drawn_and_told_from_their_results() -> None:
    picture, told_of = script("picture"), script("sections.paper").paper.paper
    said = {"command": "python figure6.py", "date": "2026-11-26", "environment": {}}
    search = {"rounds": 2, "rank_steps": 3, "weight_steps": 1, "batch_size": 4, "reduce": 0.5, "forms": "ranks,units"}
    lines = [
        {"x": [0, 1], "y": [70.0, 75.5], "label": "uniform", "x_label": "epoch", "y_label": "top-1, %"},
        {"x": [0, 0.5, 1], "y": [2.0, None, 1.0], "label": "search", "x_label": "epoch",
            "y_label": "parameters, millions"},
        {"x": [0, 1], "y": [3.0, 2.0], "label": "search", "x_label": "epoch", "y_label": "loss"},
    ]  # fmt: skip
    figure6 = said | {
        "benchmark": "paper-figure6", "series": lines, "rows": {"as it was": [2.0, 78.0, 78.0]}, "pictures": 9000,
        "columns": ["parameters, millions", "top-1 untuned", "top-1 tuned"],
        "settings": {"search": search, "tune": {"epochs": 1.0}},
    }  # fmt: skip
    accuracy, size = picture._curves(figure6)
    assert [(p.left, p.score) for p in accuracy.lines["uniform"]] == [(0, 70.0), (100, 75.5)]
    assert [(p.left, p.score) for p in size.lines["search"]] == [(0, 100.0), (100, 50.0)], "of all, gaps left out"
    ElementTree.fromstring(picture.search_figure(figure6))
    told = told_of(figure6)
    assert "paper-figure6.svg" in told and "over ranks and units" in told and "1 epoch of 9,000 pictures" in told
    rows = {"blocks.1.attn:qk": [16, 64], "blocks.1.mlp:units": [None, 768], "head": [None, 10]}
    ranks = said | {"benchmark": "paper-figures89", "rows": rows, "columns": ["kept", "of"]}
    (panel,) = picture._ranks(ranks)
    assert {name: [(p.left, p.score) for p in line] for name, line in panel.lines.items()} == {
        "QK": [(1, 25.0)], "hidden units": [(1, 100.0)],
    }  # fmt: skip
    table = {**ranks, "benchmark": "paper-table3", "rows": {"ours": [1, 2], "theirs (published)": [3, 4]}}
    assert "| ours | 1 | 2 |" in told_of(table) and "theirs" not in told_of(table)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['page']}: {e['says'][:40]}")
def test_a_figure_is_what_a_committed_result_rounds_to(entry: dict) -> None:
    assert entry["says"] in claims.words_of(entry["page"]), "the page no longer says so"
    assert set(entry) <= {"page", "says", "figures", "settings", "exempt"}
    if "exempt" in entry:
        assert "figures" not in entry and entry["exempt"] in ("setting", "withdrawn", "requirement", "of others")
        return
    assert entry["figures"]
    for figure in entry["figures"]:
        assert claims.holds(figure), f"{figure['shown']} is {claims.value_of(figure):g} in {figure['result']}"
    left = claims.unexplained(entry)
    assert not any(c.isdigit() for c in left), f"a number that nothing explains: {left}"


@pytest.mark.parametrize("page", [p for p in claims.PAGES if p not in claims.GENERATED])
def test_no_figure_stands_without_a_result(page: str) -> None:
    assert claims.unclaimed(page) == [], "give it an entry in benchmarks/claims.json, or take it out"


def test_a_figure_that_drifts_is_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "r.json").write_text(
        json.dumps({"dense": 70.0, "rows": [{"m": "a", "v": 68.24}, {"m": "b", "v": 35.0}]})
    )
    monkeypatch.setattr(claims, "HERE", tmp_path)
    figure = {"shown": "68.2", "result": "r.json", "at": ["rows", {"m": "a"}, "v"]}
    assert claims.holds(figure) and not claims.holds({**figure, "shown": "68.3"})
    assert not claims.holds({**figure, "shown": "68.25"})
    assert claims.holds({**figure, "shown": "−1.8", "less": ["dense"]})
    assert claims.holds({**figure, "shown": "half", "number": 0.5, "at": ["rows", {"m": "b"}, "v"], "over": ["dense"]})
    both = {**figure, "at": ["rows", "*", "v"]}
    assert claims.holds({**both, "shown": "35", "take": "min"}) and claims.holds({**both, "shown": "68", "take": "max"})
    with pytest.raises(LookupError, match="names 2 values"):
        claims.holds(both)


def test_figures_are_seen_in_prose(tmp_path, monkeypatch) -> None:
    text = """It keeps 76.5 and
72 % of `--keep 0.7` at half the time, 1.9× as fast, four points more; §3.2, 14 × 14 tokens, DINOv2.

    code 50 %
"""
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "claims", lambda: [{"page": "README.md", "says": "four points more"}])
    found = [words.partition(">>")[2].partition("<<")[0] for words in claims.unclaimed("README.md")]
    assert found == ["76.5 and 72 %", "1.9×"]

"""The table of families: its page is its result's, and its script finds what it says."""

from __future__ import annotations

from typing import Any

import pytest

from .test_claims import script

families = script("families")


def row(**other: Any) -> dict[str, Any]:
    whole = {
        "library": "timm", "family": "vit", "attention": 2, "qk": 2, "vo": 2, "units": 2, "refused": 0, "share": 0.8,
        "reasons": {}, "error": 1e-7, "compressed": True, "loaded": True,
    }  # fmt: skip
    return {**whole, **other}


def test_the_page_of_families_is_written_from_the_result() -> None:
    assert families.measured() and families.PAGE.read_text() == families.page(families.measured())


def test_a_family_is_whole_where_all_is_understood_exact_and_comes_back() -> None:
    assert families.is_whole(row())
    assert families.is_whole(row(reasons={"rotary position embeddings sit between W_Q and W_K": 2}))
    for other in (
        {"error": 1e-4}, {"compressed": False}, {"loaded": False}, {"share": 0.05}, {"failed": "ModelError"},
        {"reasons": {"attention of no known shape: ConvAttention": 1}}, {"attention": 0},
        {"reasons": {"W_O reads the channels of all heads in turn, which comcat does not stand in for": 1}},
        {"reasons": {"attention of no known shape: comcat does not know how to call Attention(x, y)": 1}},
    ):  # fmt: skip
        assert not families.is_whole(row(**other))


def check(library: str, name: str) -> None:
    known = {(r["library"], r["family"]): r for r in families.measured()}[library, name]
    of = families.TIMM if library == "timm" else families.TRANSFORMERS
    found = families.examine(next(f for f in of if f.name == name))
    assert families.is_whole(found) == families.is_whole(known)
    kept = ("attention", "qk", "vo", "units", "linear", "refused", "share", "reasons")
    assert {k: found[k] for k in kept} == {k: known[k] for k in kept}


def test_a_family_is_what_the_table_says() -> None:
    check("transformers", "segformer")


def names_of(library: str) -> list[str]:
    return [row["family"] for row in families.measured() if row["library"] == library]


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of("timm"))
def test_families_of_timm_are_what_the_table_says(name: str) -> None:
    check("timm", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of("transformers"))
def test_families_of_transformers_are_what_the_table_says(name: str) -> None:
    check("transformers", name)


def test_most_families_shrink_whole_and_none_fails() -> None:
    for library, of, least in (("timm", families.TIMM, 0.95), ("transformers", families.TRANSFORMERS, 0.95)):
        rows = [row for row in families.measured() if row["library"] == library]
        assert {row["family"] for row in rows} <= {family.name for family in of}
        assert not [row["family"] for row in rows if "failed" in row]
        assert sum(map(families.is_whole, rows)) >= least * len(rows)

"""What no tensor of a file says, on how many tokens blocks run, is saved with the model or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import comcat
from comcat.errors import StoreError
from comcat.plan import Plan

from ..models import pictures, tiny_vit

X = pictures(4, 4)[0]


@pytest.mark.parametrize("first", ["ranks", "tokens"])
def test_merges_beside_a_compression_are_not_lost_in_silence(tmp_path: Path, first: str) -> None:
    model = tiny_vit()
    if first == "tokens":
        tokens = comcat.merge(model, [X], keep=0.6)
        comcat.apply_(model, tokens)
    small = comcat.compress(model, [X], reduce=0.3)
    if first == "ranks":
        tokens = comcat.merge(small, [X], keep=0.6)
        comcat.apply_(small, tokens)
    with pytest.raises(StoreError, match=r"blocks\.0 runs on \d+ of 16 tokens, the model's plan says all.*sites"):
        comcat.save(small, tmp_path / "lost")
    assert not list(tmp_path.iterdir())
    ranks = small.comcat_record.plan
    comcat.save(small, tmp_path / "both", plan=Plan(sites={**ranks.sites, **tokens.sites}))
    assert comcat.load(tmp_path / "both", into=tiny_vit())(X).equal(small(X))


def test_a_plan_of_merges_that_was_not_applied_or_was_taken_back_is_not_saved(tmp_path: Path) -> None:
    model = tiny_vit()
    plan = comcat.merge(model, [X], keep=0.6)
    handle = comcat.apply_(model, plan)
    handle.revert()
    with pytest.raises(StoreError, match=r"blocks\.0 runs on all tokens, the model's plan says \d+ of 16"):
        comcat.save(model, tmp_path / "m", plan=plan)


def test_a_workflow_tells_it_before_any_work(tmp_path: Path) -> None:
    model = tiny_vit(num_classes=10)
    comcat.apply_(model, comcat.merge(model, [X], keep=0.6))
    for begin in (
        lambda: comcat.compress_to(tmp_path / "m", model, tmp_path / "nowhere", reduce=0.3),
        lambda: comcat.prune_to(tmp_path / "m", model, tmp_path / "nowhere", reduce=0.3, steps=2),
        lambda: comcat.merge_to(tmp_path / "m", model, tmp_path / "nowhere", keep=0.5),
    ):
        with pytest.raises(StoreError, match="the model's plan says all"):
            begin()

"""The benchmark of processes and kills runs, on a tiny model."""

import sys
from pathlib import Path

import pytest

import comcat
from comcat.plan import Plan

from .material import folder, model


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eight processes, each of which imports torch
def test_it_finds_no_difference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    comcat.save(model(), tmp_path / "model", plan=Plan(sites={}))
    import distributed

    try:
        given = {"model": tmp_path / "model", "data": folder(tmp_path / "train", 40), "batch-size": 8, "steps": 12}
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        found = distributed.main([*options, "--pictures", "40", "--reduce", "0.2", "--no-write"])
    finally:
        for name in ("distributed", "common"):
            sys.modules.pop(name, None)
    assert len(found["processes"]["losses"]["2"]) == 12 and found["processes"]["largest_difference"] < 1e-4
    assert len(found["killed"]["kills"]) == 3
    assert found["killed"]["weights_equal_bit_for_bit"] and found["killed"]["losses_equal"]

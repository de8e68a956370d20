"""The scripts of the paper's tables and the benchmarks run, on a tiny model and the built-in digits."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from .models import tiny_vit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save_file(tiny_vit(num_classes=10).state_dict(), place / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    cfg = {"input_size": [3, 32, 32], "mean": [0.3] * 3, "std": [0.4] * 3, "crop_pct": 1.0, "num_classes": 10}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments, "pretrained_cfg": cfg}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "paper"))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield tmp_path
    for name in ("tables", "table1", "table3", "table4", "figures12", "common"):
        sys.modules.pop(name, None)


def _given(folder) -> list[str]:
    return [
        "--model",
        str(folder),
        "--data",
        "digits:test",
        "--calibration",
        "digits:train",
        "--pictures",
        "8",
        "--limit",
        "20",
        "--batch-size",
        "10",
        "--repeats",
        "1",
        "--no-pretrained",
    ]


@pytest.mark.parametrize(("name", "rows"), [("table1", 9), ("table3", 2), ("table4", 10)])
def test_tables(name, rows, scripts, folder):
    module = __import__(name)
    given = [a for a in _given(folder) if a != "--no-pretrained"]
    table = module.main(given)
    mine = {k: v for k, v in table.items() if "published" not in k}
    assert len(mine) == rows
    assert all(len(v) >= 4 and all(isinstance(x, float | int) for x in v) for v in mine.values())
    assert any("published" in k for k in table)
    written = json.loads(next(scripts.rglob(f"paper-{name}.json")).read_text())
    assert written["rows"].keys() == table.keys() and written["environment"]


def test_figures(scripts, folder, tmp_path):
    import figures12

    needed = figures12.main(["--model", str(folder), "--out", str(tmp_path / "figures")])
    assert needed["QK"] < needed["W_Q"] + needed["W_K"]
    assert {"figure1.svg", "figure2.svg", "figure2.json"} <= {p.name for p in (tmp_path / "figures").iterdir()}

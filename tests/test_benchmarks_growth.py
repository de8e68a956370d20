"""The benchmark of cost as the model grows, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .models import tiny_vit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, its model tiny and its results below a temporary folder."""
    for name in ("common", "growth"):  # what another test has imported writes where that test wanted it
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    import growth as script

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(script, "vit", lambda name, device: tiny_vit(img_size=224, patch_size=16, num_classes=10))
    yield script
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_every_step_is_measured_once_and_kept(growth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    true_run = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        """What the process of its own would print; other programs run as they are."""
        if "--one" not in command:
            return true_run(command, **settings)
        asked.append(command)
        said = json.dumps(growth.measure(command[command.index("--one") + 1], 4, 2, 0.3, "cpu"))
        return subprocess.CompletedProcess(command, 0, stdout=f"a line of a library\n{said}\n")

    monkeypatch.setattr(growth.subprocess, "run", run)
    words = [
        "--models",
        "a",
        "b",
        "--pictures",
        "4",
        "--batch",
        "2",
        "--reduce",
        "0.3",
        "--work",
        str(tmp_path / "work"),
    ]
    made = growth.main([*words, "--device", "cpu"])
    assert [command[command.index("--one") + 1] for command in asked] == ["a", "b"]
    steps = ["forward", "sites", "calibrate", "ladders", "choose", "apply", "save"]
    for row in made["rows"]:
        assert list(row["seconds"]) == steps and all(v > 0 for v in row["seconds"].values())
        peaks = list(row["peak_bytes"].values())
        assert peaks == sorted(peaks) and peaks[0] > 0
        assert row["kept"] <= 0.7 and row["saved_bytes"] > 4 * row["kept"] * row["parameters"]
    growth.main([*words, "--device", "cpu"])
    assert len(asked) == 2, "a model that was done is not measured again"
    written = json.loads(next((tmp_path / "results").rglob("growth.json")).read_text())
    page = __import__("summarise").growth(written)
    assert "| a |" in page and "| b |" in page and "At most: sites " in page


def test_the_process_of_its_own_understands_its_command(growth: Any, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(growth, "measure", lambda *given: {"given": given})
    growth.main(
        ["--one", "a", "--pictures", "4", "--batch", "2", "--reduce", "0.3", "--threads", "1", "--device", "cpu"]
    )
    assert json.loads(capsys.readouterr().out) == {"given": ["a", 4, 2, 0.3, "cpu"]}

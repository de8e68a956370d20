"""What importing brings in: nothing heavy before the work that needs it.

One fresh process imports one thing after the other, and says after each what it has got by then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys
def said(step):
    print(json.dumps([step, sorted(sys.modules)]))
import comcat
said("comcat")
from comcat.cli import VERBS, settings_of
for verb in VERBS:
    settings_of(verb)
said("options")
import comcat.data
said("data")
import comcat.store
said("store")
import comcat.report as report
said("report")
report.figure_curves([{"x": [0, 1], "y": [0, 1]}])
said("figure")
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """What is imported after each step, from the first on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    return {step: set(modules) for step, modules in map(json.loads, done.stdout.splitlines())}


def test_importing_comcat_brings_in_no_heavy_library(imported) -> None:
    assert "comcat" in imported["comcat"]
    heavy = {"timm", "transformers", "diffusers", "matplotlib", "accelerate", "torch", "tyro"}
    assert not heavy & imported["comcat"]


def test_options_of_every_verb_are_read_without_a_heavy_library(imported) -> None:
    """A mistyped option is told at once: nothing is imported that only the work needs."""
    assert "comcat.cli.shrink.compress" in imported["options"]
    assert not {"torch", "numpy", "timm"} & imported["options"]


def test_importing_data_is_light(imported) -> None:
    heavy = "datasets pyarrow sklearn timm torchvision transformers webdataset fsspec.implementations".split()
    assert "comcat.data.pictures" in imported["data"] and not set(heavy) & imported["data"]


def test_importing_the_store_is_light(imported) -> None:
    assert "comcat.store.saving" in imported["store"]
    assert not {"timm", "transformers", "datasets", "matplotlib"} & imported["store"]


def test_importing_reports_is_light_and_pyplot_is_never_imported(imported) -> None:
    assert "comcat.report" in imported["report"] and not {"matplotlib", "sklearn", "transformers"} & imported["report"]
    assert "matplotlib" in imported["figure"] and "matplotlib.pyplot" not in imported["figure"]

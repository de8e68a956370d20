"""Folders and plans of format 1, kept as files: every later version must read them, with the outputs they had."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import comcat
from comcat.plan import Plan

from .models import shake

FIXTURES = Path(__file__).parent / "fixtures" / "version1"
FOLDERS = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())
CLOSE = {"rtol": 0, "atol": 1e-6}


def test_there_are_folders_to_load():
    assert FOLDERS == ["hf-vit", "timm-beit", "timm-eva02", "timm-vit"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_the_output_that_it_gave_when_it_was_saved(name):
    kept = load_file(FIXTURES / f"{name}.safetensors")
    model = comcat.load(FIXTURES / name)
    with torch.no_grad():
        output = model(kept["input"])
    torch.testing.assert_close(getattr(output, "logits", output), kept["output"], **CLOSE)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_says_of_itself_is_read(name):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    plan = json.loads((FIXTURES / name / "plan.json").read_text())
    record = comcat.load(FIXTURES / name).comcat_record
    assert record.settings == config["settings"]
    assert record.origin["name"] == config["origin"]["name"]
    assert set(record.plan.sites) == set(plan["sites"])
    assert record.plan.made_by == plan["made_by"]


def test_a_plan_with_every_form_of_old_gives_the_output_that_it_gave():
    kept = load_file(FIXTURES / "plan.safetensors")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3,
        num_classes=5
    ).eval()  # fmt: skip
    shake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = comcat.apply_(model, Plan.load(FIXTURES / "plan.json"))
    with torch.no_grad():
        torch.testing.assert_close(model(kept["input"]), kept["output"], **CLOSE)
    handle.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

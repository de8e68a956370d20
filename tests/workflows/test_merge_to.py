"""``comcat merge`` as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import comcat
from comcat.cli import main

from ..models import pictures, tiny_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm folder, as ``timm:`` models look on disk."""
    place, sizes = tmp_path_factory.mktemp("model"), {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    save_file(tiny_vit(num_classes=10).state_dict(), place / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.3] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 10,
        "model_args": {**sizes, "num_heads": 3, "num_classes": 10}, "pretrained_cfg": {**cfg, "num_classes": 10},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_merge_is_saved_reported_and_loaded(folder, tmp_path, capsys):
    out = tmp_path / "merged"
    status = main(
        ["merge", str(folder), "--data", "digits:train", "--eval", "digits:test", "--eval-limit", "40", "--keep", "0.6",
         "--pictures", "8", "--no-bench", "--out", str(out)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and "of the tokens run" in said
    model = comcat.load(out)
    plan = model.comcat_record.plan
    assert {e.form for e in plan.sites.values()} == {"similar"}
    assert json.loads((out / "plan.json").read_text())["sites"] if (out / "plan.json").exists() else plan.sites
    x = pictures(4, 4)[0]
    before = comcat.load_model(str(folder))
    assert comcat.count_macs(model, x[:1]) < comcat.count_macs(before, x[:1])
    assert not torch.equal(model(x), before(x))
    page = (out / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg') == 4 * (1 + len(plan.sites)) and "Which tokens ran as one" in page


def test_the_recipe_after_cait_runs_in_one_go(folder, tmp_path, capsys):
    out, recipe = tmp_path / "small", Path(__file__).parents[2] / "recipes" / "cait-deit-small.yaml"
    given = [
        "--reduce",
        "0.3",
        "--tune.epochs",
        "0.02",
        "--tune.batch-size",
        "16",
        "--tune.workers",
        "0",
        "--pictures",
        "16",
    ]
    status = main(
        ["compress", str(folder), "--recipe", str(recipe), "--data", "digits:train", "--eval", "digits:test",
         "--eval-limit", "20", "--no-bench", "--tune.precision", "fp32", *given, "--out", str(out)]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    model = comcat.load(out)
    record = model.comcat_record
    assert "similar" in {e.form for e in record.plan.sites.values()} and record.results.tuning["curve"]
    before = comcat.load_model(str(folder))
    assert comcat.count_macs(model, pictures(1, 1)[0]) <= 0.71 * comcat.count_macs(before, pictures(1, 1)[0])


@pytest.mark.parametrize(
    ("bad", "said"),
    [(["--how", "grid", "--keep", "0.01"], "at least"), (["--blocks", "block.1"], "nearest|expected")],
)  # fmt: skip
def test_absurd_wishes_are_told_in_one_line(folder, tmp_path, capsys, bad, said):
    status = main(["merge", str(folder), "--data", "digits:train", "--out", str(tmp_path / "m"), *bad])
    error = capsys.readouterr().err
    assert status != 0 and "Traceback" not in error and any(word in error for word in said.split("|"))
    assert not (tmp_path / "m").exists()

"""Pruning to a folder, from Python and as a user types it."""

import signal

import pytest
from safetensors.torch import save_file

import comcat
from comcat.cli import main
from comcat.errors import BudgetError, DataError, SettingsError, StoreError
from comcat.methods.gating.training import GatedTraining
from comcat.runs.claims import claimed

from ..models import tiny_vit

FAST = {"steps": 4, "batch_size": 8, "pictures": 8, "choices": 2}
TYPED = [word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_pruned_model_is_saved_and_reported_on(model, places, tmp_path):
    done = comcat.prune_to(
        tmp_path / "pruned", model, places[0], evaluation=places[1], reduce=0.4, name="/models/mine", **FAST
    )
    small = comcat.load(done.folder)
    results = small.comcat_record.results
    saved = 1 - comcat.count_parameters(small) / comcat.count_parameters(model)
    assert saved == pytest.approx(small.comcat_record.plan.made_by["saved"]) and saved >= 0.4
    assert results.before["parameters"] == comcat.count_parameters(model)
    assert results.after["top1"] is not None and results.agreement["count"] == 15
    assert results.judged_on and results.tuning["curve"]
    assert done.report.title == "mine, pruned" and done.report.model == "/models/mine"
    assert done.report.judged_on == results.judged_on
    assert done.report.before["latency_s"] > 0 and results.after["latency_s"] > 0
    page = (done.folder / "report.html").read_text()
    assert "Tuning" in page and "blocks.0.mlp" in page
    assert [p.name for p in tmp_path.iterdir()] == ["pruned"], "checkpoints are gone once the model is there"


def test_what_cannot_be_is_refused_before_the_work(model, places, tmp_path, monkeypatch):
    monkeypatch.setattr(GatedTraining, "step", lambda *_: pytest.fail("the work began"))
    asked = {"reduce": 0.4, **FAST}
    with pytest.raises(DataError, match="are both"):
        comcat.prune_to(tmp_path / "a", model, places[0], evaluation=places[0], **asked)
    with pytest.raises(BudgetError, match="at most"):
        comcat.prune_to(tmp_path / "a", model, places[0], **{**asked, "reduce": 0.99})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(SettingsError, match="is not empty"):
        comcat.prune_to(tmp_path / "full", model, places[0], **asked)
    with claimed(tmp_path / "a"), pytest.raises(StoreError, match="another run is writing to"):
        comcat.prune_to(tmp_path / "a", model, places[0], **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm folder of a small model."""
    import json

    place = tmp_path_factory.mktemp("model")
    save_file(tiny_vit(num_classes=10).state_dict(), place / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    cfg = {"input_size": [3, 32, 32], "mean": [0.3] * 3, "std": [0.4] * 3, "num_classes": 10}
    cfg |= {"interpolation": "bilinear", "crop_pct": 1.0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments}
    (place / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    return str(place)


def test_the_command_is_stopped_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "pruned"
    command = [
        "prune", folder, "--data", "digits:train", "--eval", "digits:test", "--eval-limit", "30", "--reduce", "0.4",
        "--out", str(out), "--device", "cpu", "--no-bench", *TYPED,
    ]  # fmt: skip
    original = GatedTraining.update

    def interrupted(self, number):
        signal.raise_signal(signal.SIGINT)
        return original(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(GatedTraining, "update", interrupted)
        assert main(command) == 130
    assert "goes on from the last checkpoint in" in capsys.readouterr().err and not out.exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "came back" in said and "parameters" in said and f"Saved to {out}" in said
    small = comcat.load(out)
    assert small.comcat_record.plan.made_by["rule"] == "gates"
    assert [p.name for p in tmp_path.iterdir()] == ["pruned"]


def test_a_bad_command_is_told_in_one_line(folder, tmp_path, capsys):
    common = ["prune", folder, "--data", "digits:train", "--device", "cpu", "--out", str(tmp_path / "small"), *TYPED]
    for more, said in (
        (["--reduce", "0.99"], "got reduce=0.99, but the sites that can shrink allow at most"),
        (["--sites", "blocs"], "leaves no site; did you mean"),
        (["--steps", "1"], "expected at least 2"),
        (["--eval", "digits:train"], "are both"),
    ):
        assert main([*common, *more]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("comcat: ") and said in error
    assert not list(tmp_path.iterdir())

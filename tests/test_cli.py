"""The commands as a user types them, on local models and pictures; errors are one line and a non-zero status."""

import json
import logging
import subprocess
import sys
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import comcat
from comcat.cli import main
from comcat.cli.terminal import plain_warnings

from .models import tiny_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm local-dir: what ``timm:`` models look like on disk."""
    place = tmp_path_factory.mktemp("model")
    model = tiny_vit(num_classes=10)
    save_file(model.state_dict(), place / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    cfg = {
        "input_size": [3, 32, 32],
        "mean": [0.3] * 3,
        "std": [0.4] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": 10,
    }
    (place / "config.json").write_text(
        json.dumps(
            {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments, "pretrained_cfg": cfg}
        )
    )
    return place


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    status = main(
        [
            "compress",
            str(folder),
            "--data",
            "digits:train",
            "--eval",
            "digits:test",
            "--eval-limit",
            "40",
            "--reduce",
            "0.5",
            "--pictures",
            "32",
            "--out",
            str(out),
            "--no-bench",
        ]
    )
    assert status == 0
    return out


def test_compress_writes_a_folder_that_loads(small, folder, capsys):
    assert {p.name for p in small.iterdir()} >= {
        "model.safetensors",
        "plan.json",
        "config.json",
        "README.md",
        "report.html",
    }
    model = comcat.load(small)
    assert comcat.count_parameters(model) <= 0.5 * comcat.count_parameters(comcat.load_model(str(folder)))
    page = (small / "report.html").read_text()
    assert "--reduce 0.5" in page or "reduce" in page


def test_inspect_tells_a_feed_forward_once(folder, small, capsys):
    """Its hidden units are the row; its layers are the alternative, so that no parameter is counted twice."""
    assert main(["inspect", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {row["site"]: row for row in said["sites"]}
    block = ["attn:qk", "attn:vo", "mlp:units"]
    assert list(rows) == [f"blocks.{i}.{site}" for i in range(2) for site in block] + ["head"]
    feedforward = rows["blocks.0.mlp:units"]
    assert (feedforward["kind"], feedforward["full_units"], feedforward["break_even_units"]) == ("units", 192, 191)
    assert feedforward["parameters"] == 48 * 192 * 2 + 192 + 48
    ranks = {layer["site"]: layer["break_even_rank"] for layer in feedforward["layers"]}
    assert ranks == {"blocks.0.mlp.fc1": 38, "blocks.0.mlp.fc2": 38}  # below 48 · 192 / (48 + 192)
    assert [name for name, row in rows.items() if row["kept_by_default"]] == ["head"]
    model = comcat.load_model(str(folder))
    held = sum(
        p.numel() for n, p in model.named_parameters() if n.partition(".")[0] in ("blocks", "head") and ".norm" not in n
    )
    assert sum(row["parameters"] for row in rows.values()) == held < said["parameters"]
    assert rows["blocks.0.attn:qk"]["full_rank"] == 16 and "rank_for_90_percent" in rows["blocks.0.attn:qk"]


def test_inspect_prints_what_can_shrink_and_what_stays(folder, small, capsys):
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("blocks.0.mlp:units"))
    assert "feed-forward" in line and "192 units" in line and "or ranks: fc1 up to 38, fc2 up to 38" in line
    assert "keeps its size by default" in next(line for line in shown.splitlines() if line.startswith("head"))
    assert "490 of them are in classifier heads" in shown and "--head" in shown
    assert "hold 90 % of the energy are by the weights alone, a weak guide" in shown
    assert main(["inspect", str(small)]) == 0
    assert "already compressed" in capsys.readouterr().out


def test_inspect_tells_of_tokens(folder, small, tmp_path, capsys):
    assert main(["inspect", str(folder)]) == 0
    said = (
        "2 blocks can run on fewer tokens (comcat merge): 16 of a picture of 32 × 32 (4 × 4), one in front that stays."
    )
    assert said in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens["blocks"] == ["blocks.0", "blocks.1"] and (tokens["grid"], tokens["in_front"]) == ([4, 4], 1)
    model = comcat.load_model(str(folder))
    merged = comcat.compress(model, plan=comcat.merge(model, keep=0.7, example=torch.zeros(1, 3, 32, 32)))
    comcat.save(merged, tmp_path / "merged")
    assert main(["inspect", str(tmp_path / "merged")]) == 0
    assert "1 block runs on fewer tokens: blocks.1 6 of 16." in capsys.readouterr().out


def test_inspect_says_why_no_block_can_run_on_fewer_tokens(tmp_path, capsys):
    import timm

    place, shape = tmp_path / "beit", {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    place.mkdir()
    save_file(
        timm.create_model("beit_base_patch16_224", num_classes=3, **shape).state_dict(), place / "model.safetensors"
    )
    cfg = {"input_size": [3, 16, 16], "num_classes": 3}
    config = {"architecture": "beit_base_patch16_224", "num_classes": 3, "model_args": shape, "pretrained_cfg": cfg}
    (place / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(place)]) == 0
    assert "No block can run on fewer tokens: does not accept fewer tokens" in capsys.readouterr().out


def test_inspect_says_why_a_layer_of_a_feed_forward_has_no_ranks(tmp_path, capsys):
    """A feed-forward this narrow can lose units, while factors of its layers always cost more."""
    import timm

    place, shape = tmp_path / "narrow", {"img_size": 16, "patch_size": 8, "embed_dim": 2, "depth": 1, "num_heads": 1}
    place.mkdir()
    cfg = {"input_size": [3, 16, 16], "num_classes": 3}
    arguments = {**shape, "mlp_ratio": 1.0}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    save_file(model.state_dict(), place / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": arguments, "pretrained_cfg": cfg}
    (place / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(place), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    feedforward = next(row for row in said["sites"] if row["kind"] == "units")
    assert feedforward["full_units"] == 2
    reasons = {layer["site"]: layer["refused"] for layer in feedforward["layers"]}
    assert set(reasons) == {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} and all("so small" in r for r in reasons.values())
    assert not {row["site"] for row in said["refused"]} & set(reasons)


def test_eval_and_bench(folder, small, capsys):
    assert main(["eval", str(small), "--data", "digits:test", "--limit", "30", "--against", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["count"] == 30 and 0 <= said["agreement"] <= 100
    assert main(["bench", str(small), "--against", str(folder), "--batch-size", "2", "--repeats", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"][str(small)]["parameters"] < said["models"][str(folder)]["parameters"]
    assert main(["eval", str(small), "--data", "digits:test", "--limit", "10"]) == 0
    assert "top-1" in capsys.readouterr().out


def test_a_plan_can_be_used_again(folder, small, tmp_path):
    out = tmp_path / "again"
    assert (
        main(
            [
                "compress",
                str(folder),
                "--data",
                "digits:train",
                "--plan",
                str(small / "plan.json"),
                "--reduce",
                "0.3",
                "--pictures",
                "32",
                "--out",
                str(out),
                "--no-bench",
            ]
        )
        == 0
    )
    assert (
        json.loads((out / "plan.json").read_text())["sites"] == json.loads((small / "plan.json").read_text())["sites"]
    )


def test_a_recipe_and_an_option_that_wins(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder}\ndata: digits:train\nreduce: 0.2\npictures: 16\nonly: [qk, vo]\nbench: false\nstatistic: "
        f"weights\n"
    )
    out = tmp_path / "out"
    assert main(["compress", "--recipe", str(recipe), "--reduce", "0.1", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["reduce"] == 0.1 and config["settings"]["only"] == ["qk", "vo"]


def max_drop(folder, out) -> list[str]:
    given = ["compress", str(folder), "--data", "digits:train", "--max-drop", "30", "--pictures", "16"]
    return [*given, "--out", str(out), "--no-bench"]


def test_max_drop_never_reads_the_evaluation_set_to_decide(folder, tmp_path, monkeypatch):
    """The same plan whatever the evaluation set is."""
    plans = []
    for i, data in enumerate(("digits:test", None)):
        out = tmp_path / str(i)
        asked = max_drop(folder, out)
        assert main([*asked, *(["--eval", data, "--eval-limit", "20"] if data else [])]) == 0
        plans.append(json.loads((out / "plan.json").read_text()))
    assert plans[0] == plans[1]


def test_max_drop_is_not_judged_on_the_pictures_that_decided(folder, tmp_path, monkeypatch):
    from comcat.workflows import compress

    seen, batches = [], compress.batches

    def watched(pictures, *how, **more):
        seen.append(pictures)
        return batches(pictures, *how, **more)

    monkeypatch.setattr(compress, "batches", watched)
    assert main(max_drop(folder, tmp_path / "small")) == 0
    deciding, calibration, judged = ({s.key for s in pictures} for pictures in seen[:3])
    assert len(calibration) == 16 and len(deciding) > 50 and len(judged) > 50
    assert not (deciding & judged or calibration & (deciding | judged))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "timm:deit_smal_patch16_224"], "did you mean 'deit_small_patch16_224'"),
        (["inspect", "tim:deit_small_patch16_224"], "timm:"),
        (["inspect", "./nowhere"], "nowhere"),
        (["compress", "FOLDER", "--data", "./nothing", "--reduce", "0.5", "--out", "OUT"], "nothing"),
        (["compress", "FOLDER", "--data", "EMPTY", "--reduce", "0.5", "--out", "OUT"], "picture"),
        (["compress", "FOLDER", "--data", "digits:train", "--out", "OUT"], "how far"),
        (["compress", "FOLDER", "--data", "digits:train", "--reduce", "0.99", "--pictures", "16", "--out", "OUT"],
            "at most"),
        (["compress", "FOLDER", "--data", "digits:train", "--eval", "digits:train", "--reduce", "0.5", "--out", "OUT"],
            "both"),
        (["compress", "FOLDER", "--data", "digits:train", "--eval", "digits", "--reduce", "0.5", "--pictures", "16",
            "--out", "OUT"], "also in the evaluation set"),
        (["compress", "FOLDER", "--data", "digits:train", "--reduce", "0.5", "--out", "FOLDER"], "not empty"),
        (["compress", "FOLDER", "--data", "digits:train", "--reduce", "0.5", "--plan", "OUT/plan.json", "--out", "OUT"],
            "no plan"),
        (["compress", "FOLDER", "--data", "digits:train", "--reduce", "0.5", "--out", "OUT", "--device", "cuda:99"],
            "device"),
        (["compress", "FOLDER", "--data", "digits:train", "--reduce", "0.5", "--out", "BLOCKED"],
            "nothing can be written"),
        (["inspect", "FOLDER", "--device", "meta"], "holds no values"),
        (["inspect", "FOLDER", "--seed", "99999999999999999999999"], "seed=99999999999999999999999, expected a whole "
            "number from 0"),
        (["eval", "FOLDER", "--data", "EMPTY"], "picture"),
        (["compress", "--recipe", "OUT.yaml", "--out", "OUT"], "no recipe"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, said, folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {
        "FOLDER": str(folder),
        "OUT": str(tmp_path / "out"),
        "EMPTY": str(empty),
        "BLOCKED": str(folder / "config.json" / "out"),
        "OUT/plan.json": str(tmp_path / "out" / "plan.json"),
        "OUT.yaml": str(tmp_path / "no.yaml"),
    }
    status = main([places.get(a, a) for a in arguments])
    shown = capsys.readouterr().err
    message = [line for line in shown.splitlines() if line.startswith("comcat: ")]
    assert status == 1 and len(message) == 1 and said in message[0], shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--redce", "0.5"], "--redce"),
        (["--reduce", "5"], "got reduce=5.0, expected a number above 0 to below 1"),
        (["--multiple", "0"], "got multiple=0, expected a whole number from 1"),
        (["--statistic", "los"], "los"),
        (["--pictures", "many"], "many"),
        (["--batch-size", "0"], "got batch_size=0, expected a whole number from 1"),
    ],
)
def test_an_option_that_does_not_fit_fails_with_what_was_expected(options, said, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(folder), "--data", "digits:train", "--out", "out", *options])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2 and said in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "x", "--threads", "0"], "got threads=0"),
        (["bench", "x", "--batch-size", "0"], "got batch_size=0"),
        (["eval", "x", "--data", "y", "--limit", "0"], "got limit=0"),
    ],
)
def test_numbers_of_other_verbs_are_checked_as_well(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "usage: comcat VERB"),
        (["compres"], 2, "got 'compres', expected one of inspect, compress, "),
        (["compres"], 2, "did you mean 'compress'"),
        (["--help"], 0, "make a model smaller and faster"),
        (["-h"], 0, "usage: comcat VERB"),
        (["--version"], 0, comcat.__version__),
    ],
)
def test_without_a_verb_usage_or_what_is_wrong_is_said(arguments, status, said, capsys):
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert said in (shown.err if status else shown.out)


def test_broken_pictures_are_skipped_counted_and_said(folder, tmp_path, capsys):
    data = tmp_path / "data"
    for c in "ab":
        (data / c).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                data / c / f"{i}.png"
            )
    (data / "a" / "0.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning):
        status = main(
            [
                "compress",
                str(folder),
                "--data",
                str(data),
                "--reduce",
                "0.3",
                "--out",
                str(tmp_path / "o"),
                "--no-bench",
            ]
        )
    assert status == 0
    assert "1 unreadable picture" in capsys.readouterr().out


def test_without_pretrained_weights(tmp_path):
    assert (
        main(["bench", "timm:vit_tiny_patch16_224", "--no-pretrained", "--batch-size", "1", "--repeats", "1", "--json"])
        == 0
    )


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "comcat", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"comcat {comcat.__version__}"


@pytest.mark.parametrize(
    "name", ["comcat", "comcat.diffusion", "comcat.scoring", "comcat.methods.search", "comcat.methods.gating"]
)
def test_every_public_name_exists(name):
    package = import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def test_a_function_stands_before_a_module_of_its_name():
    assert callable(comcat.calibrate) and callable(comcat.search)


def test_the_seed_decides(folder, tmp_path):
    weights = []
    for i in range(2):
        out = tmp_path / str(i)
        assert (
            main(
                [
                    "compress",
                    str(folder),
                    "--data",
                    "digits:train",
                    "--reduce",
                    "0.4",
                    "--pictures",
                    "16",
                    "--out",
                    str(out),
                    "--no-bench",
                    "--seed",
                    "5",
                ]
            )
            == 0
        )
        weights.append(comcat.load(out).state_dict())
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_eval_without_labels_says_why(folder, tmp_path, capsys):
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    assert main(["eval", str(folder), "--data", str(tmp_path)]) == 0
    assert f"No accuracy: {tmp_path} has no labels" in capsys.readouterr().out


def test_warnings_are_one_line_without_a_file_and_a_hub_that_is_away_is_told_once():
    hub, said = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    hub.addHandler(handler)
    before = warnings.formatwarning
    try:
        with plain_warnings():
            told = warnings.formatwarning(UserWarning("one\n  thing"), UserWarning, "/home/me/module.py", 12)
            for i in range(1, 6):
                hub.warning("'timed out' thrown while requesting HEAD https://hub/config.json")
                hub.warning(f"Retrying in 1s [Retry {i}/5].")
        hub.warning("Retrying in 1s [Retry 1/5].")
    finally:
        hub.removeHandler(handler)
    assert told == "comcat: warning: one thing\n" and warnings.formatwarning is before
    assert said == ["Retrying in 1s [Retry 1/5]."] * 2

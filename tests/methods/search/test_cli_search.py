"""``comcat search``, and ``compress`` that searches and tunes, as a user types them."""

import json
import signal

import pytest
from safetensors.torch import save_file

import comcat
from comcat.cli import main
from comcat.methods.search.run import Search
from tests.models import tiny_vit

FAST = [
    "--rounds",
    "2",
    "--rank-steps",
    "2",
    "--weight-steps",
    "1",
    "--batch-size",
    "8",
    "--pictures",
    "16",
    "--statistic",
    "activation",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save_file(tiny_vit(num_classes=10).state_dict(), place / "model.safetensors")
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
        json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments,
            "pretrained_cfg": cfg})
    )  # fmt: skip
    return str(place)


def test_search_writes_a_plan_that_compress_applies(folder, tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "small"
    assert (
        main(
            [
                "search",
                folder,
                "--data",
                "digits:train",
                "--eval",
                "digits:test",
                "--reduce",
                "0.5",
                "--out",
                str(plan),
                *FAST,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "held-out top-1" in said and "evaluation pictures is among" in said
    assert comcat.Plan.load(plan).made_by["rule"] == "search"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "checkpoints are gone once the plan is there"
    assert (
        main(
            [
                "compress",
                folder,
                "--data",
                "digits:train",
                "--plan",
                str(plan),
                "--pictures",
                "16",
                "--no-bench",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert comcat.count_parameters(comcat.load(out)) <= 0.5 * comcat.count_parameters(tiny_vit(num_classes=10))
    assert "Search of ranks" in (out / "report.html").read_text()


def test_compress_searches_and_tunes_in_one_go_or_two(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "small"
    command = ["compress", folder, "--data", "digits:train", "--eval", "digits:test", "--eval-limit", "40", "--reduce",
        "0.5", "--ranks", "search", "--pictures", "16",
               "--search.rounds", "1", "--search.rank-steps", "2", "--search.batch-size", "8", "--tune.steps", "2",
               "--tune.batch-size", "8", "--no-bench", "--out", str(out)]  # fmt: skip
    learn = Search._learn

    def interrupted(self, number, *more):
        signal.raise_signal(signal.SIGINT)
        return learn(self, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_learn", interrupted)
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "comcat: interrupted after step 1 of 2; the last good checkpoint is " in said
    assert "step-00000001; the same command goes on from there" in said and not out.exists()
    assert main(command) == 0
    small = comcat.load(out)
    assert small.comcat_record.plan.made_by["rule"] == "search"
    assert small.comcat_record.results.tuning["settings"]["steps"] == 2
    page = (out / "report.html").read_text()
    assert "Tuning" in page and "Search of ranks" in page
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "plan"], "expected a file to write the plan to"),
        (["--out", "plan.json", "--eval", "digits:train"], "evaluation set are both"),
        (["--out", "plan.json", "--eval", "digits"], "the evaluation set digits shares 1442 of its"),
        (["--out", "plan.json", "--reduce", "0.99"], "at most 0."),
        (["--out", "plan.json", "--candidates", "30", "--reduce", "0.9"], "the smallest candidates save at most"),
    ],
)
def test_bad_searches_are_told_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["search", folder, "--data", "digits:train", *FAST, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("comcat: ") and said in error
    assert not list(tmp_path.glob("plan*.json"))


def test_a_plan_that_is_there_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{}")
    assert main(["search", folder, "--data", "digits:train", *FAST, "--out", str(tmp_path / "plan.json")]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_compress_refuses_what_does_not_go_together(folder, tmp_path, capsys, monkeypatch):
    common = ["compress", folder, "--data", "digits:train", "--pictures", "16", "--out", str(tmp_path / "small")]
    assert main([*common, "--max-drop", "1", "--ranks", "search"]) == 1
    assert "needs reduce, the share to save" in capsys.readouterr().err
    other = comcat.Plan(sites={"blocks.0.attn:qk": comcat.SitePlan(keep=4, full=64)})
    other.save(tmp_path / "other.json")
    assert main([*common, "--plan", str(tmp_path / "other.json")]) == 1
    assert "blocks.0.attn:qk: the plan was made for a full rank of 64, the model has 16" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*common, "--reduce", "0.5"]) == 1
    assert "works in one process" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()

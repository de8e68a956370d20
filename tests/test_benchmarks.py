"""The scripts of the paper's tables and the benchmarks run, on a tiny model and the built-in digits."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .models import tiny_vit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TABLES, TRAINED = ("table1", "table3", "table4"), ("table2", "figure6", "figure7", "figures89")
TUNED = (
    "train_cifar10",
    "tuning_throughput",
    "time_by_operation",
    "accuracy",
    "real",
    "factorize",
    "prediction",
    "search_step",
    "token_overhead",
    "nuclei",
)


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
    ours = (*TABLES, *TRAINED, *TUNED, "cdcp", "search_runs", "tables", "trained", "figures12", "common")
    for name in [n for n in sys.modules if n.split(".")[0] in ours]:
        del sys.modules[name]


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


@pytest.mark.parametrize(("name", "rows"), list(zip(TABLES, (9, 2, 10), strict=True)))
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


@pytest.fixture
def small(folder, tmp_path) -> list[str]:
    """A recipe's search and tuning, but in a few steps."""
    options = {
        "model": folder, "data": "digits:train", "eval": "digits:test", "out": tmp_path / "out",
        "recipe": "deit-small-half", "limit": 24,
        "eval-limit": 20, "batch-size": 8, "pictures": 8, "rounds": 2, "rank-steps": 2, "weight-steps": 1, "epochs": 1,
        "workers": 0, "precision": "fp32", "features": "all",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _written(scripts, name):
    return json.loads(next(scripts.rglob(f"paper-{name}.json")).read_text())


def test_table2(scripts, folder, small, tmp_path):
    import table2

    rows = table2.main(small)
    assert sum("published" in name for name in rows) == len(table2.PUBLISHED)
    top1, macs, parameters, untuned = rows[f"{folder.name}, deit-small-half"]
    assert 0 <= top1 <= 100 and 0 <= untuned <= 100 and macs > 0
    assert parameters >= 49.98
    written = _written(scripts, "table2")
    assert written["rows"].keys() == rows.keys()
    settings = written["settings"]["deit-small-half"]
    assert (settings["search"]["rank_steps"], settings["search"]["beta"]) == (2, 1.5)
    assert (settings["tune"]["epochs"], settings["tune"]["distillation"], settings["tune"]["clip"]) == (1, "hard", None)
    page = (tmp_path / "out" / folder.name / "deit-small-half.html").read_text()
    assert all(f">{words}</" in page for words in ("Search of ranks", "Tuning", "Compressed", "Tuned"))


def test_figure6(scripts, folder, small, tmp_path):
    import figure6

    rows = figure6.main(small)
    assert rows["search"][0] < rows["as it was"][0] and rows["uniform"][0] < rows["as it was"][0]
    assert (tmp_path / "out" / folder.name / "figure6.svg").stat().st_size > 1000
    series = _written(scripts, "figure6")["series"]
    labels = {s["label"] for s in series}
    assert labels == {"search", "search, held-out training pictures", "uniform"}
    ends = {s["label"]: s["x"][-1] for s in series if s["y_label"].startswith("parameters")}
    # five steps of eight pictures of 24, then an epoch
    assert ends == {"search": pytest.approx(5 * 8 / 24 + 1), "uniform": pytest.approx(1)}


def test_figure7(scripts, folder, small, tmp_path):
    import figure7

    rows = figure7.main([*small, "--beta", "0.5", "2"])
    assert list(rows) == ["β = 0.5", "β = 2"]
    assert all(row[2] >= 49.98 for row in rows.values())
    assert (tmp_path / "out" / folder.name / "figure7.svg").stat().st_size > 1000
    assert {s["label"] for s in _written(scripts, "figure7")["series"]} == {"β = 0.5", "β = 2", "budget"}


def test_figures89(scripts, folder, small, tmp_path, capsys):
    import figures89

    out = tmp_path / "out" / folder.name
    found = figures89.main(small)
    assert any(rank is not None and rank < full for rank, full in found.values())
    assert (out / "ranks-deit-small-half.svg").stat().st_size > 1000
    plan = out / "deit-small-half-plan.json"
    again = figures89.main(["--model", str(folder), "--plan", str(plan), "--out", str(tmp_path / "again")])
    assert list(again.values()) == list(found.values())
    with pytest.raises(SystemExit):
        figures89.main(["--model", str(folder)])
    assert "--plan" in capsys.readouterr().err


def test_a_model_is_trained_and_loads(scripts, tmp_path):
    import train_cifar10

    from comcat import count_parameters, load_model

    words = (
        "--data digits:train --eval digits:test --limit 40 --epochs 1 --batch-size 16 --depth 1 --workers 0 "
        "--precision fp32"
    )
    train_cifar10.main([*words.split(), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "model")])
    written = json.loads(next(scripts.rglob("train-deit_tiny_cifar10.json")).read_text())
    assert 0 <= written["top1"] <= 100 and written["images_per_second"] > 0
    assert count_parameters(load_model(str(tmp_path / "model"))) == written["parameters"]


def test_long_searches_end_somewhere_with_weights_kept_and_derived(scripts, folder, tmp_path):
    import search_runs

    asked = {
        "model": folder, "data": "digits:train", "eval": "digits:test", "pictures": 16, "judged": 20, "rounds": 2,
        "rank-steps": 1, "weight-steps": 1, "limit": 200, "reduce": 0.3, "work": tmp_path / "work",
    }  # fmt: skip
    search_runs.main([word for name, value in asked.items() for word in (f"--{name}", str(value))])
    rows = json.loads(next(scripts.rglob("search-runs.json")).read_text())["rows"]
    assert [row["run"] for row in rows] == list(search_runs.RUNS) and all(row["steps"] == 3 for row in rows)
    for row in rows:
        assert row["saved"] >= 0.3 and all(0 <= row[k] <= 100 for k in ("closed", "kept", "derived"))
        assert row["moved"] == sum(a != b for a, b in row["sizes"].values()) and row["sizes"]


def test_the_throughput_of_tuning(scripts, folder):
    import tuning_throughput

    words = "--data digits:train --steps 2 --repeats 2 --batch-size 8 --precision fp32 --model"
    tuning_throughput.main([*words.split(), str(folder)])
    rows = json.loads(next(scripts.rglob("throughput-of-tuning.json")).read_text())["rows"]
    assert [row["tuning"] for row in rows] == ["alone", "with a teacher"]
    assert all(row["bare"] > 0 and len(row["ratios"]) == 2 for row in rows)


def test_time_by_operation(scripts):
    import time_by_operation

    time_by_operation.main("--model test_vit --reduce 0.3 --batch 1 --repeats 1".split())
    rows = json.loads(next(scripts.rglob("time-by-operation-*.json")).read_text())["rows"]
    assert list(rows) == ["dense", "uniform", "default"]
    assert all(rows["dense"][kind] > 0 for kind in ("products", "attention", "rest"))
    assert rows["dense"]["most_of_mac_ratio"] == pytest.approx(1) and 0 < rows["uniform"]["most_of_mac_ratio"] < 1
    assert time_by_operation.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"


def test_what_merging_costs(scripts):
    import token_overhead
    from real.page import token_overhead as told

    token_overhead.main(["--tiny", "--rounds", "3", "--batch", "2", "--device", "cpu"])
    result = json.loads(next(scripts.rglob("token-overhead.json")).read_text())
    assert list(result["rows"]) == ["similar", "grid"] and not list(scripts.rglob("*.tmp"))
    for row in result["rows"].values():
        assert 0 < row["low"] <= row["share"] <= row["high"] and row["reached"] == (row["share"] <= row["goal"])
    assert "| windows of the grid |" in told(result)


def test_merging_is_timed_without_the_blocks_that_run_in_it(scripts, monkeypatch):
    import token_overhead

    import comcat

    clock = [0.0]

    def tick():
        clock[0] += 1  # each look at the clock takes a second, each block a thousand
        return clock[0]

    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    comcat.apply_(model, comcat.merge(model, example=x[:1], keep=0.6))
    whole, merged = model(x), len([m for m in model.modules() if hasattr(m, "token_reduction")])
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda m, args, out: clock.__setitem__(0, clock[0] + 1000))
    monkeypatch.setattr(token_overhead.time, "perf_counter", tick)
    call, spent = token_overhead.timed(model, x)
    call()
    assert merged and spent == [2.0 * merged] and torch.equal(model(x), whole)


def test_the_segmenter_of_nuclei_in_tiny(scripts, tmp_path):
    import nuclei
    from real.page import nuclei as told

    given = ["--tiny", "--pictures", "8", "--steps", "2", "--rounds", "1", "--batch", "4", "--reduce", "0.2",
             "--precision", "fp32", "--device", "cpu", "--work", str(tmp_path / "work")]  # fmt: skip
    first = nuclei.main(given)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    assert len(kept) == 4
    again = nuclei.main(given)  # goes on from the rows that are there
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()} == kept
    assert [r["before"] for r in again["rows"]] == [r["before"] for r in first["rows"]]
    rows = {r["row"]: r for r in first["rows"]}
    assert rows["dense"]["before"] == first["dense"] and rows["dense"]["macs"] == 1
    assert (
        all(rows[name]["macs"] <= 0.801 for name in ("tokens", "channels", "all")) and rows["tokens"]["parameters"] == 1
    )
    written = json.loads(next(scripts.rglob("nuclei-tiny.json")).read_text())
    assert "| ranks and units |" in told(written)


def test_a_kept_result_is_of_the_same_settings(scripts, tmp_path):
    import common

    made = []

    def make():
        made.append(len(made))
        return {"number": made[-1]}

    path = tmp_path / "kept" / "run.json"
    assert common.kept_result(path, {"lr": 0.1, "only": ("a",)}, make) == {"number": 0}
    assert common.kept_result(path, {"lr": 0.1, "only": ("a",)}, make) == {"number": 0}
    assert common.kept_result(path, {"lr": 0.2, "only": ("a",)}, make) == {"number": 1}
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_accuracy_keeps_the_head_whatever_the_rule(scripts, folder, monkeypatch):
    import accuracy

    judge, plans = accuracy.Bench.judge, []

    def judged(self, plan, *given, **keywords):
        plans.append(plan)
        return judge(self, plan, *given, **keywords)

    monkeypatch.setattr(accuracy.Bench, "judge", judged)
    given = ["--model", str(folder), "--train", "digits:train", "--validation", "digits:test", "--pictures", "8"]
    asked = [*given, "--seeds", "2", "--only", "model", "--shares", "0.3"]
    result = accuracy.main(asked)
    (row,) = result["rows"]
    assert len(plans) == 6 + 2 * 8 and all(plan.sites and "head" not in plan.sites for plan in plans)
    assert all((v["std"] is None) == (len(v["values"]) == 1) for v in row["top1"].values())
    assert {"weights uniform", "loss waterfill", "loss waterfill, units too"} <= set(row["top1"])
    written = json.loads(next(scripts.rglob("accuracy.json")).read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"])) and not list(scripts.rglob(".*partial*"))


def test_what_was_judged_is_not_judged_again(scripts, folder, monkeypatch):
    import accuracy

    given = ["--model", str(folder), "--train", "digits:train", "--validation", "digits:test", "--pictures", "8"]
    asked = [*given, "--quick", "--only", "ffn", "--shares", "0.3", "--no-write"]
    first = accuracy.main(asked)
    monkeypatch.setattr(accuracy, "right", None)
    assert accuracy.main(asked) == first
    (row,) = accuracy.main([*asked, "--methods", "weights uniform"])["rows"]
    assert list(row["top1"]) == ["weights uniform", accuracy.DEFAULTS["ffn"]]
    with pytest.raises(SystemExit, match="got method 'weight', expected one of weights uniform"):
        accuracy.main([*asked, "--methods", "weight"])


def test_prediction_has_a_spread_over_calibration_samples(scripts, folder):
    import prediction

    given = ["--model", str(folder), "--train", "digits:train", "--validation", "digits:test", "--pictures", "20"]
    result = prediction.main([*given, "--calibration", "8", "--seeds", "2", "--layers", "1", "--shares", "0.2", "0.4"])
    assert [r[0] for r in result["together"]] == [0.2, 0.4]
    assert [r[0] for r in result["alone"]] == [f"blocks.1.{part}" for part in prediction.ALONE]
    for row in (*result["together"], *result["alone"]):
        assert all(len(values) == 2 and min(values) >= 0 for values in row[-2:])
    predicted = [sum(r[1]) for r in result["together"]]
    assert predicted == sorted(predicted) and predicted[0] > 0
    assert all(-1 <= v <= 1 for near in result["cosine_to_occurring_moment"].values() for v in near.values())


def test_thin_qr_factorises_a_product(scripts):
    import factorize

    left, right = torch.randn(2, 3, 20, 5, dtype=torch.float64).unbind()
    a, b = factorize.thin_qr(left, right)
    torch.testing.assert_close(a @ b.mT, left @ right.mT)
    best = torch.linalg.svdvals(left @ right.mT)[:, 2:].square().sum(-1).sqrt()
    torch.testing.assert_close(torch.linalg.norm((a[..., :2] @ b[..., :2].mT - left @ right.mT), dim=(-2, -1)), best)
    asked = ["--model", "test_vit", "--repeats", "1", "--dense-repeats", "1", "--heads", "1"]
    result = factorize.main(asked)
    assert result["largest_relative_difference"] < 1e-4
    assert set(result["ratios"]) == {"thin QR", "thin QR, float32", "dense, torch", "dense, numpy"}
    assert (
        json.loads(next(scripts.rglob("factorize-*.json")).read_text())["ratio_quartiles"].keys()
        == result["ratios"].keys()
    )


def test_a_step_of_search_is_compared_with_one_layer_a_candidate(scripts):
    import search_step

    asked = ["--model", "test_vit", "--batch", "1", "--grid", "2", "--repeats", "1", "--no-write"]
    assert search_step.main(asked).keys() == set(search_step.WAYS)


def test_the_memory_of_a_step_of_search_is_its_own(scripts):
    """Other tensors of the process are not its: neither large ones nor the sizeless ones that an export leaves."""
    import search_step
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    asked = argparse.Namespace(model="test_vit", batch=1, grid=2, device="cpu", dtype="float32")
    alone = search_step.peak_memory(asked, "search ranks")
    sizeless = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(3, 4), static_shapes=False)
    others = [torch.ones(10**7), sizeless]
    assert search_step.peak_memory(asked, "search ranks") == alone > 0
    del others


def test_a_result_names_files_without_their_place(scripts):
    import common

    given = ["--model", "/models/vit/", "--data", "/data/train.parquet", "--eval", "digits:test", "--limit", "3"]
    asked = common.settings_of(common.training_parser(None, "any").parse_args(given))
    assert json.loads(json.dumps(asked)) == asked and asked["limit"] == 3
    assert [asked[key] for key in ("model", "data", "eval")] == ["vit", "train.parquet", "digits:test"]


def test_trained_channels_beside_the_closed_form(scripts, folder, tmp_path):
    import cdcp

    asked = {"model": folder, "data": "digits:train", "eval": "digits:test", "limit": 140, "pictures": 8, "choices": 2}
    asked |= {"savings": 0.4, "seeds": 1, "precision": "fp32", "device": "cpu", "work": tmp_path / "runs"}
    cdcp.main([word for name, value in asked.items() for word in (f"--{name}", str(value))])
    written = json.loads(next(scripts.rglob("cdcp.json")).read_text())
    assert [row["way"] for row in written["rows"]] == list(cdcp.WAYS)
    assert all(row["saved"] >= 0.4 and 0 <= row["top1_mean"] <= 100 for row in written["rows"])


def test_models_of_other_libraries_are_named_before_a_colon(scripts):
    import common

    model = common.vit("torchvision:squeezenet1_1", num_classes=7)
    assert type(model).__module__.startswith("torchvision.") and not model.training
    with pytest.raises(ValueError, match="torchvision:NAME or open_clip:NAME"):
        common.vit("nowhere:model")

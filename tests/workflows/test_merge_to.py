"""``comcat merge`` as a user types it."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import comcat
from comcat.cli import main
from comcat.errors import ModelError, StoreError
from comcat.tuning.settings import TuneSettings
from comcat.tuning.step import Training

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


def test_keep_of_one_measures_nothing_and_changes_nothing(folder, tmp_path, capsys, monkeypatch):
    from comcat.methods.merging import merge as merging
    from comcat.workflows import compress as workflow

    def never(*args, **kwargs):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(merging, "Meter", never)
    monkeypatch.setattr(merging, "find_trunk", never)
    monkeypatch.setattr(workflow, "timings", never)
    out = tmp_path / "same"
    status = main(
        ["merge", str(folder), "--data", "digits:train", "--keep", "1", "--eval", "digits:test", "--eval-limit", "8",
         "--out", str(out)]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "nothing was merged" in captured.out and "changes nothing" in (out / "report.html").read_text()
    x = pictures(4, 4)[0]
    assert torch.equal(comcat.load(out)(x), comcat.load_model(str(folder))(x))
    assert comcat.merge(tiny_vit(), keep=1.0).sites == {}


WITH_TOKENS = ["--forms", "ranks,units,tokens", "--budget", "macs", "--reduce", "0.3"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([*WITH_TOKENS, "--stock"], "stock"),
        ([*WITH_TOKENS, "--only", "qk"], "only=qk"),
        ([*WITH_TOKENS, "--only", "tokens"], "only=tokens"),
        ([*WITH_TOKENS, "--only", "blocks.0.attn"], "names no whole block"),
    ],
)
def test_what_tokens_do_not_go_with_is_told_before_any_picture_is_read(
    folder, tmp_path, capsys, monkeypatch, given, said
):
    from comcat.methods import prepare
    from comcat.workflows import compress as workflow

    def never(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr(prepare, "calibrate", never)
    monkeypatch.setattr(workflow, "compress_", never)
    try:
        status = main(["compress", str(folder), "--data", "digits:train", "--out", str(tmp_path / "m"), *given])
    except SystemExit as end:  # what the words alone say is told while they are read
        status = end.code
    error = capsys.readouterr().err
    assert status != 0 and said in error and "Traceback" not in error
    assert not (tmp_path / "m").exists()


def test_a_plan_with_tokens_makes_no_stock_checkpoint(folder, tmp_path, capsys):
    plan = comcat.merge(comcat.load_model(str(folder)), example=pictures(1)[0], keep=0.6)
    plan.save(tmp_path / "plan.json")
    wished = ["--plan", str(tmp_path / "plan.json"), "--stock"]
    status = main(["compress", str(folder), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "m"), *wished])
    error = capsys.readouterr().err
    assert status != 0 and "fewer tokens" in error  # before the pictures are looked for
    with pytest.raises(comcat.errors.SettingsError, match="stock"):
        comcat.merge_to(tmp_path / "m", str(folder), "digits:train", way={"stock": True})


def test_tokens_become_fewer_in_the_blocks_that_are_named():
    small = comcat.compress(
        tiny_vit(depth=3),
        pictures(16, 8),
        reduce=0.25,
        budget="macs",
        forms="units,tokens",
        only=("blocks.1", "blocks.2"),
    )
    fewer = {n.removesuffix(":tokens") for n in small.comcat_record.plan.sites if n.endswith(":tokens")}
    assert fewer and fewer <= {"blocks.1", "blocks.2"}


def test_a_stopped_run_goes_on_with_the_same_tokens_alone(folder, tmp_path, monkeypatch):
    few = comcat.open_pictures("digits:train").take(24, 0)
    way = {"bench": False, "eval_limit": 8, "tune": TuneSettings(steps=4, batch_size=4)}

    def run(name, keep, **more):
        merge_to = comcat.merge_to
        return merge_to(
            tmp_path / name, str(folder), few, evaluation="digits:test", keep=keep, pictures=4, way=way | more
        )

    step = Training.step

    def interrupted(self, number, watch):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, watch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="step 3 of 4"):
        patched.setattr(Training, "step", interrupted)
        run("stopped", 0.6)
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(StoreError, match=r"other settings: student was .*--restart"):
        run("stopped", 0.8)  # weights are the same, but not what is computed with them
    stopped, whole = run("stopped", 0.6).model, run("whole", 0.6).model
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), whole.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".run")] == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [(["--how", "grid", "--keep", "0.01"], "at least"), (["--blocks", "block.1"], "nearest|expected")],
)  # fmt: skip
def test_absurd_wishes_are_told_in_one_line(folder, tmp_path, capsys, bad, said):
    status = main(["merge", str(folder), "--data", "digits:train", "--out", str(tmp_path / "m"), *bad])
    error = capsys.readouterr().err
    assert status != 0 and "Traceback" not in error and any(word in error for word in said.split("|"))
    assert not (tmp_path / "m").exists()


def test_clip_whose_blocks_must_be_given_a_mask(tmp_path, capsys):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    given = ["--keep", "0.7", "--pictures", "4", "--eval-limit", "8", "--no-bench", "--out", str(tmp_path / "out")]
    status = main(["merge", str(tmp_path / "clip"), "--data", "digits:train", *given])
    assert status == 0, capsys.readouterr().err
    assert all(name.endswith(":tokens") for name in comcat.load(tmp_path / "out").comcat_record.plan.sites)


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """The model with fewer ranks and units, in a folder of ours."""
    place = tmp_path_factory.mktemp("compressed") / "small"
    way = {"reduce": 0.3, "bench": False, "eval_limit": 8, "pictures": 16, "batch_size": 16}
    comcat.compress_to(place, str(folder), "digits:train", evaluation="digits:test", **way)
    return place


def words(model, *more):
    given = ["--data", "digits:train", "--eval", "digits:test", "--eval-limit", "8", "--no-bench"]
    return ["merge", str(model), "--keep", "0.6", "--pictures", "8", *given, *more]


def test_a_compressed_folder_is_merged_and_keeps_its_ranks_and_units(small, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(words(small, "--out", str(out))) == 0, capsys.readouterr().err
    assert "of the tokens run" in capsys.readouterr().out
    before, model, x = comcat.load(small), comcat.load(out), pictures(4, 4)[0]
    earlier, record = before.comcat_record, model.comcat_record
    merges = {name: entry for name, entry in record.plan.sites.items() if name.endswith(":tokens")}
    assert merges and {**earlier.plan.sites, **merges} == record.plan.sites and earlier.plan.sites
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert not torch.equal(before(x), model(x)) and comcat.count_macs(model, x[:1]) < comcat.count_macs(before, x[:1])
    comcat.apply_(before, comcat.Plan(sites=merges))  # Python has been doing this
    assert torch.equal(before(x), model(x))
    # both steps are told of
    assert record.plan.made_by["merge"]["keep"] == 0.6 and record.plan.made_for == earlier.plan.made_for
    assert {k: v for k, v in record.plan.made_by.items() if k != "merge"} == earlier.plan.made_by
    assert record.settings == earlier.settings and record.results.others["earlier"] == earlier.results.to_dict()
    assert record.results.before["top1"] is not None and record.results.after["top1"] is not None
    card = (out / "README.md").read_text()
    assert "| merge.keep | 0.6 |" in card and "fewer tokens" in card and "hidden units" in card
    page = (out / "report.html").read_text()
    assert "Which tokens ran as one" in page


def test_what_is_merged_is_tuned_exported_and_judged_but_not_merged_or_compressed_again(small, tmp_path, capsys):
    out, tuned = tmp_path / "merged", tmp_path / "tuned"
    assert main(words(small, "--out", str(out))) == 0, capsys.readouterr().err
    judged = ["--data", "digits:test", "--limit", "8"]
    assert main(["eval", str(out), *judged]) == 0, capsys.readouterr().err
    assert main(["export", str(out), "--out", str(tmp_path / "model.onnx")]) == 0, capsys.readouterr().err
    steps = ["--steps", "2", "--batch-size", "4", "--workers", "0", "--precision", "fp32"]
    status = main(["tune", str(out), "--data", "digits:train", "--teacher", str(small), *steps, "--out", str(tuned)])
    assert status == 0, capsys.readouterr().err
    model = comcat.load(tuned)
    assert model.comcat_record.plan.sites == comcat.load(out).comcat_record.plan.sites
    assert model.comcat_record.plan.made_by["merge"]["keep"] == 0.6
    capsys.readouterr()
    data = ["--data", "digits:train", "--out", str(tmp_path / "again")]
    for given in (
        words(out, "--out", str(tmp_path / "again")),
        ["compress", str(out), "--reduce", "0.2", *data],
        ["prune", str(out), "--reduce", "0.2", "--epochs", "1", *data],
        ["search", str(out), "--reduce", "0.2", *data[:2], "--out", str(tmp_path / "again" / "plan.json")],
        ["explore", str(out), *data[:2], "--out", str(tmp_path / "again.html")],
    ):
        assert main(given) != 0
        error = capsys.readouterr().err
        assert "run on fewer tokens already" in error and "comcat merge FOLDER" in error and "Traceback" not in error
        assert not (tmp_path / "again").exists()


def test_a_pruned_model_is_merged_as_it_is(folder, tmp_path):
    few = comcat.open_pictures("digits:train").take(24, 0)
    judged = {"evaluation": "digits:test", "eval_limit": 8, "bench": False}
    asked = {"reduce": 0.3, "steps": 4, "batch_size": 8, "pictures": 8, "choices": 2}
    pruned = comcat.prune_to(tmp_path / "pruned", str(folder), few, **judged, **asked)
    assert pruned.record.results.tuning["curve"]
    evaluation = judged.pop("evaluation")
    done = comcat.merge_to(
        tmp_path / "merged", tmp_path / "pruned", few, evaluation=evaluation, keep=0.6, pictures=4, way=judged
    )
    kinds = {name.rpartition(":")[2] for name in done.record.plan.sites}
    assert "tokens" in kinds and kinds > {"tokens"} and done.record.results.tuning is None
    assert done.record.results.others["earlier"]["tuning"]["curve"]
    x = pictures(4, 4)[0]
    assert torch.equal(comcat.load(tmp_path / "merged")(x), done.model(x))


def test_what_else_is_added_to_a_compressed_model_is_refused(small):
    model = comcat.load(small)
    entry = next(iter(model.comcat_record.plan.sites))
    for plan in (None, comcat.Plan(sites={entry: model.comcat_record.plan.sites[entry]})):
        with pytest.raises(ModelError, match=r"compressed already.*comcat merge"):
            comcat.compress(model, pictures(4, 4), reduce=0.2 if plan is None else None, plan=plan)
    merged = comcat.compress(model, plan=comcat.merge(model, example=pictures(1)[0], keep=0.6))
    with pytest.raises(ModelError, match="fewer tokens already"):
        comcat.compress(merged, plan=comcat.merge(model, example=pictures(1)[0], keep=0.6))

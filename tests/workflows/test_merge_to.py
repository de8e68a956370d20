"""``comcat merge`` as a user types it."""

import json
import signal
from pathlib import Path

import pytest
import torch

import comcat
from comcat.cli import main
from comcat.errors import StoreError
from comcat.tuning.settings import TuneSettings
from comcat.tuning.step import Training

from ..models import pictures, timm_folder, tiny_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return timm_folder(tmp_path_factory.mktemp("model"))


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


def test_a_stopped_measurement_of_schedules_goes_on(folder, tmp_path, monkeypatch, capsys):
    from comcat.methods.merging import meter

    applied, out = [], tmp_path / "merged"
    apply_ = meter.apply_

    def counted(*args, **kwargs):
        if stop_at is not None and len(applied) == stop_at:
            signal.raise_signal(signal.SIGINT)
        applied.append(args[1].sites)
        return apply_(*args, **kwargs)

    monkeypatch.setattr(meter, "apply_", counted)
    stop_at = 3
    given = ["merge", str(folder), "--data", "digits:train", "--pictures", "4", "--eval-limit", "8", "--no-bench"]
    assert main([*given, "--keep", "0.6", "--out", str(out)]) == 130
    assert "after 3 of 4 tries with fewer tokens; the same command goes on" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "merged.run" / "merge" / "divergences.json").exists()
    stop_at = None
    assert main([*given, "--keep", "0.6", "--out", str(out)]) == 0, capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert len(applied) == 3 + 1 + 3 and all(applied.count(sites) == 1 for sites in applied)
    stopped, applied[:] = comcat.load(out).comcat_record.plan, []
    assert main([*given, "--keep", "0.6", "--out", str(tmp_path / "whole")]) == 0
    assert len(applied) == 7 and comcat.load(tmp_path / "whole").comcat_record.plan == stopped


def test_what_cannot_be_merged_leaves_nothing_behind(tmp_path):
    model = tiny_vit(num_classes=10)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(comcat.errors.ModelError, match="nothing to choose by"):
        comcat.merge_to(tmp_path / "m", model, "digits:train", evaluation="digits:test", pictures=4)
    assert list(tmp_path.iterdir()) == []


def test_measurements_hold_for_one_model_and_its_pictures(tmp_path, monkeypatch):
    from comcat.methods.merging import meter

    model, x, others = tiny_vit(depth=2), pictures(8, 4), [images + 0.1 for images in pictures(8, 4)]
    tries, apply_ = [], meter.apply_
    monkeypatch.setattr(meter, "apply_", lambda *args, **kwargs: tries.append(0) or apply_(*args, **kwargs))

    def measured(model, x, **settings):
        tries.clear()
        plan = comcat.merge(model, x, out=tmp_path, **settings)
        assert plan == comcat.merge(model, x, **settings)
        return len(tries) - 7

    assert measured(model, x, keep=0.6) == 7 and measured(model, x, keep=0.6) == 0
    assert measured(model, x, keep=0.8) == 3  # the blocks are known one by one, the schedules are others
    assert measured(model, others, keep=0.6) == 7
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.1)
    assert measured(model, others, keep=0.6) == 7 and measured(model, others, keep=0.6, residual=False) == 7
    (tmp_path / "divergences.json").write_text("{")
    assert measured(model, others, keep=0.6) == 7


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

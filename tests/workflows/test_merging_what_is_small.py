"""Merging what was compressed, pruned or tuned before, and what is done with it afterwards."""

import pytest
import torch

import comcat
from comcat.cli import main
from comcat.errors import ModelError

from ..models import pictures, timm_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return timm_folder(tmp_path_factory.mktemp("model"))


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
    assert (
        "| merge.keep | 0.6 |" in card
        and "the compressed model whose tokens were merged" in card
        and "fewer tokens" in card
        and "hidden units" in card
    )
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


def test_a_file_of_merges_is_a_plan_for_what_is_compressed(small, tmp_path, capsys):
    comcat.merge(comcat.load(small), example=pictures(1)[0], keep=0.6).save(tmp_path / "merges.json")
    given = ["--plan", str(tmp_path / "merges.json"), "--data", "digits:train", "--eval-limit", "8", "--no-bench"]
    assert main(["compress", str(small), *given, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    earlier, plan = comcat.load(small).comcat_record.plan, comcat.load(tmp_path / "out").comcat_record.plan
    assert plan.sites == {**earlier.sites, **comcat.Plan.load(tmp_path / "merges.json").sites}


def test_what_else_is_added_to_a_compressed_model_is_refused(small):
    model = comcat.load(small)
    entry = next(iter(model.comcat_record.plan.sites))
    for plan in (None, comcat.Plan(sites={entry: model.comcat_record.plan.sites[entry]})):
        with pytest.raises(ModelError, match=r"compressed already.*comcat merge"):
            comcat.compress(model, pictures(4, 4), reduce=0.2 if plan is None else None, plan=plan)
    merged = comcat.compress(model, plan=comcat.merge(model, example=pictures(1)[0], keep=0.6))
    with pytest.raises(ModelError, match="fewer tokens already"):
        comcat.compress(merged, plan=comcat.merge(model, example=pictures(1)[0], keep=0.6))

"""``comcat tune`` as a user types it."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import comcat
from comcat.cli import main
from comcat.plan import Plan
from comcat.tuning.step import Training
from tests.parallel import in_processes

from .material import folder, model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A student, its teacher, and pictures to train and to judge on."""
    root = tmp_path_factory.mktemp("places")
    net = model()
    comcat.save(net, root / "teacher", plan=Plan(sites={}))
    comcat.save(comcat.compress(net, statistic="weights", reduce=0.2), root / "small")
    folder(root / "train", 26)
    folder(root / "eval", 13, first=500)
    return root


def command(places, *more: str, student=None, out: str | None = None) -> list[str]:
    given = [
        "tune",
        str(student or places / "small"),
        "--data",
        str(places / "train"),
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    return [*given, *([] if out is None else ["--out", out]), *more]


ALL = ["--steps", "6", "--checkpoint-every", "2", "--lr", "1e-3"]


def test_it_saves_a_tuned_model_and_says_what_it_did(places, tmp_path, capsys):
    out = tmp_path / "tuned"
    more = ["--teacher", str(places / "teacher"), "--eval", str(places / "eval"), "--features", "all", *ALL]
    assert main(command(places, *more, out=str(out))) == 0
    said = capsys.readouterr().out
    assert "before" in said and "top-1" in said and "images/s while training" in said
    assert "None of 13 evaluation pictures is among 26 training pictures" in said
    tuned, small = comcat.load(out), comcat.load(places / "small")
    assert tuned.comcat_record.plan == small.comcat_record.plan
    found = tuned.comcat_record.results.tuning
    assert found["steps"] == 6 and found["curve"][-1]["top1"] == found["after"]["top1"]
    assert found["teacher"] is not None and found["settings"]["features"] == ["all"]
    assert not torch.equal(tuned.patch_embed.proj.weight, small.patch_embed.proj.weight)
    assert (out / "log.jsonl").is_file() and (out / "checkpoints").is_dir()  # carried over when the model was saved
    assert main(command(places, *more, out=str(out))) == 0  # finished: saves the same again
    again = comcat.load(out)
    assert all(torch.equal(a, b) for a, b in zip(tuned.state_dict().values(), again.state_dict().values(), strict=True))


def test_by_default_the_result_lies_beside_the_student(places, capsys):
    assert main(command(places, "--epochs", "0")) == 0
    beside = places / "small-tuned"
    assert comcat.load(beside).comcat_record.results.tuning["curve"] == []
    assert main(command(places, "--epochs", "0")) == 1
    assert "small-tuned' is not empty; overwrite=True (--overwrite)" in capsys.readouterr().err
    assert main(command(places, "--epochs", "0", "--overwrite")) == 0
    shutil.rmtree(beside)


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(places, tmp_path, capsys, monkeypatch):
    out = tmp_path / "tuned"
    step = Training.step

    def interrupted(self, number, watch):
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, watch)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", interrupted)
        assert main(command(places, *ALL, out=str(out))) == 130
    assert f"the same command goes on from the last checkpoint in {out}" in capsys.readouterr().err
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]
    assert not (out / "config.json").exists()
    assert main(command(places, *ALL, "--lr", "2e-3", out=str(out))) == 1
    assert "lr was 0.001, now 0.002" in capsys.readouterr().err
    assert main(command(places, *ALL, out=str(out))) == 0
    assert main(command(places, *ALL, out=str(tmp_path / "undisturbed"))) == 0
    states = [comcat.load(path).state_dict().values() for path in (out, tmp_path / "undisturbed")]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert main(command(places, *ALL, "--lr", "2e-3", "--restart", out=str(out))) == 0
    assert comcat.load(out).comcat_record.results.tuning["settings"]["lr"] == 2e-3


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(places, tmp_path, monkeypatch):
    out = tmp_path / "tuned"

    def interrupted(self, number, watch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", interrupted)
        assert main(command(places, *ALL, out=str(out))) == 130
    assert not (out / "checkpoints").exists() and any(out.iterdir())
    assert main(command(places, *ALL, out=str(out))) == 0


def test_a_tuned_model_says_nothing_that_was_true_before(places, tmp_path):
    small = comcat.load(places / "small")
    results = {
        "before": {"parameters": 9, "top1": 90.0}, "after": {"parameters": 5, "top1": 81.5, "loss": 0.5},
        "agreement": {"agreement": 98.5}, "measured_loss": 0.1,
    }  # fmt: skip
    small.comcat_record = replace(small.comcat_record, results=results)
    comcat.save(small, tmp_path / "told")
    for steps, kept in (("0", True), ("2", False)):
        out = tmp_path / steps
        more = ["--steps", steps] if steps != "0" else ["--epochs", "0"]
        assert main(command(places, *more, student=tmp_path / "told", out=str(out))) == 0
        found = comcat.load(out).comcat_record.results
        assert ("top1" in found.after) == bool(found.agreement) == (found.measured_loss is not None) == kept
        assert found.after["parameters"] == 5 and found.before == results["before"]
        if not kept:
            assert found.untuned == {
                "top1": 81.5,
                "loss": 0.5,
                "agreement": {"agreement": 98.5},
                "measured_loss": 0.1,
            }
            card = (out / "README.md").read_text()
            assert "81.5" not in card.split("Before tuning: Top-1 accuracy")[0] and "agreement." not in card


def test_options_come_from_a_recipe(places, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1\ncrop_scale: [0.6, 1.0]\nonly: [attn, head]\nema: 0.9\nbatch_size: 4\n")
    out = tmp_path / "tuned"
    assert main(command(places, "--recipe", str(recipe), out=str(out))) == 0
    settings = comcat.load(out).comcat_record.results.tuning["settings"]
    assert settings["crop_scale"] == [0.6, 1.0] and settings["only"] == ["attn", "head"] and settings["ema"] == 0.9
    assert settings["batch_size"] == 8  # the command line wins


def test_what_is_wrong_is_told_in_one_line(places, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    inside = tmp_path / "inside"
    folder(inside / "eval", 13)
    wrong = (
        (["--eval", str(places / "train")], None, "the pictures and the evaluation set are both"),
        (["--eval", str(inside / "eval")], None, "shares 13 of its 13 pictures"),
        (["--distillation", "hard"], None, "distillation='hard' needs a teacher"),
        (["--batch-size", "7", "--accumulate", "2"], None, "expected a multiple of 2"),
        (["--only", "nothing"], None, "no weight lies in 'nothing'"),
        ([], str(other), "is not empty"),
        (["--overwrite"], str(other), "was not written by comcat"),
        (["--dtype", "bfloat16"], None, "tune the model in float32"),
    )
    for more, out, message in wrong:
        out = str(tmp_path / "out") if out is None else out
        assert main([*command(places, out=out), *ALL, *more]) == 1, more
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and said[-1].startswith("comcat: "), said
    assert [p.name for p in other.iterdir()] == ["mine.txt"]  # told before anything is computed
    assert main(["tune", "timm:vit_tiny_patch16_224", "--no-pretrained", "--data", str(places / "train")]) == 1
    assert "say where to save, --out FOLDER" in capsys.readouterr().err


def test_the_main_process_alone_saves_and_speaks(places, tmp_path):
    out = tmp_path / "tuned"
    first, second = in_processes(2, _said, command(places, *ALL, "--eval", str(places / "eval"), out=str(out)))
    assert first["status"] == second["status"] == 0
    assert "Saved to" in first["out"] and second["out"] == ""
    assert comcat.load(out).comcat_record.results.tuning["processes"] == 2
    first, second = in_processes(2, _said, command(places, *ALL, "--only", "nothing", out=str(tmp_path / "wrong")))
    assert first["status"] == second["status"] == 1
    assert first["err"].count("comcat: only: no weight lies in 'nothing'") == 1 and second["err"] == ""


def _said(arguments):
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


# accelerate's own launcher starts several CPU processes by MPI alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [("torch.distributed.run --nproc-per-node 2", 2), ("accelerate.commands.launch --cpu --num_processes 1", 1)],
)
def test_launchers_start_it(places, tmp_path, launcher, processes):
    out = tmp_path / "tuned"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "-m", "comcat", *command(places, *ALL, out=str(out))],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1
    assert comcat.load(out).comcat_record.results.tuning["processes"] == processes
    assert (out / "log.jsonl").read_text().count('"step": 6') == 1

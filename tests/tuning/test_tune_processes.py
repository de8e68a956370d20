"""Tuning over several processes, and killed by SIGKILL."""

import json
import random
import shutil
import time

import pytest
import torch

from comcat.data import open_pictures
from comcat.errors import ComcatError, DataError, SettingsError
from comcat.measure import evaluate
from comcat.models import preprocess_of
from comcat.runs.processes import Processes
from comcat.tuning import step as step_module
from comcat.tuning.evaluating import evaluate_together
from comcat.tuning.tune import tune
from tests.models import shake
from tests.parallel import in_processes, interrupted, killed

from .material import folder, model, picture, shards

STEPS = 8
"""Two epochs: each ends with the rest of two pictures."""
SETTINGS = {
    "batch_size": 8, "lr": 1e-3, "crop_scale": None, "flip": 0.0, "features": ("all",), "log_every": 1, "steps": STEPS,
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Training pictures, 26: three batches of 8 and a rest of 2, which leaves one of two processes without any."""
    root = tmp_path_factory.mktemp("places")
    return folder(root / "train", 26), folder(root / "eval", 13, first=500)


def run(places, out=None, **settings):
    """One run; what its record says, a number for all weights together, and the weights."""
    torch.set_num_threads(1)
    net, teacher = model(drop_path_rate=settings.pop("drop_path_rate", 0.0)), model()
    shake(teacher, 0.3)
    tune(net, places[0], evaluation=places[1], teacher=teacher, out=out, **{**SETTINGS, **settings})
    return net.comcat_record.results.tuning, {name: value.clone() for name, value in net.state_dict().items()}


def losses(record) -> list[float]:
    return [line["loss"] for line in record["curve"]]


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("extra", [{}, {"accumulate": 2, "ema": 0.9}])
def test_two_processes_are_one(places, extra, tmp_path):
    alone, _ = run(places, **extra)
    (first, first_weights), (second, second_weights) = in_processes(2, _run_out, places, tmp_path, extra)
    assert same(first_weights, second_weights)  # each process has the result
    assert first["curve"] == second["curve"] and first["processes"] == 2
    assert len(losses(alone)) == STEPS
    assert losses(first) == pytest.approx(losses(alone), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(losses(alone), losses(alone)[1:], strict=False)) > 1e-2
    for key in ("top1", "count", "loss"):
        assert first["before"][key] == pytest.approx(alone["before"][key], abs=1e-4)
        assert first["after"][key] == pytest.approx(alone["after"][key], abs=1e-2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))  # written once


def _run_out(places, out, extra):
    return run(places, out, **extra)


def _gradients(places, step: int) -> dict:
    """The gradients of one step, clipping apart. Losses would not show their size: Adam divides by it."""
    update, seen = step_module.Learner.update, {}

    def noting(self, now):
        if now == step:
            seen.update({name: p.grad.clone() for name, p in self.named_parameters()})
        update(self, now)

    step_module.Learner.update = noting
    try:
        run(places, clip=None, steps=step + 1, accumulate=2)
    finally:
        step_module.Learner.update = update
    return seen


@pytest.mark.parametrize("step", [0, 3])
def test_two_processes_have_the_gradients_of_one(places, step):
    """Step 3 has two pictures left, both of the first process."""
    alone = _gradients(places, step)
    for found in in_processes(2, _gradients, places, step):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_two_processes_go_on_where_they_were_killed(places, tmp_path):
    extra = {"drop_path_rate": 0.3, "mixup": 0.8, "flip": 0.5, "checkpoint_every": 3, "ema": 0.9}
    undisturbed = in_processes(2, _run_out, places, tmp_path / "undisturbed", extra)
    again = in_processes(2, _killed_then_on, places, tmp_path / "killed", extra)
    for (expected, weights), (got, ours) in zip(undisturbed, again, strict=True):
        assert same(weights, ours) and got["curve"] == expected["curve"]


class _Killed(BaseException):
    pass


def _killed_then_on(places, out, extra):
    step = step_module.Training.step

    def deadly(self, number, watch):
        if number == STEPS - 1:
            raise _Killed
        return step(self, number, watch)

    step_module.Training.step = deadly
    with pytest.raises(_Killed):
        run(places, out, **extra)
    step_module.Training.step = step
    return run(places, out, **extra)


def test_an_error_of_one_process_is_raised_in_all(tmp_path):
    """One label of four classes is 4; which of the processes meets it is a matter of the order."""
    bad = _stream_with_a_bad_label(tmp_path)
    for which in ("train", "eval"):
        for name, message, everywhere in in_processes(2, _told, bad, which, tmp_path / which):
            assert name == "DataError" and "4, expected 0 to 3" in message and everywhere


def _stream_with_a_bad_label(tmp_path) -> str:
    """Nobody knows a stream's labels before it is read."""
    import io

    import pyarrow
    from pyarrow import parquet

    pictures = []
    for number in range(16):
        buffer = io.BytesIO()
        picture(number % 4, 500 + number).save(buffer, "png")  # none that is in the other set
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"image": pictures, "label": [4 if number == 9 else 1 for number in range(16)]})
    (tmp_path / "bad").mkdir()
    parquet.write_table(table, tmp_path / "bad" / "train.parquet")
    return f"hf:{tmp_path}/bad"


def _told(bad, which, tmp_path):
    good = f"{tmp_path}-good"
    if Processes(cpu=True).main:
        shards(tmp_path.with_name(f"{tmp_path.name}-good"), 16)
    Processes(cpu=True).agree()
    good = f"{good}/shard-*.tar"
    data, evaluation = (bad, None) if which == "train" else (good, bad)
    try:
        tune(model(), data, evaluation=evaluation, epoch_size=16, **{**SETTINGS, "features": ()})
    except ComcatError as error:
        return type(error).__name__, str(error), getattr(error, "everywhere", False)
    return None


@pytest.mark.parametrize("count", [13, 1])
def test_evaluation_counts_each_picture_once(places, count):
    """13 pictures do not divide, and one leaves a process with none."""
    pictures, net = open_pictures(places[1]).take(count, seed=0), model()
    reference = model()
    shake(reference, 0.3)
    from comcat.data import batches

    alone = evaluate(net, batches(pictures, preprocess_of(net), batch_size=4), against=reference)
    for found in in_processes(3, _evaluated, places[1], count):
        assert found.count == count
        for key, value in alone.to_dict().items():
            assert getattr(found, key) == pytest.approx(value, abs=1e-5), key


def _evaluated(place, count):
    net, reference = model(), model()
    shake(reference, 0.3)
    pictures = open_pictures(place).take(count, seed=0)
    return evaluate_together(net, pictures, preprocess_of(net), Processes(cpu=True), batch_size=4, against=reference)


def test_processes_agree():
    assert in_processes(3, _agreed) == [[3.0, 6.0, "main", ["DataError", "from 1", True], True]] * 3


def _agreed():
    processes = Processes(cpu=True)
    told = None
    try:
        with processes.together():
            if processes.index:
                raise DataError(f"from {processes.index}")
    except DataError as error:
        told = [type(error).__name__, str(error), error.everywhere]
    with processes.together():
        pass
    return [*processes.sums([1, 2]), processes.share("main" if processes.main else None), told, processes.count == 3]


def test_batches_must_divide(places):
    message = "got batch_size=8, expected a multiple of 3: 3 processes"
    assert in_processes(3, _undivided, places) == [message] * 3


def _undivided(places):
    try:
        tune(model(), places[0], **{**SETTINGS, "features": ()})
    except SettingsError as error:
        return str(error)
    return None


def _sharded(places, out, extra):
    """The same run by FSDP2. accelerate spreads models this way on accelerators alone; all that it needs works with
    gloo as well.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def opened(*arguments):
        accelerator = open_accelerator(*arguments)
        PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        return accelerator

    open_accelerator, step_module.open_accelerator = step_module.open_accelerator, opened
    init = step_module.Learner.__init__

    def checked(self, *arguments):
        init(self, *arguments)
        assert all(type(p).__name__ == "DTensor" for p in self.model.parameters())

    step_module.Learner.__init__ = checked
    first = run(places, out, **extra)
    checkpoints = sorted((out / "checkpoints").iterdir())
    if Processes(cpu=True).main:
        shutil.rmtree(checkpoints[-1])  # so that it goes on from the one before
    Processes(cpu=True).agree()
    return first, run(places, out, **extra)


@pytest.mark.parametrize("extra", [{"checkpoint_every": 5}, {"checkpoint_every": 5, "accumulate": 2, "ema": 0.9}])
def test_two_sharded_processes_are_one(places, tmp_path, extra):
    alone, weights = run(places, **extra)
    for (first, ours), (again, resumed) in in_processes(2, _sharded, places, tmp_path, extra):
        assert losses(first) == pytest.approx(losses(alone), abs=1e-4)
        assert same(ours, resumed) and again["curve"] == first["curve"]
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in weights.items()}
        for key in ("top1", "count", "loss"):
            assert first["after"][key] == pytest.approx(alone["after"][key], abs=1e-2)


# ---------------------------------------------------------------- SIGKILL


KILLED = {
    "drop_path_rate": 0.3, "mixup": 0.8, "flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "ema": 0.9, "repeats": 2,
    "checkpoint_every": 2, "keep": 1, "steps": 30,
}  # fmt: skip


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(places, tmp_path):
    undisturbed, weights = run(places, **KILLED)
    moments, log = random.Random(0), tmp_path / "log.jsonl"

    def lines() -> int:
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    step = 0
    for _ in range(3):
        step = moments.randint(step + 1, step + 7)
        delay = time.monotonic() + 1e9

        def now(step=step) -> bool:
            """A moment after the step, in the middle of whatever is then going on."""
            nonlocal delay
            if lines() >= step:
                delay = min(delay, time.monotonic() + moments.uniform(0, 0.05))
            return time.monotonic() > delay

        killed(now, _run_out, places, tmp_path, KILLED)
        step = lines()
    found, ours = run(places, tmp_path, **KILLED)
    assert same(ours, weights)
    assert found["curve"] == undisturbed["curve"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_keeps_its_last_step(places, tmp_path, capfd, workers):
    """The processes that read ahead hear Ctrl-C, too, and say nothing."""
    settings = {
        **KILLED,
        "checkpoint_every": 1000,
        "epoch_size": 26,
        "steps": 200,
        "workers": workers,
        "progress": True,
    }
    log = tmp_path / "log.jsonl"

    def begun() -> bool:
        return log.exists() and len(log.read_bytes().splitlines()) >= 6

    said = interrupted(begun, _run_out, places, tmp_path, settings)
    steps = len(log.read_bytes().splitlines())
    assert f"after step {steps} of 200; the last good checkpoint is " in said and said.endswith(f"step-{steps:08d}")
    assert capfd.readouterr().err.count("interrupted: this step ends") == 1

"""Interleaved timing."""

import inspect
import json
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from comcat.errors import DataError, ModelError, SettingsError
from comcat.measure import Timing, benchmark, ratio, timing, unsteady

from .models import Calls


@pytest.fixture
def brief_timings() -> None:
    """In this file timings last as long as they are asked to."""


class Clock:
    """Stands for the clock: models move it on, by more in some rounds than in others."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def model(self, name: str, seconds, models: int = 2) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            # The first call of each model checks that it runs.
            self.now += seconds(max(0, (len(self.calls) - models) // models))
            self.calls.append(name)
            return x

        return Calls(forward)


def test_benchmark_interleaves_and_pairs(monkeypatch):
    clock = Clock(monkeypatch)
    drift = [1, 1, 8, 2, 4]  # of the machine, from round to round
    models = {"slow": clock.model("slow", lambda r: 3.0 * drift[r]), "fast": clock.model("fast", lambda r: drift[r])}
    timings = benchmark(models, torch.ones(6, 2), repeats=4, warmup=1, min_seconds=0)
    assert clock.calls == ["slow", "fast"] + ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert timings["slow"].samples_s == (3, 24, 6, 12) and timings["fast"].samples_s == (1, 8, 2, 4)
    fast = timings["fast"]
    assert (fast.median_s, fast.low_s, fast.high_s, fast.repeats, fast.batch_size) == (3, 1.75, 5, 4, 6)
    assert fast.throughput == 2
    assert ratio(timings, "slow", "fast") == (3, 3, 3)
    assert ratio(timings, "fast", "slow") == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_benchmark_goes_on_for_min_seconds(monkeypatch):
    clock = Clock(monkeypatch)
    models = {"a": clock.model("a", lambda _: 0.25), "b": clock.model("b", lambda _: 0.75)}
    timings = benchmark(models, torch.ones(1, 2), repeats=2, warmup=0, min_seconds=2)
    assert timings["a"].repeats == timings["b"].repeats == 4  # 4 seconds in all, 2 for each on average
    assert len(clock.calls) == 2 + 8


def test_timing_as_json():
    timing = Timing(median_s=0.5, low_s=0.4, high_s=0.6, repeats=2, batch_size=8, samples_s=(0.4, 0.6))
    plain = {"median_s": 0.5, "low_s": 0.4, "high_s": 0.6, "repeats": 2, "batch_size": 8, "throughput": 16.0}
    assert json.loads(json.dumps(timing.to_dict())) == plain
    assert json.loads(json.dumps(timing.to_dict(samples=True))) == plain | {"samples_s": [0.4, 0.6]}


def test_benchmark_runs_for_inference_and_under_autocast():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append((self.training, torch.is_inference_mode_enabled(), out.dtype))
            return out

    quick = {"repeats": 1, "warmup": 1, "min_seconds": 0}
    timing = benchmark({"m": Spy(2, 2)}, torch.ones(1, 2), **quick)["m"]
    assert timing.median_s > 0 and timing.repeats == 1 and timing.low_s == timing.high_s
    assert seen == [(False, False, torch.float32)] + [(False, True, torch.float32)] * 2
    seen.clear()
    benchmark({"m": Spy(2, 2)}, torch.ones(1, 2), autocast_dtype=torch.bfloat16, **quick)
    assert {dtype for _, _, dtype in seen} == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")


def test_benchmark_refuses_what_it_cannot_time():
    good, x = nn.Identity(), torch.ones(1, 2)
    for models in ({}, good, [good], {"path": "model.safetensors"}):
        with pytest.raises(SettingsError, match="expected a mapping"):
            benchmark(models, x)
    for wrong in ({"repeats": 0}, {"warmup": -1}, {"min_seconds": -1.0}, {"min_seconds": math.inf}):
        with pytest.raises(SettingsError, match="expected at least 1"):
            benchmark({"m": good}, x, **wrong)
    with pytest.raises(SettingsError, match=r"autocast_dtype: got torch.float32"):
        benchmark({"m": good}, x, autocast_dtype=torch.float32)
    with pytest.raises(DataError, match="expected a tensor of pictures"):
        benchmark({"m": good}, [x])
    with pytest.raises(DataError, match="at least one picture"):
        benchmark({"m": good}, torch.ones(0, 2))
    with pytest.raises(ModelError, match=r"model 'bad' cannot run on an input of \(1, 2\)"):
        benchmark({"good": good, "bad": nn.Linear(3, 3)}, x)


def test_ratio_refuses_what_was_not_paired():
    one = Timing(median_s=1, low_s=1, high_s=1, repeats=1, batch_size=1, samples_s=(1.0,))
    two = Timing(median_s=1, low_s=1, high_s=1, repeats=2, batch_size=1, samples_s=(1.0, 1.0))
    timings = {"dense": one, "small": two, "bare": Timing(median_s=1, low_s=1, high_s=1, repeats=1, batch_size=1)}
    with pytest.raises(ModelError, match=r"no timing of 'dens'.*did you mean 'dense'"):
        ratio(timings, "dens", "small")
    for other in ("small", "bare"):
        with pytest.raises(SettingsError, match="expected both from one run"):
            ratio(timings, "dense", other)
    with pytest.raises(SettingsError, match="expected both from one run"):
        ratio(timings, "bare", "bare")


@pytest.mark.parametrize("isolated", [True, False])  # not every supported torch keeps its compiled models apart
def test_compiled_copies_leave_the_models_alone(monkeypatch, isolated):
    real, made, graphs = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_lightly(model, **options):
        made.append((model, options))
        return real(model, backend=backend, **options)

    if isolated and "isolate_recompiles" in inspect.signature(real).parameters:
        compile_lightly.__wrapped__ = real
    monkeypatch.setattr(torch, "compile", compile_lightly)
    # More models of one class than dynamo compiles by default before it silently runs the rest eagerly.
    models = {f"rank {r}": nn.Sequential(nn.Linear(2, r), nn.Linear(r, 2)) for r in range(1, 12)}
    timings = benchmark(models, torch.ones(1, 2), repeats=2, warmup=0, min_seconds=0, compile=True)
    assert set(timings) == set(models) and len(made) == len(graphs) == len(models)
    for (copy, options), model in zip(made, models.values(), strict=True):
        assert copy is not model and copy[0].weight is not model[0].weight
        assert torch.equal(copy[0].weight, model[0].weight) and not copy[0].weight.is_inference()
        assert options["dynamic"] is False
        assert model._compiled_call_impl is None and model.training


def test_a_failing_compiler_names_the_model(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(ModelError, match=r"(?s)torch.compile failed for model 'small'.*no C\+\+ compiler"):
        benchmark({"small": nn.Linear(2, 2)}, torch.ones(1, 2), compile=True)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.02, 58.24, True), (1.9, 2.1, False), (0.5, 0.9, False), (0.5, 1.1, True)]
)
def test_rounds_that_differ_widely_are_said(low, high, said):
    assert ("says little" in unsteady(low, high)) == said and bool(unsteady(low, high)) == said

"""Seconds that a forward takes, of several models in one interleaved run."""

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, SettingsError, in_short, nearest
from .memory import memory_kept
from .running import AUTOCAST, call, checked, entry, evaluating

_STEADY = 2.0
"""As far apart as the quartiles of a ratio may lie, one times the other, before it is said."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that one forward of a batch takes: median and quartiles over ``repeats`` rounds, with every round's."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int
    batch_size: int
    samples_s: tuple[float, ...] = field(default=(), repr=False)

    @property
    def throughput(self) -> float:
        """Pictures per second at the median."""
        return self.batch_size / self.median_s

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """The numbers as JSON holds them; the rounds' samples only when asked for."""
        numbers = asdict(self) | {"throughput": self.throughput, "samples_s": list(self.samples_s)}
        return numbers if samples else {key: value for key, value in numbers.items() if key != "samples_s"}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    at = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def _compiled(
    name: str, model: nn.Module, example: Tensor, cast: Callable[[], AbstractContextManager]
) -> Callable[[Tensor], Any]:
    """A copy of the model under ``torch.compile``, compiled for the example."""
    # Fixed shapes: else the second model of a class is compiled with its ranks as variables, and runs slower for it.
    options: dict[str, Any] = {"dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in every supported torch
        options["isolate_recompiles"] = True
    try:
        call = torch.compile(entry(copy.deepcopy(model)), **options)
        with torch.inference_mode(), cast():
            call(example)
    except Exception as error:
        raise ModelError(f"torch.compile failed for model {name!r}: {type(error).__name__}: {error}") from error
    return call


def _loud_compiler() -> AbstractContextManager:
    """Room to compile many models of one class, and an error instead of a silent return to eager running."""
    import torch._dynamo

    return torch._dynamo.config.patch(
        recompile_limit=2**16,
        accumulated_recompile_limit=2**16,
        fail_on_recompile_limit_hit=True,
        suppress_errors=False,
    )


def benchmark(
    models: Mapping[str, nn.Module],
    example: Tensor,
    *,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 1.0,
    compile: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Timing]:
    """Time the forward of each model on ``example`` (batch, channels, height, width), all in one interleaved run.

    Each round times every model once, in an order that rotates from round to round, so that a machine's drift hits all
    alike; compare two of them with :func:`ratio`. There are at least ``repeats`` rounds, and more until they took
    ``min_seconds`` seconds for each model on average. Evaluation and inference mode; where the example is on an
    accelerator, it is synchronised around each sample; on a CPU, memory is kept between them
    (:func:`~comcat.measure.memory.memory_kept`). ``warmup`` untimed rounds come first. ``compile`` times copies
    under ``torch.compile`` with fixed shapes and no limit on recompilation, leaving the given models as they are.
    ``autocast_dtype`` (bfloat16 or float16) runs each forward in an autocast context of its own, as a service would.

    Raises SettingsError for settings out of range, DataError for an example without pictures, ModelError naming the
    model that cannot run or that ``torch.compile`` fails on.
    """
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise SettingsError(f"models: got {in_short(models)}, expected a mapping of at least one name to a module")
    if repeats < 1 or warmup < 0 or not 0 <= min_seconds < math.inf:
        raise SettingsError(
            f"got repeats={repeats}, warmup={warmup}, min_seconds={min_seconds}; "
            "expected at least 1, at least 0 and a finite number of at least 0"
        )
    if autocast_dtype not in (None, *AUTOCAST):
        raise SettingsError(f"autocast_dtype: got {autocast_dtype}, expected torch.bfloat16, torch.float16 or None")
    if not isinstance(example, Tensor):
        raise DataError(f"example: got {type(example).__name__}, expected a tensor of pictures")
    device, calls = checked(example).device, {}
    wait = torch.accelerator.synchronize if device.type not in ("cpu", "meta") else lambda _: None

    def cast() -> AbstractContextManager:
        return nullcontext() if autocast_dtype is None else torch.autocast(device.type, dtype=autocast_dtype)

    with ExitStack() as stack:
        stack.enter_context(evaluating(*models.values()))
        if device.type == "cpu":
            stack.enter_context(memory_kept())
        if compile:
            stack.enter_context(_loud_compiler())
        for name, model in models.items():
            with torch.no_grad(), cast():  # tables a model builds once must not become inference tensors
                call(model, example, name)
            calls[name] = _compiled(name, model, example, cast) if compile else entry(model)
        stack.enter_context(torch.inference_mode())
        names, samples, spent = list(calls), {name: [] for name in calls}, 0.0
        rounds = -warmup
        while rounds < repeats or not _long_enough(spent, min_seconds * len(names)):
            for step in range(len(names)):
                name = names[(rounds + step) % len(names)]
                wait(device)
                start = time.perf_counter()
                with cast():
                    calls[name](example)
                wait(device)
                seconds = time.perf_counter() - start
                if rounds >= 0:
                    samples[name].append(seconds)
                    spent += seconds
            rounds += 1
    timings = {}
    for name, values in samples.items():
        median, low, high = _quartiles(values)
        timings[name] = Timing(
            median_s=median,
            low_s=low,
            high_s=high,
            repeats=len(values),
            batch_size=example.shape[0],
            samples_s=tuple(values),
        )
    return timings


def _long_enough(spent: float, least: float) -> bool:
    """Whether all rounds together took the seconds asked for."""
    return spent >= least


def ratio(timings: Mapping[str, Timing], base: str, other: str) -> tuple[float, float, float]:
    """How many times as fast as ``base`` is ``other``: median, lower and upper quartile of the rounds' paired ratios.

    Pairing takes out what slows a whole round. Raises ModelError for a name that was not timed, SettingsError where the
    two were not timed in one run.
    """
    for name in (base, other):
        if name not in timings:
            raise ModelError(f"no timing of {name!r}, only of {sorted(timings)}{nearest(name, timings)}")
    slow, fast = timings[base], timings[other]
    if not slow.samples_s or len(slow.samples_s) != len(fast.samples_s) or slow.batch_size != fast.batch_size:
        raise SettingsError(
            f"{base!r} has {len(slow.samples_s)} samples of batches of {slow.batch_size}, {other!r} has "
            f"{len(fast.samples_s)} of {fast.batch_size}; expected both from one run of benchmark"
        )
    return _quartiles([a / b for a, b in zip(slow.samples_s, fast.samples_s, strict=True)])


def unsteady(low: float, high: float) -> str:
    """A sentence where the quartiles of a ratio of times lie so far apart that it says little, else an empty one."""
    if high <= _STEADY * low:
        return ""
    return (
        f"The rounds of the timing differ widely (quartiles {low:.2f}–{high:.2f} times as fast): something else used "
        "the machine, so that this speed says little. Time it again when the machine is idle."
    )

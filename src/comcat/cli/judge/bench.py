"""``comcat bench``: time a model, beside another in one interleaved run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import ModelError, SettingsError
from ...files import home_path
from ...settings import expect
from ..common import Common, Positional, load, pick_device
from ..terminal import LABELS, number, table

Runtime = Literal["onnxruntime", "openvino", "torch.export"]
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "torch.export": "torch"}
"""Runtime → the format that it runs."""


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Time a model or an exported file, side by side with another in one interleaved run."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder; or an exported file, which runs in its own runtime."""
    against: str | None = None
    """A model or file to time beside it."""
    runtime: Runtime | None = None
    """Export what is no file for this runtime, and time it there: onnxruntime, openvino or torch.export."""
    batch_size: int = 16
    """Pictures a batch."""
    repeats: int = 20
    """Rounds, at least."""
    compile: bool = False
    """Time under torch.compile."""
    threads: int | None = None
    """CPU threads."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        expect(self, "batch_size", "repeats", "threads", least=1)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What is timed, and the model in PyTorch that it was made from, where there is one."""

    module: Any
    source: Any | None


def run(command: Bench) -> int:
    import torch

    from ...measure import benchmark, environment, ratio, unsteady

    if command.threads is not None:
        torch.set_num_threads(command.threads)
    with _opened(command) as timed:
        example = _example(timed, command)
        modules = {name: t.module for name, t in timed.items()}
        timings = benchmark(modules, example, repeats=command.repeats, compile=command.compile)
        rows = {name: _row(t, timings[name], example) for name, t in timed.items()}
    speed = None if command.against is None else ratio(timings, command.against, command.model)
    if command.json:
        print(
            json.dumps(
                {
                    "models": rows,
                    "speed_up": speed,
                    "batch_size": command.batch_size,
                    "compiled": command.compile,
                    "environment": environment(),
                },
                indent=1,
            )
        )
        return 0
    keys = ["parameters", "macs", "size_bytes", "peak_memory_bytes", "latency_s", "low_s", "high_s", "throughput"]
    table(
        ["measure", *rows],
        [
            *([LABELS[k], *(number(k, r[k]) for r in rows.values())] for k in keys),
            ["runs in", *(r["runtime"] for r in rows.values())],
        ],
    )
    if speed is not None:
        how = "compiled" if command.compile else "eager"
        print(
            f"\nSpeed-up {speed[0]:.2f}× (quartiles {speed[1]:.2f}–{speed[2]:.2f}), batch {command.batch_size}, "
            f"{how}, {command.dtype}, interleaved."
        )
        if disturbed := unsteady(*speed[1:]):
            print(disturbed)
    return 0


@contextmanager
def _opened(command: Bench) -> Iterator[dict[str, Timed]]:
    """What is to be timed, by its name; the one to compare with first."""
    from ...deployment.formats import format_of

    names = [name for name in (command.against, command.model) if name is not None]
    forms = {name: format_of(home_path(name)) for name in names}
    if any(forms.values()) or command.runtime is not None:
        _check_runtime(command, forms)
    with tempfile.TemporaryDirectory() as folder:
        yield {name: _timed(command, name, forms[name], Path(folder) / str(place)) for place, name in enumerate(names)}


def _check_runtime(command: Bench, forms: dict[str, Any]) -> None:
    """Raise SettingsError for what no runtime does: another device or type, and torch.compile."""
    if pick_device(command.device) != "cpu" and command.device != "auto":
        raise SettingsError(f"got --device {command.device}: exported files are timed on the CPU")
    if command.dtype != "float32" or command.compile:
        raise SettingsError("got --dtype or --compile, which an exported file has had decided; expected neither")
    for name, form in forms.items():
        if form is not None and command.runtime is not None and form.name != FORMATS[command.runtime]:
            raise SettingsError(f"{name} is of the format {form.name}, which does not run in {command.runtime}")


def _timed(command: Bench, name: str, form: Any, place: Path) -> Timed:
    from dataclasses import replace

    from ...deployment.export import export
    from ...deployment.formats import FORMATS as KNOWN
    from ...deployment.runtimes import open_exported

    if form is not None:
        return Timed(module=open_exported(name), source=None)
    if command.runtime is None:
        return _in_pytorch(command, name)
    model = load(replace(command, device="cpu"), name)
    to = FORMATS[command.runtime]
    done = export(model, to=to, out=f"{place}{KNOWN[to].suffix}", pictures=2, seed=command.seed)
    return Timed(module=open_exported(done.path), source=model)


def _in_pytorch(command: Bench, name: str) -> Timed:
    model = load(command, name)
    return Timed(module=model, source=model)


def _example(timed: dict[str, Timed], command: Bench) -> Any:
    """Pictures that all of them take."""
    import torch

    from ...models import preprocess_of

    kinds = {name: getattr(t.module, "description", {}).get("input", {}).get("type") for name, t in timed.items()}
    if "uint8" in kinds.values():
        pixels = [name for name, kind in kinds.items() if kind == "uint8"]
        raise SettingsError(f"{pixels[0]} takes pixels; bench gives tensors of pictures: export without --pixels")
    first = next(iter(timed.values()))
    source = next((t.source for t in timed.values() if t.source is not None), None)
    prepared = preprocess_of(source) if source is not None else first.module.preprocess
    if prepared is None:
        raise ModelError(f"nothing says how large the pictures of {first.module.path} are")
    generator = torch.Generator().manual_seed(command.seed)
    images = torch.randn(command.batch_size, prepared.channels, *prepared.size, generator=generator)
    return images if source is None else images.to(next(source.parameters()))


def _stored(model: Any) -> int:
    """Bytes of the file that a model came from, or of the one that it would be saved to."""
    from ...measure import size_on_disk
    from ...models.stored import precision_of, source_bytes

    return source_bytes(model) or size_on_disk(model, dtype=precision_of(model))


def _row(timed: Timed, timing: Any, example: Any) -> dict[str, Any]:
    """The numbers of one model; what a file does not tell is None."""
    from ...deployment.export import size_of
    from ...measure import count_macs, count_parameters, peak_memory

    path = getattr(timed.module, "path", None)
    source, module = timed.source, timed.module
    return {
        "parameters": None if source is None else count_parameters(source),
        "macs": None if source is None else count_macs(source, example[:1]),
        "size_bytes": _stored(module) if path is None else size_of(path),
        "peak_memory_bytes": peak_memory(module, example) if path is None else None,
        "latency_s": timing.median_s,
        "low_s": timing.low_s,
        "high_s": timing.high_s,
        "throughput": timing.throughput,
        "runtime": "PyTorch" if path is None else module.runtime,
    }

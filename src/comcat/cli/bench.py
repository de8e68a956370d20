"""``comcat bench``: time a model, beside another in one interleaved run."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..settings import expect
from .common import Common, Positional, load
from .terminal import LABELS, number, table


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Time a model, side by side with another in one interleaved run."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    against: str | None = None
    """A model to time beside it."""
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


def run(command: Bench) -> int:
    import torch

    from ..measure import benchmark, count_macs, count_parameters, environment, peak_memory, ratio, size_on_disk
    from ..models import preprocess_of

    if command.threads is not None:
        torch.set_num_threads(command.threads)
    models = {command.model: load(command, command.model)}
    if command.against is not None:
        models = {command.against: load(command, command.against), **models}
    first = next(iter(models.values()))
    prepared = preprocess_of(first)
    p = next(first.parameters())
    example = torch.randn(
        command.batch_size, prepared.channels, *prepared.size, generator=torch.Generator().manual_seed(command.seed)
    ).to(p)
    timings = benchmark(models, example, repeats=command.repeats, compile=command.compile)
    rows = {
        name: {
            "parameters": count_parameters(m), "macs": count_macs(m, example[:1]), "size_bytes": size_on_disk(m),
            "peak_memory_bytes": peak_memory(m, example),
            "latency_s": timings[name].median_s, "low_s": timings[name].low_s, "high_s": timings[name].high_s,
            "throughput": timings[name].throughput,
        } for name, m in models.items()
    }  # fmt: skip
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
    table(["measure", *rows], [[LABELS[k], *(number(k, r[k]) for r in rows.values())] for k in keys])
    if speed is not None:
        print(
            f"\nSpeed-up {speed[0]:.2f}× (quartiles {speed[1]:.2f}–{speed[2]:.2f}), batch {command.batch_size}, "
            f"{'compiled' if command.compile else 'eager'}, {command.dtype}, interleaved."
        )
    return 0

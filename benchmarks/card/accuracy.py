"""Top-1 of the packed DINOv2-small classifier on a card: ranks, units, and both, by seed, as many seeds as time allows.

The same rows as ``benchmarks/real_weights.py``, judged in bfloat16. The weights were rounded to float16 when packed;
everything is compared with the dense model of the same weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import real_weights
from real.methods import chosen_methods
from real.tasks import CLASSIFIER

from comcat.errors import SettingsError

from .packed import Packed

METHODS = ("ranks + units", "ranks", "units")


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What is judged, and how long that may take (in seconds)."""

    device: str
    budgets: tuple[float, ...]
    seeds: int
    pictures: int
    judged: int | None
    seconds: float
    done: Callable[[dict[str, Any]], None]

    def result(self, packed: Packed) -> dict[str, Any]:
        """Every finished seed. ``done`` is told after each; none is begun that would not be finished in time."""
        start, longest = time.perf_counter(), 0.0
        task = replace(CLASSIFIER, build=packed.classifier, pixels=packed.pixels)
        methods = chosen_methods(METHODS)
        found: dict[tuple[str, float], list[dict[str, Any]]] = {(m, b): [] for b in self.budgets for m in methods}
        result: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as work:
            bench = real_weights.Bench(task, self._asked(Path(work)), methods)
            print(f"dense {bench.dense['score']:.2f} on {len(bench.judged)} pictures", flush=True)
            for seed in range(self.seeds):
                began = time.perf_counter()
                if began - start + 1.1 * longest > self.seconds:
                    print(f"stopped after {seed} of {self.seeds} seeds: the time is up", flush=True)
                    break
                for method, keywords in methods.items():
                    for budget in self.budgets:
                        found[method, budget].append(bench.row(method, keywords, budget, seed))
                longest = max(longest, time.perf_counter() - began)
                result = bench.result({key: [r for r in rows if r] for key, rows in found.items()}, methods)
                result |= {"seeds": seed + 1, "weights": "rounded to float16", "seed_seconds": longest}
                self.done(result)
        if not result:
            raise SettingsError(
                f"got {self.seconds:.0f} s, in which no seed can be judged; give the part a longer limit"
            )
        real_weights.show(result)
        return result

    def _asked(self, work: Path) -> Any:
        words = ["--device", self.device, "--methods", *METHODS, "--pictures", str(self.pictures), "--work", str(work)]
        words += ["--seeds", str(self.seeds), "--budgets", *map(str, self.budgets)]
        return real_weights.arguments(words + ([] if self.judged is None else ["--judged", str(self.judged)]))

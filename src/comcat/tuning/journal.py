"""What is seen of a tuning run: lines of its log, evaluations, and what the model's record says in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from ..measure import is_classifier
from ..runs.logs import Log, Meter
from .evaluating import evaluate_together
from .learner import Learner
from .settings import TuneSettings
from .setup import LOG, Setup

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CURVE = (
    "step",
    "epoch",
    "lr",
    "loss",
    "label_loss",
    "distillation_loss",
    "feature_loss",
    "train_top1",
    "top1",
    "eval_loss",
    "cosine",
    "agreement",
    "divergence",
)
_SHOWN = (("loss", "loss"), ("top-1", "top1"))
"""Words beside the bar, and the values of a line that they stand for."""


class Journal:
    """Notes each step, and now and then writes a line and evaluates. All processes must call its methods.

    ``scores`` are the evaluations before the first step, after the last one so far, and the step with the best top-1.
    """

    def __init__(self, setup: Setup, learner: Learner, accelerator: Any) -> None:
        self.setup, self.settings, self.processes = setup, setup.settings, setup.processes
        self.learner, self.accelerator = learner, accelerator
        self.per_epoch = setup.data.steps()
        self.log = Log(setup.place(LOG) if self.processes.main else None)
        self.meter = Meter()
        self.seconds, self.started = 0.0, time.monotonic()  # of the run before this process took it up, and when it did
        self.trained = {"samples": 0.0, "seconds": 0.0}  # in steps alone
        self.scores: dict[str, Any] = {"before": None, "after": None, "best": None}
        self.shown: dict[str, str] = {}

    def begin(self) -> None:
        """Begin a run that goes on from nothing: with an empty log, and an evaluation."""
        with self.processes.together():
            self.log.begin()
        self.scores["before"] = self._evaluated()

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """While the block lasts, lines go to the trackers as well. They are told of a run's end, not of its failure."""
        self.accelerator.init_trackers("comcat", config=_plain(self.settings))
        yield
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def add(self, sums: Mapping[str, float], samples: float, seconds: float) -> None:
        """Note a step: sums of its losses over the samples that count, how many these are, and how long it took."""
        self.meter.add({**sums, "samples": samples, "took": seconds})
        self.trained = {
            "samples": self.trained["samples"] + samples,
            "seconds": self.trained["seconds"] + seconds,
        }

    def note(self, done: int) -> Mapping[str, str]:
        """Write a line and evaluate, if it is time for that after so many steps; returns what the bar shows."""
        ended = done == self.setup.steps
        every = max(1, round(self.settings.eval_every * self.per_epoch))
        judge = self.setup.evaluation is not None and (ended or done % every == 0)
        if judge or ended or done % self.settings.log_every == 0:
            line = self._line(done, judge)
            self.shown |= {word: f"{line[key]:.4g}" for word, key in _SHOWN if key in line}
        return self.shown

    def _line(self, done: int, judge: bool) -> dict[str, Any]:
        """Write a line of the log: means over the steps since the last one, and an evaluation if it is time for one."""
        took, samples = self.meter.sums.pop("took"), self.meter.sums["samples"]
        line = {
            "step": done,
            "epoch": done / self.per_epoch,
            "lr": self.learner.lr,
            **self.meter.means(over="samples"),
        }
        if judge and (found := self._evaluated()) is not None:
            self.scores["after"] = found
            line |= {
                ("eval_loss" if name == "loss" else name): value for name, value in found.items() if name != "count"
            }
            best = self.scores["best"]
            if "top1" in found and (best is None or found["top1"] > best["top1"]):
                self.scores["best"] = {"step": done, "top1": found["top1"]}
        line |= {"seconds": self._seconds(), "images_per_second": samples / took}
        with self.processes.together():
            self.log.write(line)
        self.accelerator.log(line, step=done)
        return line

    def _evaluated(self) -> dict[str, Any] | None:
        setup = self.setup
        if setup.evaluation is None:
            return None
        found = evaluate_together(
            self.learner.judged,
            setup.evaluation,
            setup.preprocess,
            self.processes,
            batch_size=max(1, setup.data.batch_size // self.settings.accumulate),
            against=None if setup.objective.maps is None and is_classifier(self.learner.bare) else setup.teacher,
            dtype=_AUTOCAST[self.settings.precision],
        )
        return {name: value for name, value in found.to_dict().items() if value is not None}

    def _seconds(self) -> float:
        """Of the whole run so far, evaluation and checkpoints included; a part that was lost to a kill is not."""
        return self.seconds + time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        """Plain data to go on with; the lines so far are on the disk when it returns."""
        with self.processes.together():
            self.log.sync()
        return {
            "seconds": self._seconds(),
            "trained": self.trained,
            "scores": self.scores,
            "meter": self.meter.sums,
            "log": self.log.position,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave. Raises StoreError where the log is shorter than it was."""
        with self.processes.together():
            self.log.begin(state["log"])
        self.seconds, self.trained = state["seconds"], state["trained"]
        self.scores, self.meter = state["scores"], Meter(state["meter"])

    def result(self) -> dict[str, Any]:
        """What the record says of the run, in all processes: plain data."""
        lines = self.processes.share(self.log.lines)
        return {
            "steps": self.setup.steps,
            "curve": [{key: line[key] for key in _CURVE if key in line} for line in _thinned(lines)],
            "seconds": self._seconds(),
            "images_per_second": self.trained["samples"] / max(self.trained["seconds"], 1e-9),
            "processes": self.processes.count,
            **self.scores,
        }


def _thinned(lines: list[dict[str, Any]], most: int = 500) -> list[dict[str, Any]]:
    """About so many lines at most, those with an evaluation and the last one among them; the log has them all."""
    every = -(-len(lines) // most) if lines else 1
    return [line for i, line in enumerate(lines) if i % every == 0 or "top1" in line or i == len(lines) - 1]


def _plain(settings: TuneSettings) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in asdict(settings).items()}

"""The steps of a tuning run: batches, losses, updates, lines in the log, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ComcatError, NumericsError
from ..measure import is_classifier
from ..runs.checkpoints import Checkpoints, check_settings
from ..runs.logs import Log, Meter
from ..runs.processes import open_accelerator
from ..runs.seeding import derive_seed, seed_all
from ..runs.watching import LossWatch, first_unsound_output
from .evaluating import evaluate_together
from .learner import Learner
from .loaders import Batch, check_labels
from .losses import feature_loss, heads_of, train_both_heads
from .preparing import Run
from .settings import TuneSettings

CHECKPOINTS, LOG, TRACKERS = "checkpoints", "log.jsonl", "trackers"
"""What a run puts into its folder."""

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
)


class Loop:
    """The steps of a run, from wherever it stands to its end."""

    def __init__(self, run: Run, *, progress: bool) -> None:
        self.r, self.s, self.processes = run, run.settings, run.processes
        self.progress = progress and self.processes.main
        train_both_heads(run.model)
        with self.processes.together():
            trackers = None if run.folder is None else run.folder / TRACKERS
            self.accelerator = open_accelerator(self.processes, self.s.precision, self.s.trackers, trackers)
        self.learner = Learner(run.model, self.s, run.steps, self.accelerator)
        self.checkpoints = None if run.folder is None else Checkpoints(run.folder / CHECKPOINTS, keep=self.s.keep)
        self.log = Log(run.folder / LOG if run.folder is not None and self.processes.main else None)
        self.mixup = _mixup(self.s, run.classes)
        self.watch, self.meter = LossWatch(), Meter()
        self.step = 0
        self.seconds, self.started = 0.0, time.monotonic()  # of the run before this process took it up, and when it did
        self.trained = {"samples": 0.0, "seconds": 0.0}  # in steps alone
        self.scores: dict[str, Any] = {"before": None, "after": None, "best": None}
        self.last_good = "there is no checkpoint yet"

    # ------------------------------------------------------------ where it stands

    def go_on(self, *, restart: bool) -> None:
        """Take up the last checkpoint, if there is one, or begin anew. Raises StoreError for one of another run."""
        plain, tensors = None, {}
        with self.processes.together():
            if self.checkpoints is not None and self.processes.main:
                if restart:
                    self.checkpoints.clear()
                if (found := self.checkpoints.latest()) is not None:
                    check_settings(found, self.r.identity)
                    plain = {**found.state, "path": str(found.path)}
                    tensors = {name: found.tensors(name) for name in self.learner.groups}
                self.log.begin(0 if plain is None else plain["log"])
        plain = self.processes.share(plain)
        if plain is None:
            return
        self.learner.restore(tensors, plain)
        self.step, self.seconds, self.trained = plain["step"], plain["seconds"], plain["trained"]
        self.scores, self.meter = plain["scores"], Meter(plain["meter"])
        self.last_good = f"the last good checkpoint is {plain['path']}"

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        tensors, plain = self.learner.state()
        with self.processes.together():
            if self.processes.main:
                for name, tensor in tensors["model"].items():
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise NumericsError(f"{name} holds NaN or infinity after step {self.step}; {self.last_good}")
                self.log.sync()
                state = {
                    **plain,
                    "settings": self.r.identity,
                    "step": self.step,
                    "seconds": self._seconds(),
                    "trained": self.trained,
                    "scores": self.scores,
                    "meter": self.meter.sums,
                    "log": self.log.position,
                }
                path = self.checkpoints.save(self.step, tensors, state)
                self.last_good = f"the last good checkpoint is {path}"

    # ------------------------------------------------------------ steps

    def run(self) -> None:
        """All steps that are left, with evaluations, lines in the log and checkpoints on the way."""
        from tqdm.auto import tqdm

        per_epoch = self.r.data.steps()
        evaluate_every = max(1, round(self.s.eval_every * per_epoch))
        self.accelerator.init_trackers("comcat", config=_plain(self.s))
        if self.step == 0:
            self.scores["before"] = self._evaluated()
        ours, theirs = self.r.features
        bar = tqdm(total=self.r.steps, initial=self.step, desc="tune", unit="step", disable=not self.progress)
        shown: dict[str, str] = {}
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.enter_context(ours.kept_from(self.learner.bare))
            if self.r.teacher is not None:
                stack.enter_context(theirs.kept_from(self.r.teacher.model))
            mark = time.monotonic()
            for batch, weight in self._batches():
                seed_all(derive_seed(self.s.seed, "step", self.step, self.processes.index))
                self._learn(batch, weight)
                self.step += 1
                took = time.monotonic() - mark
                self.meter.add({"took": took})
                self.trained = {
                    "samples": self.trained["samples"] + weight, "seconds": self.trained["seconds"] + took
                }  # fmt: skip
                bar.update()
                ended = self.step == self.r.steps
                judge = self.r.evaluation is not None and (ended or self.step % evaluate_every == 0)
                if judge or ended or self.step % self.s.log_every == 0:
                    line = self._line(per_epoch, judge)
                    shown |= {
                        word: f"{line[key]:.4g}" for word, key in (("loss", "loss"), ("top-1", "top1")) if key in line
                    }
                    bar.set_postfix(shown)
                if ended or self.step % per_epoch == 0 or self.step % self.s.checkpoint_every == 0:
                    self._save()
                mark = time.monotonic()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """This process's part of every batch that is left, with the number of samples that count in all parts."""
        per_epoch, first, own = self.r.data.steps(), self.step, iter(())
        for step in range(first, self.r.steps):
            epoch, place = divmod(step, per_epoch)
            batch, caught = None, None
            try:
                if place == 0 or step == first:
                    own = self.r.data.epoch(epoch, start=place)
                batch = next(own)
                if self.r.objective.labelled:
                    check_labels(batch.labels, self.r.classes)
            except ComcatError as error:
                caught = error
            weight, failed = self.processes.sums(
                [0.0 if batch is None else float(batch.weights.sum()), caught is not None]
            )
            if failed:
                self.processes.agree(caught)
            assert batch is not None
            yield batch, weight

    def _learn(self, batch: Batch, weight: float) -> None:
        """One update by a batch, whose losses are averaged over the ``weight`` samples that count in all processes."""
        r, device = self.r, self.accelerator.device
        images = batch.images.to(device, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        target = None
        if r.objective.labelled and batch.labels is not None:
            target = batch.labels.to(device, non_blocking=True)
        if self.mixup is not None:
            dummy = torch.zeros(len(images), dtype=torch.long, device=device)  # mixed along where there are no labels
            images, mixed = self.mixup(images, dummy if target is None else target)
            target = None if target is None else mixed
        self.learner.begin(self.step)
        size = len(images) // self.s.accumulate
        sums: Tensor | None = None
        names, reading = [], None
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            last = start + size >= len(images)
            with self.learner.part(last=last):
                values = self._losses(images[part], None if target is None else target[part])
                names, stacked = list(values), torch.stack(list(values.values()))  # (values, part of the batch)
                # The gradients of the processes are averaged, so each counts its own part that many times.
                loss = (values["loss"] * weights[part]).sum() * (self.processes.count / max(weight, 1.0))
                added = (stacked.detach() * weights[part]).sum(1)
                sums = added if sums is None else sums + added
                reading = _Reading(sums, self.processes.count) if last else None
                self.learner.backward(loss)
        assert reading is not None
        found = dict(zip(names, reading.values(), strict=True))
        self.watch.last_good = self.last_good
        try:
            self.watch.check(
                found["loss"] / max(weight, 1.0),
                self.step,
                self.learner.named_parameters(),
                replay=lambda: first_unsound_output(self.learner.bare, images),
            )
        except NumericsError as error:  # in all processes, since all see the same loss
            self.processes.agree(error)
        self.learner.update(self.step)
        self.meter.add({**found, "samples": weight})

    def _losses(self, images: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The loss of each picture, its parts, and whether the label was right: (batch,) each."""
        r = self.r
        ours, theirs = r.features
        logits = None
        if r.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                logits = r.teacher(images)
        heads = heads_of(self.learner.model, images)
        parts = r.objective.parts(heads, target, logits)
        if ours.paths:
            parts["feature_loss"] = feature_loss(ours.take(), theirs.take())
        values = {"loss": r.objective.total(parts, self._feature_weight()), **parts}
        if target is not None:
            right = heads.mean.argmax(1) == (target.argmax(1) if target.ndim == 2 else target)
            values["train_top1"] = 100.0 * right
        return values

    def _feature_weight(self) -> float:
        """Falls linearly to 0 over the first ``feature_decay`` of the run."""
        length = self.s.feature_decay * self.r.steps
        return self.s.feature_weight * max(0.0, 1 - self.step / length) if length else 0.0

    # ------------------------------------------------------------ what is seen

    def _evaluated(self) -> dict[str, Any] | None:
        if self.r.evaluation is None:
            return None
        found = evaluate_together(
            self.learner.judged,
            self.r.evaluation,
            self.r.preprocess,
            self.processes,
            batch_size=max(1, self.r.data.batch_size // self.s.accumulate),
            reference=None if is_classifier(self.learner.bare) else self.r.teacher,
            dtype=_AUTOCAST[self.s.precision],
        )
        return {name: value for name, value in found.to_dict().items() if value is not None}

    def _line(self, per_epoch: int, judge: bool) -> dict[str, Any]:
        """Write a line of the log: means over the steps since the last one, and an evaluation if it is time for one."""
        took, samples = self.meter.sums.pop("took"), self.meter.sums["samples"]
        line = {
            "step": self.step,
            "epoch": self.step / per_epoch,
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
                self.scores["best"] = {"step": self.step, "top1": found["top1"]}
        line |= {"seconds": self._seconds(), "images_per_second": samples / took}
        with self.processes.together():
            self.log.write(line)
        self.accelerator.log(line, step=self.step)
        return line

    def _seconds(self) -> float:
        """Of the whole run so far, evaluation and checkpoints included; a part that was lost to a kill is not."""
        return self.seconds + time.monotonic() - self.started

    def result(self) -> dict[str, Any]:
        """What the record says of the run, in all processes: plain data."""
        lines = self.processes.share(self.log.lines)
        return {
            "steps": self.r.steps,
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


class _Reading:
    """Sums over all processes, on their way to the CPU while the accelerator works on: reading them at once would idle it."""

    def __init__(self, sums: Tensor, processes: int) -> None:
        if processes > 1:
            dist.all_reduce(sums)
        self._host = sums.to("cpu", non_blocking=True)
        self._there = None
        if sums.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def values(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def _mixup(settings: TuneSettings, classes: int) -> Any:
    if not (settings.mixup or settings.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )


def _plain(settings: TuneSettings) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in asdict(settings).items()}

"""What a tuning run does: one step after the other, on the loop of :mod:`comcat.runs.loop`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..runs.loop import Run
from ..runs.processes import open_accelerator
from ..runs.seeding import derive_seed, seed_all
from ..runs.watching import LossWatch, first_unsound_output
from .data import Batch, Feed
from .journal import Journal
from .learner import Learner
from .losses import feature_loss, heads_of, train_both_heads
from .settings import TuneSettings
from .setup import TRACKERS, Setup


class Training(Run):
    """A model in training, its batches, and what is noted of it."""

    name = "tune"

    def __init__(self, setup: Setup) -> None:
        self.setup, self.settings, self.processes = setup, setup.settings, setup.processes
        self.steps, self.identity = setup.steps, setup.identity
        train_both_heads(setup.model)
        with self.processes.together():
            self.accelerator = open_accelerator(
                self.processes, self.settings.precision, self.settings.trackers, setup.place(TRACKERS)
            )
        self.learner = Learner(setup.model, self.settings, setup.steps, self.accelerator)
        self.feed = Feed(setup.data, self.processes, classes=setup.classes if setup.objective.labelled else None)
        self.journal = Journal(setup, self.learner, self.accelerator)
        self.mixup = _mixup(self.settings, setup.classes)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While the block lasts, steps can be made."""
        ours, theirs = self.setup.features
        with ExitStack() as stack:
            stack.callback(self.feed.close)
            stack.enter_context(self.journal.tracked())
            stack.enter_context(ours.kept_from(self.learner.bare))
            if self.setup.teacher is not None:
                stack.enter_context(theirs.kept_from(self.setup.teacher.model))
            yield

    def step(self, number: int, watch: LossWatch) -> Mapping[str, Any]:
        """One update by a batch, whose losses are averaged over the samples that count in all processes."""
        started = time.monotonic()
        batch, count = self.feed.batch(number)
        seed_all(derive_seed(self.settings.seed, "step", number, self.processes.index))
        # ------------------------------------------------------------ the training step
        images, target, weights = self._shown(batch)
        self.learner.begin(number)
        sums: Tensor | None = None
        names, reading = [], None
        size = len(images) // self.settings.accumulate
        for start in range(0, len(images), size):
            part, last = slice(start, start + size), start + size >= len(images)
            with self.learner.part(last=last):
                losses = self._losses(number, images[part], None if target is None else target[part])
                # The gradients of the processes are averaged, so each counts its own part that many times.
                loss = (losses["loss"] * weights[part]).sum() * (self.processes.count / max(count, 1.0))
                names, added = list(losses), (torch.stack(list(losses.values())).detach() * weights[part]).sum(1)
                sums = added if sums is None else sums + added
                reading = _Reading(sums, self.processes.count) if last else None
                self.learner.backward(loss)
        assert reading is not None
        found = dict(zip(names, reading.values(), strict=True))
        watch.check(
            found["loss"] / max(count, 1.0),
            number,
            self.learner.named_parameters(),
            replay=lambda: first_unsound_output(self.learner.bare, images),
        )
        self.update(number)
        # ------------------------------------------------------------
        self.journal.add(found, count, time.monotonic() - started)
        return self.journal.note(number + 1)

    def update(self, number: int) -> None:
        """Change the weights by the gradients of a step's batch."""
        self.learner.update(number)

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """A batch on the device: images (batch, channels, height, width), what they show, and weights (batch,).

        Images are mixed where mixup or cutmix is on. What they show is None where it is not learnt.
        """
        device = self.accelerator.device
        images = batch.images.to(device, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        target = None
        if self.setup.objective.labelled and batch.labels is not None:
            target = batch.labels.to(device, non_blocking=True)
        if self.mixup is not None:
            dummy = torch.zeros(len(images), dtype=torch.long, device=device)  # mixed along where there are no labels
            images, mixed = self.mixup(images, dummy if target is None else target)
            target = None if target is None else mixed
        return images, target, weights

    def _losses(self, number: int, images: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The loss of each picture, its parts, and whether the label was right: (batch,) each."""
        setup = self.setup
        ours, theirs = setup.features
        logits = None
        if setup.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                logits = setup.teacher(images)
        heads = heads_of(self.learner.model, images)
        parts = setup.objective.parts(heads, target, logits)
        if ours.paths:
            parts["feature_loss"] = feature_loss(ours.take(), theirs.take())
        losses = {"loss": setup.objective.total(parts, self._feature_weight(number)), **parts}
        if target is not None:
            right = heads.mean.argmax(1) == (target.argmax(1) if target.ndim == 2 else target)
            losses["train_top1"] = 100.0 * right
        return losses

    def _feature_weight(self, number: int) -> float:
        """Falls linearly to 0 over the first ``feature_decay`` of the run."""
        length = self.settings.feature_decay * self.steps
        return self.settings.feature_weight * max(0.0, 1 - number / length) if length else 0.0

    # ------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.learner.tensors()

    def state(self) -> dict[str, Any]:
        return {**self.learner.state(), **self.journal.state()}

    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.journal.restore(state)
        self.learner.restore(tensors, state)


class _Reading:
    """Sums over all processes, on their way to the CPU: the accelerator would be idle if they were read at once."""

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

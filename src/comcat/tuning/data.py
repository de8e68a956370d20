"""Training data whose order and augmentation depend on the seed and the epoch alone.

Neither the number of processes or workers nor where a run was interrupted changes which samples a step sees, or how
they are augmented. So a run can go on in the middle of an epoch, and two processes see the batches that one would.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.pictures import Pictures, whole_number
from ..data.reading import Unreadable, attempt
from ..data.sources import Entry
from ..errors import ComcatError, DataError, SettingsError, counted
from ..models import in_classes_of
from ..runs.processes import Processes
from ..runs.seeding import derive_seed, seeded

_HOPELESS = 100  # data whose first so many samples are all unreadable is read no further


class Batch(NamedTuple):
    """A process's part of a global batch; ``skipped`` names the unreadable pictures in it as ``"key: reason"``."""

    images: Tensor  # (batch, channels, height, width) float32
    labels: Tensor | None  # (batch,) int64
    weights: (
        Tensor  # (batch,) float32; 0 for what does not count: padding, and unreadable pictures (which are all zeros)
    )
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Batches of augmented pictures for one process of a run.

    An epoch is ``count`` samples (by default as many as there are pictures) in an order of its own, that of
    :meth:`Pictures.read <comcat.data.Pictures.read>` with a seed made of ``seed`` and the epoch. Its global batch b
    holds the samples at positions [b·G, (b+1)·G), G = ``batch_size`` × ``processes``, and process p has the p-th of its
    equal slices: each sample is seen once an epoch over all processes. The last global batch is filled up with its own
    samples again, at weight 0, so that all batches have one shape.

    With ``repeats`` R > 1, every picture takes R positions in a row, each augmented differently, and the epoch ends
    after ``count`` samples all the same, so that it shows a different R-th of the pictures (repeated augmentation,
    Hoffer et al. 2020, as DeiT samples it).

    ``transform`` makes a tensor of a picture of mode ``"L"`` or ``"RGB"``; it may draw from the generators of Python,
    numpy and torch, which are seeded by the epoch and the position before each sample.

    Only a few batches are in memory at a time. Where pictures cannot be reached one by one (tar shards, parquet files,
    hub data sets), every process, and every one of its worker processes, reads the whole stream and decodes its own
    samples alone.

    Attributes:
        batch_size: samples of a batch of this process. process: this one's number, from 0, of ``processes``.
        workers: processes that decode ahead; 0: none, this one does.
        count: samples an epoch; needed where the number of pictures is unknown, and at most that number where it is
            known.
    """

    pictures: Pictures
    transform: Callable[[Image.Image], Tensor]
    batch_size: int
    seed: int = 0
    repeats: int = 1
    processes: int = 1
    process: int = 0
    workers: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats", "processes"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("process", "workers"):
            whole_number(name, getattr(self, name), least=0)
        whole_number("seed", self.seed)
        if self.process >= self.processes:
            raise SettingsError(f"process: got {self.process}, expected one below {self.processes}")
        if self.count is not None:
            whole_number("count", self.count, least=1)
            if self.pictures.count is not None and self.count > self.pictures.count:
                raise SettingsError(
                    f"an epoch of {counted(self.count, 'sample')} (--epoch-size): "
                    f"{self.pictures.name} has {counted(self.pictures.count, 'picture')}"
                )

    @cached_property
    def samples(self) -> int:
        """Samples an epoch, over all processes. Raises DataError where nobody knows."""
        known = self.pictures.count if self.count is None else self.count
        if known is None:
            raise DataError(
                f"{self.pictures.name} is a stream of unknown length: "
                "say how many pictures make an epoch, --epoch-size N"
            )
        if not known:
            raise DataError(f"{self.pictures.name}: no pictures")
        return known

    @property
    def global_batch(self) -> int:
        """Samples of a batch over all processes."""
        return self.batch_size * self.processes

    def steps(self) -> int:
        """Global batches an epoch.

        Raises DataError where the number of pictures is unknown and ``count`` does not say it.
        """
        return -(-self.samples // self.global_batch)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This process's part of the global batches ``start``, ``start`` + 1, … of an epoch.

        Raises:
            DataError: where more pictures than the limit allows are unreadable, or a stream ends too early.
        """
        if start >= self.steps():
            return
        shares: Any = self._batches(epoch, start, 1)
        if self.workers:
            shares = DataLoader(
                _Worker(self, epoch, start),
                batch_size=None,
                num_workers=min(self.workers, self.steps() - start),
                collate_fn=_same,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # it would draw from the common one
            )
        skipped, seen = [], 0
        self.pictures.skipped = skipped
        for batch in shares:
            if isinstance(batch, DataError):
                raise batch
            batch = Batch(*batch)
            if batch.skipped and not skipped:
                key, _, reason = batch.skipped[0].partition(": ")
                warnings.warn(
                    f"{key} of {self.pictures.name} cannot be read ({reason}) and is left out, like all such",
                    stacklevel=2,
                )
            skipped += batch.skipped
            seen += len(batch.weights)
            self._check_readable(skipped, seen)
            yield batch

    def _check_readable(self, skipped: list[str], seen: int) -> None:
        limit, share = self.pictures.max_unreadable, -(-self.samples // self.processes)
        if len(skipped) > limit * share or len(skipped) == seen >= _HOPELESS:
            raise DataError(
                f"{len(skipped)} of the first {counted(seen, 'sample')} of {self.pictures.name} cannot be read, "
                f"and at most {limit:.0%} may be unreadable (max_unreadable): "
                f"{'; '.join(skipped[:3])}{'; …' if len(skipped) > 3 else ''}"
            )

    def _batches(self, epoch: int, first: int, stride: int) -> Iterator[Batch]:
        """This process's part of the global batches ``first``, ``first`` + ``stride``, …"""
        last = self.steps() - 1
        size = self.global_batch

        def wanted(picture: int) -> bool:
            for position in range(picture * self.repeats, (picture + 1) * self.repeats):
                batch, place = divmod(position, size)
                mine = (
                    batch == last or place // self.batch_size == self.process
                )  # the last one is filled up with itself
                if mine and first <= batch <= last and (batch - first) % stride == 0:
                    return True
            return False

        entries = self.pictures.entries(derive_seed(self.seed, "epoch", epoch), wanted)
        held: dict[int, Entry] = {}
        for batch in range(first, last + 1, stride):
            positions = self._positions(batch)
            needed = {shown // self.repeats for _, shown in positions}
            held = {picture: entry for picture, entry in held.items() if picture in needed}
            while needed - held.keys():
                picture, entry = next(entries, (None, None))
                if picture is None or entry is None:
                    raise DataError(
                        f"{self.pictures.name} has fewer pictures than the {self.samples} of an epoch (--epoch-size)"
                    )
                if picture in needed:
                    held[picture] = entry
            yield self._batch(epoch, [(position, shown, held[shown // self.repeats]) for position, shown in positions])

    def _positions(self, batch: int) -> list[tuple[int, int]]:
        """Of each sample of this process in a global batch: its position, and the position whose picture it shows."""
        start = batch * self.global_batch
        real = min(self.samples - start, self.global_batch)
        mine = range(self.process * self.batch_size, (self.process + 1) * self.batch_size)
        return [(start + place, start + place % real) for place in mine]

    def _batch(self, epoch: int, samples: list[tuple[int, int, Entry]]) -> Batch:
        images: dict[int, Tensor] = {}  # by place; unreadable pictures have none
        skipped = []
        for place, (position, shown, entry) in enumerate(samples):
            with seeded(derive_seed(self.seed, "sample", epoch, position)):
                made = attempt(entry, self.transform)
            if not isinstance(made, Unreadable):
                images[place] = made
            elif position == shown:
                skipped.append(f"{entry.key}: {made.reason}")
        shapes = {image.shape for image in images.values()}
        if len(shapes) > 1:
            raise DataError(f"transformed pictures have different shapes: {sorted(map(tuple, shapes))}")
        blank = torch.zeros(shapes.pop() if shapes else self._shape())
        labels = None
        if self.pictures.has_labels:
            labels = torch.tensor([entry.label for _, _, entry in samples])
        counts = [place in images and position == shown for place, (position, shown, _) in enumerate(samples)]
        stacked = torch.stack([images.get(place, blank) for place in range(len(samples))]).float()
        return Batch(stacked, labels, torch.tensor(counts, dtype=torch.float32), skipped)

    def _shape(self) -> torch.Size:
        """Of a transformed picture, asked of a blank one where no other can be read."""
        with seeded(0):
            return self.transform(Image.new("RGB", (64, 64))).shape


class Feed:
    """The batches of a run by their number, epoch after epoch; what goes wrong with one in a process is raised in all.

    Args:
        classes: how many the model has, which labels must be among; None where nobody looks at labels.
    """

    def __init__(self, data: TrainingData, processes: Processes, classes: int | None = None) -> None:
        self.data, self.processes, self.classes = data, processes, classes
        self._next, self._open = -1, iter(())

    def batch(self, number: int) -> tuple[Batch, float]:
        """This process's part of a batch, and the number of samples that count in all parts.

        All processes must call it.
        Batches in a row are read in one go, others from a new start. Raises DataError as :meth:`TrainingData.epoch`
        does, and for labels that are no classes.
        """
        batch, caught = None, None
        try:
            batch = self._read(number)
        except ComcatError as error:
            caught = error
        count, failed = self.processes.sums([0.0 if batch is None else float(batch.weights.sum()), caught is not None])
        if failed:
            self.processes.agree(caught)
        assert batch is not None
        return batch, count

    def _read(self, number: int) -> Batch:
        epoch, place = divmod(number, self.data.steps())
        if place == 0 or number != self._next:
            self.close()
            self._open = self.data.epoch(epoch, start=place)
        batch = next(self._open)
        self._next = number + 1
        if self.classes is not None:
            check_labels(batch.labels, self.classes)
        return batch

    def close(self) -> None:
        """Let go of what is open: files, and the processes that read ahead."""
        self._next, self._open = -1, iter(())


def open_labelled(model: nn.Module, source: Pictures | str | os.PathLike[str]) -> Pictures:
    """Pictures, or what :func:`comcat.open_pictures` takes, labelled as a model counts its classes.

    Warns where that is not certain.
    """
    pictures, note = in_classes_of(model, source)
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return pictures


def check_labels(labels: Tensor | None, classes: int) -> None:
    """Raises DataError on a label that is no class of a model of so many."""
    if labels is not None and len(wrong := labels[(labels < 0) | (labels >= classes)]):
        raise DataError(
            f"got the label {int(wrong[0])}, expected 0 to {classes - 1}: the model has {counted(classes, 'class')}"
        )


class _Worker(IterableDataset):
    """What each worker process gives: whole batches, by turns, so that together they come in order."""

    def __init__(self, data: TrainingData, epoch: int, start: int) -> None:
        self.data, self.epoch, self.start = data, epoch, start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self.data._batches(self.epoch, self.start + info.id, info.num_workers)
        except DataError as error:
            yield error  # else it would arrive with a traceback as its message


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that reads from this: its step shall end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _same(item: Any) -> Any:
    return item

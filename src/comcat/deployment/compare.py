"""How like its model an exported file computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError, counted
from .settings import Precision

TOLERANCES = {"float32": 1e-4, "float16": 3e-2}
"""Largest error of an output, relative to its largest value. int8 is held to what it may lose alone."""

ROUNDINGS, TRIES = (1e-6, 3e-6, 1e-5), 12
"""By how much of themselves pixels change, and how often by each, to see whether a model's own output is settled."""
UNSETTLED = 0.1
"""The share of the pictures on which a model may be so."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file against the model that it was made from, picture by picture.

    Attributes:
        count, source: how many pictures, and in words which. real: False if they were generated.
        unsettled: pictures on which rounding decides what the model says: where tokens are merged, two may be alike to
            the last digit. The file differs there by more than the tolerance, but by no more than twice what the model
            does from itself when pixels change by some millionths. They are left out of the errors.
        max_error: largest difference of any output. relative_error: the same in parts of that output's largest value.
        agreement: of classifiers, per cent of the pictures whose likeliest class is the same. cosine: mean cosine of
            the outputs. iou: of dense outputs, intersection over union of the two answers, averaged over classes.
    """

    count: int
    source: str
    real: bool
    max_error: float
    relative_error: float
    cosine: float
    agreement: float | None = None
    iou: float | None = None
    unsettled: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def lost(self) -> float:
        """What of the agreement is gone, as a share: of classes, of areas, or of the cosine where there are neither."""
        if self.agreement is not None:
            return 1 - self.agreement / 100
        return 1 - (self.cosine if self.iou is None else self.iou)

    def __str__(self) -> str:
        said = [f"largest error {self.max_error:.2g} ({self.relative_error:.2g} of the largest output)"]
        if self.agreement is not None:
            said.append(f"agreement {self.agreement:.2f} %")
        if self.iou is not None:
            said.append(f"IoU {self.iou:.4f}")
        if self.unsettled:
            said.append(f"{counted(self.unsettled, 'picture')} apart on which rounding decides")
        return f"{', '.join(said)}, cosine {self.cosine:.6f}, on {self.count} {self.source}"


def compare(
    reference: Callable[[Tensor], Outputs],
    other: Callable[[Tensor], Outputs],
    batches: Sequence[Tensor],
    *,
    source: str,
    real: bool,
    tolerance: float = math.inf,
) -> Comparison:
    """Run both on the batches and compare all outputs. A NaN or infinity on one side alone is an infinite error. Beyond
    the ``tolerance`` it is asked whether the model's own output is settled (``unsettled``).
    """
    tally = _Tally()
    for images in batches:
        ours, theirs = reference(images), other(images)
        _check_alike(ours, theirs)
        largest = {name: max(value.abs().max().item(), 1e-6) for name, value in ours.items()}
        errors = _errors(ours, theirs)
        apart = _in_parts(errors, largest)
        unsettled = torch.zeros(len(apart), dtype=torch.bool)
        if (beyond := (apart > tolerance) & apart.isfinite()).any():
            unsettled[beyond] = apart[beyond] <= 2 * _moved(reference, images, ours, largest, beyond)
        tally.add(ours, theirs, errors, unsettled)
    return tally.result(source, real)


def _check_alike(ours: Outputs, theirs: Outputs) -> None:
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        shapes = [{n: tuple(t.shape) for n, t in side.items()} for side in (theirs, ours)]
        raise ExportError(f"the file gives {shapes[0]}, the model {shapes[1]}: they are not the same")


def _errors(ours: Outputs, theirs: Outputs) -> Outputs:
    """The largest difference of each output, picture by picture: (batch,) each."""
    return {
        name: (value.double() - theirs[name].double()).abs().reshape(len(value), -1).amax(1)
        for name, value in ours.items()
    }


def _in_parts(errors: Outputs, largest: dict[str, float]) -> Tensor:
    """The largest of any output, in parts of that output's largest value: (batch,)."""
    return torch.stack([error / largest[name] for name, error in errors.items()]).amax(0)


def _moved(
    reference: Callable[[Tensor], Outputs], images: Tensor, ours: Outputs, largest: dict[str, float], some: Tensor
) -> Tensor:
    """How far the model's own outputs move on some pictures when their pixels change by a rounding: (pictures,)."""
    images, ours = images[some], {name: value[some] for name, value in ours.items()}
    moved = torch.zeros(len(images), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for size in ROUNDINGS * TRIES if images.is_floating_point() else ():
        noise = torch.randn(images.shape, generator=generator).to(images)
        moved = torch.maximum(moved, _in_parts(_errors(ours, reference(images * (1 + size * noise))), largest))
    return moved


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.count, self.cosine, self.same, self.unsettled = 0, 0.0, 0, 0
        self.errors: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.overlap: dict[int, tuple[int, int]] = {}
        self.votes = self.dense = False

    def add(self, ours: Outputs, theirs: Outputs, errors: Outputs, unsettled: Tensor) -> None:
        self.unsettled += int(unsettled.sum())
        for name, value in ours.items():
            settled = errors[name][~unsettled]
            error = settled.max().item() if len(settled) else 0.0
            self.errors[name] = max(self.errors.get(name, 0.0), error if math.isfinite(error) else math.inf)
            self.largest[name] = max(self.largest.get(name, 0.0), value.abs().max().item())
        name = "logits" if "logits" in ours else next(iter(ours))
        mine, other = ours[name].float(), theirs[name].float()
        self.count += len(mine)
        self.cosine += F.cosine_similarity(mine.flatten(1), other.flatten(1)).sum().item()
        if mine.dim() == 2 and name == "logits":
            self.votes = True
            self.same += int((mine.argmax(1) == other.argmax(1)).sum())
        elif mine.dim() == 4:
            self.dense = True
            self._add_areas(mine, other)

    def _add_areas(self, mine: Tensor, other: Tensor) -> None:
        """(batch, classes, height, width). One channel is a mask: of probabilities above ½, of logits above 0."""
        if mine.shape[1] == 1:
            middle = 0.5 if 0 <= mine.min() and mine.max() <= 1 else 0.0
            answers = (mine > middle).long(), (other > middle).long()
            classes = torch.tensor([1])
        else:
            answers = mine.argmax(1), other.argmax(1)
            classes = answers[0].unique()
        for number in classes.tolist():
            a, b = (answer == number for answer in answers)
            both, either = self.overlap.get(number, (0, 0))
            self.overlap[number] = both + int((a & b).sum()), either + int((a | b).sum())

    def result(self, source: str, real: bool) -> Comparison:
        shares = [both / either for both, either in self.overlap.values() if either]
        return Comparison(
            count=self.count,
            source=source,
            real=real,
            max_error=max(self.errors.values()),
            relative_error=max(error / max(self.largest[name], 1e-6) for name, error in self.errors.items()),
            cosine=self.cosine / self.count,
            agreement=100 * self.same / self.count if self.votes else None,
            iou=(sum(shares) / len(shares) if shares else 1.0) if self.dense else None,
            unsettled=self.unsettled,
        )


def check(found: Comparison, precision: Precision, lose_at_most: float) -> None:
    """Raise ExportError unless a file is as like its model as its precision allows."""
    tolerance = TOLERANCES.get(precision, math.inf)
    if not (math.isfinite(found.max_error) and found.relative_error <= tolerance):
        raise ExportError(
            f"the exported file does not compute what the model does: {found}; "
            f"expected an error of at most {tolerance:g} of the largest output. Nothing was written"
        )
    if found.unsettled > UNSETTLED * found.count:
        raise ExportError(
            f"rounding decides what the model says on {found.unsettled} of {found.count} pictures, so the file cannot "
            f"be told from a wrong one: {found}. Nothing was written"
        )
    if precision != "float32" and not found.lost <= lose_at_most:
        raise ExportError(
            f"{precision} loses {found.lost:.1%} of the agreement: {found}; expected at most {lose_at_most:.1%} "
            "(lose_at_most, --lose-at-most). Nothing was written"
        )

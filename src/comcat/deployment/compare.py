"""How like its model an exported file computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError
from .settings import Precision

TOLERANCES = {"float32": 1e-4, "float16": 3e-2}
"""Largest error of an output, relative to its largest value. int8 is held to what it may lose alone."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file against the model that it was made from, picture by picture.

    Attributes:
        count, source: how many pictures, and in words which. real: False if they were generated.
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
        return f"{', '.join(said)}, cosine {self.cosine:.6f}, on {self.count} {self.source}"


def compare(
    reference: Callable[[Tensor], Outputs],
    other: Callable[[Tensor], Outputs],
    batches: Sequence[Tensor],
    *,
    source: str,
    real: bool,
) -> Comparison:
    """Run both on the batches and compare all outputs. A NaN or infinity on one side alone is an infinite error."""
    tally = _Tally()
    for images in batches:
        tally.add(reference(images), other(images))
    return tally.result(source, real)


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.count, self.cosine, self.same = 0, 0.0, 0
        self.errors: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.overlap: dict[int, tuple[int, int]] = {}
        self.votes = self.dense = False

    def add(self, ours: Outputs, theirs: Outputs) -> None:
        if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
            shapes = [{n: tuple(t.shape) for n, t in side.items()} for side in (theirs, ours)]
            raise ExportError(f"the file gives {shapes[0]}, the model {shapes[1]}: they are not the same")
        for name, value in ours.items():
            error = (value.double() - theirs[name].double()).abs().max().item()
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
        )


def check(found: Comparison, precision: Precision, lose_at_most: float) -> None:
    """Raise ExportError unless a file is as like its model as its precision allows."""
    tolerance = TOLERANCES.get(precision, math.inf)
    if not (math.isfinite(found.max_error) and found.relative_error <= tolerance):
        raise ExportError(
            f"the exported file does not compute what the model does: {found}; "
            f"expected an error of at most {tolerance:g} of the largest output. Nothing was written"
        )
    if precision != "float32" and not found.lost <= lose_at_most:
        raise ExportError(
            f"{precision} loses {found.lost:.1%} of the agreement: {found}; expected at most {lose_at_most:.1%} "
            "(lose_at_most, --lose-at-most). Nothing was written"
        )

"""Scores that can be recomputed: what a model did on every picture, how sure that is, and differences between methods.

A score is a mean of ratios of sums over pictures. Its table has a numerator and a denominator for every picture, so
that top-1 (right / 1), a mean over pictures (IoU / 1) and IoU over all pixels (intersections / unions, one column a
class) are one thing. ``±`` is the standard deviation over seeds everywhere. Beside it stands the error of having
judged these pictures and no others, from a bootstrap (Efron 1979) that draws whole photographs, since crops of one
photograph are alike.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


@dataclass(frozen=True)
class Table:
    """What one model did: ``numerator`` and ``denominator`` are (pictures, columns)."""

    numerator: NDArray[Any]
    denominator: NDArray[Any]

    @classmethod
    def of_means(cls, values: NDArray[Any]) -> Table:
        """A table whose score is the mean of one value a picture (pictures,)."""
        return cls(values[:, None], np.ones((len(values), 1), dtype=bool))

    def score(self, weights: NDArray[Any] | None = None) -> Any:
        """100 × the mean over columns of Σ numerator / Σ denominator.

        ``weights`` (…, pictures) says how often each picture counts; by default once. Gives (…).
        """
        top, bottom = (a.astype(np.float64) for a in (self.numerator, self.denominator))
        if weights is None:
            return float(100 * (top.sum(0) / bottom.sum(0)).mean())
        return 100 * (weights @ top / (weights @ bottom)).mean(-1)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        return {"numerator": packed(self.numerator), "denominator": packed(self.denominator)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Table:
        return cls(unpacked(data["numerator"]), unpacked(data["denominator"]))


def packed(values: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON holds it: booleans as bits, compressed, in base64."""
    raw = np.packbits(values) if values.dtype == bool else values
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(raw).tobytes(), 9)).decode()
    return {"dtype": values.dtype.str, "shape": list(values.shape), "zlib_base64": data}


def unpacked(data: dict[str, Any]) -> NDArray[Any]:
    """The inverse of :func:`packed`."""
    raw, dtype = zlib.decompress(base64.b64decode(data["zlib_base64"])), np.dtype(data["dtype"])
    if dtype.kind == "b":
        count = int(np.prod(data["shape"]))
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(bool).reshape(data["shape"])
    return np.frombuffer(raw, dtype).reshape(data["shape"]).copy()


def resamples(origins: NDArray[Any], times: int = RESAMPLES, seed: int = 0) -> NDArray[Any]:
    """How often each picture counts in each resample (times, pictures): photographs are drawn with replacement."""
    _, group = np.unique(origins, return_inverse=True)
    groups = int(group.max()) + 1
    counts = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=times)
    return counts[:, group].astype(np.float32)


def picture_error(tables: Sequence[Table], weights: NDArray[Any]) -> float:
    """Standard error of the mean score of some tables (one a seed), from the choice of pictures."""
    return float(np.mean([t.score(weights) for t in tables], axis=0).std(ddof=1))


def summary(tables: Sequence[Table], weights: NDArray[Any]) -> dict[str, Any]:
    """Mean score over seeds, its standard deviation (None for one seed), and the error from the choice of pictures."""
    scores = [t.score() for t in tables]
    return {
        "mean": float(np.mean(scores)),
        "std": _deviation(scores),
        "picture_error": picture_error(tables, weights),
        "scores": scores,
    }


def paired(ours: Sequence[Table], theirs: Sequence[Table], weights: NDArray[Any]) -> dict[str, Any]:
    """The difference of two methods' scores, ours − theirs, seed by seed and picture by picture.

    A method without data has one table, which stands against each seed of the other. ``std`` is the standard
    deviation of the paired differences over seeds, ``seed_error`` the mean's standard error by it (std / √seeds),
    ``picture_error`` that from the choice of pictures, paired as well.
    """
    count = max(len(ours), len(theirs))
    pairs = [(ours[i if len(ours) > 1 else 0], theirs[i if len(theirs) > 1 else 0]) for i in range(count)]
    differences = [a.score() - b.score() for a, b in pairs]
    drawn = np.mean([a.score(weights) - b.score(weights) for a, b in pairs], axis=0)
    std = _deviation(differences)
    return {
        "mean": float(np.mean(differences)),
        "std": std,
        "seed_error": None if std is None else std / count**0.5,
        "picture_error": float(drawn.std(ddof=1)),
        "differences": differences,
    }


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None

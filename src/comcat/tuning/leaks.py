"""Whether training has seen what it is judged by."""

from __future__ import annotations

import os
from contextlib import closing
from itertools import islice
from pathlib import Path

from ..data import Pictures
from ..data.decoding import content_hash
from ..data.reading import default_workers
from ..errors import DataError, counted

SAMPLE = 4096
"""So many pictures of each set are compared. If a share f of the evaluation set is in the training set, f · SAMPLE² /
(training pictures) are expected to be found."""


def same_place(a: str, b: str) -> bool:
    """Whether two names of data sets are the same, or the same path."""
    return a == b or (Path(a).exists() and Path(b).exists() and Path(a).resolve() == Path(b).resolve())


def check_sources(data: object, evaluation: object) -> None:
    """Raises DataError where both are names of one place. Pictures that are open already are told apart by their
    pixels.
    """
    names = (data, evaluation)
    if all(isinstance(name, str | os.PathLike) for name in names) and same_place(*(os.fspath(n) for n in names)):  # type: ignore[arg-type]
        raise DataError(
            f"the pictures and the evaluation set are both {os.fspath(evaluation)!r}: "  # type: ignore[arg-type]
            "accuracy on what a model was made from says nothing; give separate ones"
        )


def check_apart(training: Pictures, evaluation: Pictures, sample: int = SAMPLE) -> str:
    """Raises DataError if pictures of both sets have the same pixels.

    Returns a sentence that says how many were compared.

    Of each set, a random sample of at most ``sample`` pictures is decoded and hashed (of a stream, as random as
    its shuffle buffer makes it), so that it takes seconds whatever the sets' size.
    """
    ours, theirs = _hashes(training, sample), _hashes(evaluation, sample)
    if shared := len(ours & theirs):
        raise DataError(
            f"the evaluation set {evaluation.name} shares {shared} of its {counted(len(theirs), 'picture')} with the "
            f"{len(ours)} of the training set {training.name}: accuracy there would not be honest"
        )
    return (
        f"None of {counted(len(theirs), 'evaluation picture', '{:,}'.format)}{_of(evaluation, sample)} is among "
        f"{counted(len(ours), 'training picture', '{:,}'.format)}"
        f"{_of(training, sample)}, by their pixels."
    )


def _hashes(pictures: Pictures, sample: int) -> frozenset[str]:
    with closing(pictures.read(content_hash, seed=0, workers=default_workers())) as read:
        return frozenset(digest for digest, _ in islice(read, sample))


def _of(pictures: Pictures, sample: int) -> str:
    return "" if pictures.count is not None and pictures.count <= sample else " drawn at random"

"""How pictures are divided, so that nothing is judged by what it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from ..data import Pictures, overlap
from ..errors import DataError, counted
from ..tuning.leaks import check_apart

FEW = 20
"""So few pictures are not divided into some to calibrate on and some to measure on."""
HELD_OUT, JUDGED, DECIDING = 0.2, 1000, 2000
"""The share of the pictures that is held out, and how many of these are measured on, or choose the saving, at most."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which pictures are for what.

    Attributes:
        calibration: to calibrate on. training: for a search or tuning; calibration pictures are among them.
        deciding: to measure on how far to go, with ``max_drop``. judged: to measure the result on; ``judged_on`` says
            it.
        notes: what there is to say about it.
    """

    calibration: Pictures
    training: Pictures
    deciding: Pictures | None
    judged: Pictures
    judged_on: str
    notes: tuple[str, ...]


def divide(
    pictures: Pictures,
    evaluation: Pictures | None = None,
    *,
    calibrate: int,
    seed: int,
    max_drop: float | None = None,
    limit: int | None = None,
    trains: bool = False,
) -> Division:
    """Divide pictures into those to calibrate, to train, to decide and to judge on.

    A fifth is held out to judge on, or half of that where ``max_drop`` has the other half decide. With pictures for
    ``evaluation`` these judge. Fewer than 20 pictures are not divided: they serve for everything, and a note says so.

    Args:
        calibrate: how many pictures to calibrate on. seed: of every choice. limit: how many to judge on, at most.
        max_drop: whether pictures are to decide how far to go, and the points that they must resolve.
        trains: whether there will be training, so that no training picture may be among those of ``evaluation`` either.

    Raises:
        DataError: where pictures to calibrate or to train on are also in ``evaluation``.
    """
    few = pictures.count is not None and pictures.count < FEW
    rest, held = (pictures, pictures) if few else pictures.split(HELD_OUT, seed)
    deciding = held
    if max_drop is not None and not few:
        deciding, held = held.split(0.5, seed)  # what chooses the saving does not judge it
    calibration, deciding = rest.take(calibrate, seed), deciding.take(DECIDING, seed)
    judged = held.take(JUDGED, seed) if evaluation is None else evaluation
    judged = judged if limit is None else judged.take(limit, seed)
    judged_on = in_words(judged, pictures if evaluation is None else evaluation)
    training = rest if evaluation is None else pictures
    notes = []
    if few and (evaluation is None or max_drop is not None):
        served = "calibrate and to measure" if evaluation is None else "calibrate and to choose the saving"
        notes.append(
            f"{pictures.name} has only {counted(len(pictures), 'picture')}, which served to {served} alike: "
            "what was measured on them flatters the result."
        )
    elif evaluation is None:
        judged_on += " that calibration did not see"
        notes.append(f"Measured on {judged_on}, for want of an evaluation set.")
    if evaluation is not None:
        notes += _apart(calibration, training, judged, trains)
    if max_drop is not None:
        notes += _resolution(deciding, max_drop)
    return Division(
        calibration=calibration,
        training=training,
        deciding=None if max_drop is None else deciding,
        judged=judged,
        judged_on=judged_on,
        notes=tuple(notes),
    )


def in_words(part: Pictures, whole: Pictures) -> str:
    """Some pictures of a whole, counted and named."""
    return f"pictures of {whole.name}" if part.count is None else f"{counted(part.count, 'picture')} of {whole.name}"


def _apart(calibration: Pictures, training: Pictures, judged: Pictures, trains: bool) -> list[str]:
    if shared := overlap(calibration, judged):
        raise DataError(
            f"{shared} of the pictures to calibrate on are also in the evaluation set {judged.name}: "
            "accuracy there would not be honest"
        )
    return [check_apart(training, judged)] if trains else []


def _resolution(deciding: Pictures, max_drop: float) -> list[str]:
    """Whether a drop of so many points can be told on so many pictures."""
    count = deciding.count
    if not count or 100 / count <= max_drop:
        return []
    return [
        f"max_drop={max_drop:g} cannot be resolved on {counted(count, 'held-out picture')}: one of them is "
        f"{100 / count:.1f} points, and an accuracy measured on so few is uncertain by up to {50 / count**0.5:.0f}."
    ]

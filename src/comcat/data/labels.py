"""Which columns hold the picture and the label, how labels become class indices, and the order of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, counted, nearest

_WHOLE = re.compile(r"[+-]?[0-9]+(?:\.0*)?")  # pandas writes whole numbers with a point where some rows have none
_TOO_LARGE = 2**31
_NEARLY_LABEL = frozenset(
    "class class_id class_name classes category cls label_id label_name labels target targets".split()
)


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """What is known of the labels of a set of pictures as a whole.

    ``origin`` says where they come from (None: there are none), ``absent_because`` why there are none where some were
    expected, ``names`` lists the classes by index (None: labels are numbers alone), ``ordered`` says whether the
    classes are in natural order because nothing else said which, and ``largest`` is the largest label, where all are
    known beforehand.
    """

    origin: str | None = None
    absent_because: str | None = None
    names: tuple[str, ...] | None = None
    ordered: bool = False
    largest: int | None = None


class LabelCoder:
    """From a label as the data has it to the index of its class, checked.

    With ``names``, a label may be one of them or its index; without, only an index. Indices count from 0.
    """

    def __init__(self, names: tuple[str, ...] | None = None) -> None:
        self.names = names
        self._positions = {name: position for position, name in enumerate(names or ())}
        self._twice = {name for name, count in Counter(names or ()).items() if count > 1}

    def __call__(self, raw: object, where: str) -> int:
        """Raises :class:`~comcat.errors.DataError`, naming ``where``, on a label that is no class."""
        if isinstance(raw, str) and raw in self._twice:
            raise DataError(f"{where} has the label {_short(raw)}, the name of two classes")
        if isinstance(raw, str) and raw in self._positions:
            return self._positions[raw]
        if is_missing(raw):
            raise DataError(f"{where} has no label, though other pictures of the set do")
        label = whole(raw)
        if label is None and isinstance(raw, str) and self.names is not None:
            raise DataError(
                f"{where} has the label {_short(raw)}, which is no class of the set{nearest(raw, self.names)}"
            )
        if label is None or not 0 <= label < _TOO_LARGE:
            raise DataError(f"{where} has the label {_short(raw)}; expected a whole number from 0")
        if self.names is not None and label >= len(self.names):
            raise DataError(
                f"{where} has the label {label}; expected one below {len(self.names)}, the number of classes"
            )
        return label


def code_labels(
    raws: Sequence[object], where: Callable[[int], str], *, origin: str, names: tuple[str, ...] | None = None
) -> tuple[list[int] | None, Labelling]:
    """The labels of all pictures as indices, and what is known of them.

    ``names`` are the classes where the data lists them; else words are put in natural order and numbered, and whole
    numbers are indices. ``where(row)`` names a picture. Labels come all or not at all: one picture without, or
    with one that is no class, and there are none, since the rest would not be the set that somebody meant to measure.
    """
    missing = [row for row, raw in enumerate(raws) if is_missing(raw)]
    if len(missing) == len(raws):
        return None, Labelling()
    if missing:
        first = f"for {len(missing)} of {counted(len(raws), 'picture')}, the first is {where(missing[0])}"
        return None, _left_out(f"no label in {origin} {first}")
    ordered = False
    if names is None:
        if any(isinstance(raw, str) for raw in raws):
            raws = [str(raw) for raw in raws]
        names = class_names_of(raws)
        ordered = names is not None
    coder = LabelCoder(names)
    labels: list[int] = []
    try:
        labels += (coder(raw, "") for raw in raws)
    except DataError as error:
        return None, _left_out(f"{where(len(labels))}{error}")
    return labels, Labelling(origin=origin, names=names, ordered=ordered, largest=max(labels))


def _short(raw: object) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else f"{text[:56]} …"


def _left_out(reason: str) -> Labelling:
    return Labelling(absent_because=f"{reason}: all labels were left out")


def class_names_of(raws: Iterable[object]) -> tuple[str, ...] | None:
    """The different words among the labels, in natural order; None if there are none, or they spell whole numbers."""
    words = {raw for raw in raws if isinstance(raw, str) and not is_missing(raw)}
    numbers = {whole(word) for word in words}
    if None not in numbers and len(numbers) == len(words):
        return None
    return in_natural_order(words)


def in_natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted with the numbers in them by value, letters whatever their case, as timm's reader of folders does."""
    return tuple(sorted(names, key=lambda name: (_natural_key(name), name)))


def _natural_key(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", name.lower())  # words and numbers by turns
    for place in range(1, len(parts), 2):
        parts[place] = parts[place].lstrip("0")
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def choose_columns(kinds: Mapping[str, str], where: str) -> tuple[str, str | None, list[str]]:
    """The names of the picture column and of the label column, if any, and what there is to say about the choice.

    ``kinds`` maps each column to ``"picture"``, ``"class"`` or another type. A column named ``image`` or ``label``
    goes before others of its kind. Raises :class:`~comcat.errors.DataError` listing the columns if none holds pictures.
    """
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    classes = [name for name, kind in kinds.items() if kind == "class"]
    if "image" not in kinds and not pictures:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
        raise DataError(f"{where} has no column 'image'; its columns: {listed}{nearest('image', kinds)}")
    image = "image" if "image" in kinds else pictures[0]
    if "label" in kinds:
        return image, "label", []
    if classes:
        several = f"{where} has several columns of classes ({', '.join(classes)}); {classes[0]} is used"
        return image, classes[0], [several] if len(classes) > 1 else []
    return image, None, no_label_column(kinds, where)


def no_label_column(columns: Iterable[str], where: str) -> list[str]:
    """What to say where there is no column ``label``, but one of nearly that name."""
    nearly = [name for name in columns if name.lower() in _NEARLY_LABEL or name.lower().endswith(("label", "labels"))]
    return [f"{where} has no column 'label', and {nearly[0]!r} is not read: no labels"] if nearly else []


def is_missing(raw: object) -> bool:
    """Whether a label says that there is none: null, an empty text, NaN, or -1 as data sets of the hub have it."""
    if isinstance(raw, str):
        return not raw.strip() or whole(raw) == -1
    return raw is None or raw != raw or whole(raw) == -1


def whole(raw: object) -> int | None:
    """The whole number that ``raw`` is or spells, or None."""
    if isinstance(raw, str):
        if not _WHOLE.fullmatch(raw := raw.strip()):
            return None
        raw = raw.partition(".")[0]
    try:
        number = int(raw)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(raw, str) or number == raw else None

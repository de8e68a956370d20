"""Which columns hold the picture and the label, and how labels become class indices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from ..errors import DataError, nearest


class LabelCoder:
    """From a label as the data has it to the index of its class, checked.

    With ``names``, a label may be one of them or its index; without, only an index. Indices count from 0.
    """

    def __init__(self, names: tuple[str, ...] | None = None) -> None:
        self.names = names
        self._positions = {name: position for position, name in enumerate(names or ())}

    def __call__(self, raw: object, where: str) -> int:
        """Raises :class:`~comcat.errors.DataError`, naming ``where``, on a label that is no class."""
        if isinstance(raw, str) and raw in self._positions:
            return self._positions[raw]
        label = whole(raw)
        if label is None and raw is None:
            raise DataError(f"{where} has no label, though other pictures of the set do")
        if label is None and isinstance(raw, str) and self.names is not None:
            raise DataError(f"{where} has the label {raw!r}, which is no class of the set{nearest(raw, self.names)}")
        if label is None:
            raise DataError(f"{where} has the label {raw!r}; expected a whole number from 0")
        if label < 0:
            raise DataError(
                f"{where} has the label {label}; expected a whole number from 0 (-1 in all rows: no labels)"
            )
        if self.names is not None and label >= len(self.names):
            raise DataError(
                f"{where} has the label {label}; expected one below {len(self.names)}, the number of classes"
            )
        return label


def code_column(
    raws: Sequence[object], names: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """A column of labels as indices, and the classes' names.

    Strings are sorted and numbered, unless all are whole numbers. A column of nothing but nulls or -1 holds no
    labels: None. ``where(row)`` names a row in errors. Raises :class:`~comcat.errors.DataError` on a label that is
    no class.
    """
    if all(raw is None or whole(raw) == -1 for raw in raws):
        return None, None
    names = names or class_names_of(raws)
    coder = LabelCoder(names)
    return [coder(raw, where(row)) for row, raw in enumerate(raws)], names


def class_names_of(raws: Sequence[object]) -> tuple[str, ...] | None:
    """The different strings among the labels, sorted; None if all of them are whole numbers or there are no strings."""
    strings = {raw for raw in raws if isinstance(raw, str)}
    if not strings or all(whole(string) is not None for string in strings):
        return None
    return tuple(sorted(strings))


def choose_columns(kinds: Mapping[str, str], where: str) -> tuple[str, str | None]:
    """The names of the picture column and of the label column, if any.

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
        return image, "label"
    if len(classes) > 1:
        warnings.warn(
            f"{where} has several columns of classes ({', '.join(classes)}); {classes[0]} is used",
            stacklevel=6,
        )
    return image, classes[0] if classes else None


def whole(raw: object) -> int | None:
    """The whole number that ``raw`` is or spells, or None."""
    try:
        number = int(raw)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(raw, str | bytes) or number == raw else None

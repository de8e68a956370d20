"""Settings are frozen keyword-only dataclasses: made from keywords, taken out of larger ones, and checked before any
work.

A class of settings checks itself when it is made::

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "steps", "batch_size", least=1)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import SettingsError, in_short, nearest

T = TypeVar("T")
LARGEST_SEED = 2**63 - 1

StatisticName = Literal["weights", "activation", "loss"]
"""What errors of a compression can be measured by."""

_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"), int: ("a whole number", "whole numbers"), float: ("a number", "numbers"),
    str: ("a text", "texts"), Path: ("a path", "paths"),
}  # fmt: skip
"""A type in words, and several of it."""


def from_keywords(kind: type[T], keywords: Mapping[str, Any]) -> T:
    """Settings of a kind from keywords.

    Raises SettingsError for an unknown name, with the nearest known one, and for a value that does not fit.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in keywords:
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}{nearest(name, known)}")
    return kind(**keywords)


def part_of(kind: type[T], whole: Any) -> T:
    """The settings of a kind out of larger ones that have fields of the same names."""
    return kind(**keywords_of(kind, whole))


def keywords_of(kind: type, whole: Any) -> dict[str, Any]:
    """The values of a kind of settings within larger ones, by name."""
    return {f.name: getattr(whole, f.name) for f in fields(kind)}


def check_types(settings: Any) -> None:
    """Raise SettingsError for a field whose value is not of its annotated type, a choice that is no ``Literal``'s
    included.

    What is as good as the annotated type becomes it: a list a tuple, a text a path, a number of NumPy one of Python.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        try:
            object.__setattr__(settings, field.name, _as(hint, value))
        except TypeError:
            near = nearest(str(_odd_one(hint, value)), _choices(hint))
            raise SettingsError(f"got {field.name}={in_short(value)}, expected {_in_words(hint)}{near}") from None


def expect(
    settings: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise SettingsError unless these fields are finite and within bounds; None passes, and of a sequence every value
    counts.
    """
    low = f" above {above}" if above is not None else f" from {least}" if least is not None else ""
    high = f" to below {below}" if below is not None else f" to {most}" if most is not None else ""
    bounds = low + high or " that is finite"
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if not (
                math.isfinite(number)
                and (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            ):
                hint = get_type_hints(type(settings))[name]  # here alone: it takes longer than all the rest
                raise SettingsError(f"got {name}={in_short(value)}, expected {_in_words(hint)}{bounds}")


def expect_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raise SettingsError, with the nearest known name, unless a value is one of those known."""
    if value not in known:
        raise SettingsError(f"got {name}={value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}")


def _as(hint: Any, value: Any) -> Any:
    """A value as one of the type that a hint names. Raises TypeError where it is none."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            with suppress(TypeError):
                return _as(part, value)
        raise TypeError
    if origin is tuple:
        return _as_tuple(parts, value)
    if hint is Path and isinstance(value, str | os.PathLike) and "\0" not in os.fsdecode(value):
        return Path(value)
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)  # type: ignore[arg-type]
    fits = (
        value in parts if origin is Literal and isinstance(value, str) else hint not in _NUMBERS and _is_a(value, hint)
    )
    if not fits:
        raise TypeError
    return value


def _as_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise TypeError
    return tuple(map(_as, kinds, value))


def _is_a(value: Any, hint: Any) -> bool:
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _in_words(hint: Any, several: bool = False) -> str:
    """What a hint expects: ``a whole number``, ``one of zero, random``, ``a sequence of texts``."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not NoneType]
    if choices := _choices(hint):
        return f"{'some' if _takes_several(hint) else 'one'} of {', '.join(choices)}"
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is tuple:
        count = "a sequence of" if parts[1:] == [...] else len(parts)
        return f"{count} {_in_words(parts[0], several=True)}"
    return _WORDS.get(hint, (getattr(hint, "__name__", str(hint)),) * 2)[several]


def _choices(hint: Any) -> tuple[str, ...]:
    """The choices that the ``Literal``s within a hint leave."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _takes_several(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(map(_takes_several, get_args(hint)))


def _odd_one(hint: Any, value: Any) -> Any:
    """The value itself, or of a sequence of choices the first that is none of them."""
    if isinstance(value, list | tuple):
        return next((v for v in value if v not in _choices(hint)), value)
    return value

"""The errors a user can cause. Each says what it got, what it expected and, of names, the nearest one."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from unicodedata import category

_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of a line."""


class ComcatError(Exception):
    """Base of every error that comcat raises on purpose; the command line prints it without a traceback."""


class SettingsError(ComcatError, ValueError):
    """A setting is out of range or does not go with another."""


class ModelError(ComcatError):
    """A model cannot be found, built or used."""


class UnknownSite(ComcatError, KeyError):
    """A plan or a call names a site that the model does not have."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class UnsupportedSite(ComcatError):
    """A part of the model cannot shrink, and the message says why."""


class PlanError(ComcatError, ValueError):
    """A plan does not fit the model or is malformed."""


class BudgetError(ComcatError, ValueError):
    """A budget cannot be met; the message says the smallest that can."""


class DataError(ComcatError):
    """Pictures or labels are missing, unreadable or do not fit the model."""


class NumericsError(ComcatError, ArithmeticError):
    """NaN or infinity in weights, activations or gradients; the message names the place."""


class MemoryShortage(ComcatError, MemoryError):
    """A device ran out of memory; the message says what would fit."""


class StoreError(ComcatError):
    """A saved folder is damaged, foreign or cannot be written."""


class ExportError(ComcatError):
    """A model cannot leave PyTorch, or what left it computes something else; the message says why."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that suggests the known name closest to ``name``: ``"; did you mean 'x'?"``, or an empty string."""
    matches = get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not matches:
        return ""
    return "; did you mean " + " or ".join(repr(m) for m in matches) + "?"


def printable(text: str) -> str:
    """A text of somebody else's without what could steer a terminal: such characters are shown by their number."""
    return "".join(ascii(c)[1:-1] if c not in "\n\t" and (category(c) == "Cc" or c in _TURNING) else c for c in text)


def in_short(value: object) -> str:
    """What a value is, in one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def listed(phrases: list[str], most: int = 4) -> str:
    """The first few phrases, and how many more there are."""
    more = f"; and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + more


def counted(number: float, noun: str, show: Callable[[float], str] = str) -> str:
    """A number with its noun in the right form: ``"1 picture"``, ``"2 pictures"``, ``"1 class"``, ``"2 classes"``.

    ``show`` writes the number.
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{show(number)} {noun}{ending}"

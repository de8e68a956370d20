"""Numbers as people read them: units, ratios, changes."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from .. import errors
from ..files import home_path

SPACE = "\u00a0"  # a space that does not break, between a number and its unit
MINUS = "\u2212"


def number(value: Any) -> float | None:
    """``value`` as a float if it is a finite real number, None otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def signed(value: float, digits: int) -> str:
    """``value`` with its sign and ``digits`` decimals; zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def plain(value: float) -> str:
    """Whole numbers with separators, others with four significant digits."""
    if value.is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1000 <= abs(value) < 1e15:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def counted(value: float, noun: str) -> str:
    """A number with its noun in the right form, written as :func:`plain` does."""
    return errors.counted(value, noun, lambda number: plain(float(number)))


def scaled(value: float) -> str:
    """A count with k, M, G or T: ``22.05 M``."""
    return _with_unit(value, 1000, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """Bytes in powers of 1024: ``84.2 MiB``."""
    return _with_unit(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def duration(value: float) -> str:
    """Seconds as µs, ms or s, whichever reads best."""
    if abs(value) >= 0.9995 or value == 0:
        return f"{_digits(value)}{SPACE}s"
    if abs(value) >= 0.9995e-3:
        return f"{_digits(value * 1e3)}{SPACE}ms"
    return f"{_digits(value * 1e6)}{SPACE}µs"


def elapsed(seconds: float) -> str:
    """How long something took: ``45 s``, ``12 min 5 s``, ``3 h 25 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return duration(seconds)
    hours, minutes = divmod(minutes, 60)
    parts = (f"{hours:,}{SPACE}h", f"{minutes}{SPACE}min") if hours else (f"{minutes}{SPACE}min", f"{rest}{SPACE}s")
    return SPACE.join(parts)


def tiny(value: float) -> str:
    """A small number to two digits that count, without an exponent of ten: ``0.00016``."""
    if not value:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 12)}f}".replace("-", MINUS)


def percent(value: float) -> str:
    return f"{value:.2f}{SPACE}%".replace("-", MINUS)


def rate(value: float) -> str:
    return f"{plain(round(value, 1) if value < 100 else float(round(value)))}{SPACE}images/s"


def _digits(value: float) -> str:
    """Three significant digits, never with an exponent of ten for what is large."""
    return plain(float(round(value))) if abs(value) >= 99.95 else f"{value:.3g}".replace("-", MINUS, 1)


def _with_unit(value: float, base: int, units: tuple[str, ...]) -> str:
    scale = 0
    # Half a unit of the last digit shown, lest 999,960 read 1000 k.
    while abs(value) >= 0.99995 * base ** (scale + 1) and scale + 1 < len(units):
        scale += 1
    return f"{plain(value / base**scale)}{SPACE}{units[scale]}".rstrip(SPACE)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one metric reads. ``words``: what a smaller and a larger number after compression mean."""

    label: str
    show: Callable[[float], str] = plain
    change: Literal["share", "points", "difference"] = "share"
    words: tuple[str, str] = ("", "")


_SIZES, _TIMES = ("smaller", "larger"), ("faster", "slower")
METRICS = {
    "parameters": Metric(label="Parameters", show=scaled, words=_SIZES),
    "macs": Metric(label="MACs", show=scaled, words=("fewer", "more")),
    "size_bytes": Metric(label="Size on disk", show=size, words=_SIZES),
    "top1": Metric(label="Top-1 accuracy", show=percent, change="points"),
    "top5": Metric(label="Top-5 accuracy", show=percent, change="points"),
    "loss": Metric(label="Loss", change="difference"),
    "cosine": Metric(label="Cosine similarity to the teacher", change="difference"),
    "latency_s": Metric(label="Latency", show=duration, words=_TIMES),
    "compiled_latency_s": Metric(label="Latency, compiled", show=duration, words=_TIMES),
    "throughput": Metric(label="Throughput", show=rate, words=("slower", "faster")),
    "peak_memory_bytes": Metric(label="Peak memory", show=size, words=("less", "more")),
}
AGREEMENT = {
    "agreement": Metric(label="Same prediction", show=percent),
    "cosine": Metric(label="Cosine similarity of the outputs"),
    "divergence": Metric(label="Divergence of the predictions"),
    "count": Metric(label="Images compared"),
}


def metric(key: str) -> Metric:
    """The metric called ``key``; one nobody knows reads its unit off the end of its name."""
    if key in METRICS:
        return METRICS[key]
    for ending, show in (("_bytes", size), ("_s", duration)):
        if key.endswith(ending):
            return Metric(label=words(key.removesuffix(ending)), show=show)
    if key.endswith("_percent"):
        return Metric(label=words(key.removesuffix("_percent")), show=percent, change="points")
    return Metric(label=words(key))


def short_name(spec: str) -> str:
    """A model's name without where it is: ``vit`` of ``/models/vit/``, ``deit_small`` of ``timm:deit_small``."""
    name = spec.removeprefix("timm:").removeprefix("hf:").removeprefix("hf-hub:").removeprefix("local-dir:")
    place = home_path(name)
    try:
        return (place.resolve().name if place.is_dir() else place.name) or spec
    except (OSError, ValueError):  # no name of a file
        return spec


def words(key: str) -> str:
    """A key as words: ``"top_k_hits"`` becomes ``"Top k hits"``."""
    text = key.replace("_", " ").strip() or key
    return text[:1].upper() + text[1:]


def cell(value: Any, how: Metric) -> str:
    """One value of a metric as text; an empty string if it is missing."""
    if value is None:
        return ""
    known = number(value)
    if known is not None:
        return how.show(known)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not finite" if isinstance(value, Real) else str(value)


def change(before: Any, after: Any, how: Metric) -> str:
    """What became of a metric: ``−50.0 %``, ``−0.53 points`` or ``+0.0210``; empty if it cannot be said."""
    old, new = number(before), number(after)
    if old is None or new is None:
        return ""
    if how.change == "points":
        return f"{signed(new - old, 2)}{SPACE}points"
    if how.change == "difference":
        return signed(new - old, 4)
    return share(old, new)


def share(old: float, new: float) -> str:
    """The change from ``old`` to ``new`` in per cent of ``old``; empty if ``old`` is not positive."""
    return f"{signed((new / old - 1) * 100, 1)}{SPACE}%" if old > 0 else ""


def ratio(before: Any, after: Any, how: Metric) -> str:
    """``2.00× smaller``, ``1.55× faster``; empty where a ratio says nothing."""
    old, new = number(before), number(after)
    if how.change != "share" or old is None or new is None or old <= 0 or new <= 0:
        return ""
    if abs(new / old - 1) < 0.005:
        return "the same"
    if how.words == ("", ""):
        return f"{new / old:.2f}×"
    return times(new / old, how.words)


def times(factor: float, words: tuple[str, str]) -> str:
    """A positive factor as ``2.00× smaller`` or ``1.55× faster``; ``words`` are for one below 1 and one above."""
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{max(factor, 1 / factor):.2f}× {words[0] if factor < 1 else words[1]}"


def shown(forms: Collection[str | None], blocks: Sequence[str], maps: bool) -> dict[str, Any]:
    """Heading and text of the pictures of tokens, and short names of their blocks.

    Args:
        forms: of all sites. blocks: paths of the blocks shown. maps: whether there are maps.
    """
    said = "Some of the calibration pictures, with the tokens that each block ran."
    if "drop" in forms:
        said += " Dark tokens rested in that block."
    if {"similar", "grid"} & set(forms):
        said += " Tokens of one colour ran as one; tokens without colour ran alone."
    if maps:
        said += " The model's map is shown before and after."
    title = "Which tokens ran as one" if "drop" not in forms else "Which tokens ran"
    return {"title": title, "said": said, "names": {path: _short_path(path) for path in blocks}}


def _short_path(path: str) -> str:
    """The last list in a path, and the place in it: ``backbone.encoder.layer.3`` becomes ``layer.3``."""
    return ".".join(path.split(".")[-2:])


def in_order(blocks: Iterable[str]) -> list[str]:
    """Each block once, in the order given; those that differ by numbers alone (``blocks.3``) by these.

    A block all of whose layers shrank before is first heard of by its tokens, behind all others.
    """
    patterns = {name: re.sub(r"\d+", "*", name) for name in blocks}
    alike: dict[str, list[str]] = {}
    for name, pattern in patterns.items():
        alike.setdefault(pattern, []).append(name)
    rest = {
        pattern: iter(sorted(some, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]))
        for pattern, some in alike.items()
    }
    return [next(rest[pattern]) for pattern in patterns.values()]

"""What a report is made of: plain data that goes to JSON and back."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

from comcat.errors import NumericsError, SettingsError, StoreError, nearest

from ..files import parsed

MATRICES = ("W_Q", "W_K", "W_V", "W_O", "QK", "VO")
Kind = Literal["qk", "vo", "linear", "units", "tokens"]
Role = Literal["attention", "feed-forward", "tokens", ""]
_FORMAT, _VERSION = "comcat-report", 2
_NOT_FINITE = ("nan", "inf", "-inf")  # how JSON, which has no such numbers, spells them here


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one weight matrix or product of one head, largest first.

    ``head`` is None for a matrix that is not split into heads. ``parameters_per_rank`` is what one unit of rank
    costs when this matrix or product is factorised: m + n for an (m, n) matrix.

    Raises NumericsError for values that are not finite or negative, SettingsError for an unknown ``matrix``, values
    out of order or a cost that is not positive.
    """

    layer: str
    matrix: str
    head: int | None
    singular_values: tuple[float, ...]
    parameters_per_rank: float

    def __post_init__(self) -> None:
        place = f"{self.layer} {self.matrix}" + ("" if self.head is None else f" head {self.head}")
        if self.matrix not in MATRICES:
            hint = nearest(self.matrix, MATRICES)
            raise SettingsError(f"matrix of {self.layer}: got {self.matrix!r}, expected one of {MATRICES}{hint}")
        _check_values(self.singular_values, place)
        # A little slack: roots of eigenvalues can swap neighbours in the last digits.
        slack = 1e-6 * max(self.singular_values, default=0.0)
        if any(later > earlier + slack for earlier, later in pairwise(self.singular_values)):
            raise SettingsError(f"singular values of {place}: expected the largest first")
        if not 0 < self.parameters_per_rank < math.inf:
            raise SettingsError(f"parameters_per_rank of {place}: got {self.parameters_per_rank}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """What became of one site.

    Attributes:
        form: what it became, as plans call it; None: it stays as it is, and ``note`` says why.
        keep, full: ranks, hidden units or tokens that stay, and that there were; ``keep`` is None where it stays.
        parameters_before, parameters_after: counts. macs_before, macs_after: a picture, where these were the budget.
        predicted_loss: nats a picture, where that was the statistic. rival_loss: of a feed-forward, what its other form
            (low rank instead of fewer units, or the other way round) was predicted to lose for as much.
        block: the block that it is a part of, ``"blocks.3"``. role: its place there; empty for neither.

    Raises SettingsError for an unknown ``kind`` or ``role``.
    """

    name: str
    kind: Kind
    form: str | None
    keep: int | None
    full: int
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None
    note: str = ""
    block: str = ""
    role: Role = ""
    macs_before: float | None = None
    macs_after: float | None = None
    rival_loss: float | None = None

    def __post_init__(self) -> None:
        for what, known in (("kind", get_args(Kind)), ("role", get_args(Role))):
            if (value := getattr(self, what)) not in known:
                hint = nearest(str(value), known)
                raise SettingsError(f"{what} of site {self.name!r}: got {value!r}, expected one of {known}{hint}")


@dataclass(frozen=True, kw_only=True)
class ShownPicture:
    """A picture, and what became of its tokens. Every image is the text of a ``data:image/…`` address.

    Attributes:
        picture: as the model was given it. blocks: the same, by block, with the tokens that the block ran as one in one
            colour. counts: how many tokens each block ran, as ``"120 of 196"``.
        maps: of a dense model, its map ``"before"`` and ``"after"``.

    Raises SettingsError for an image that is none, or of another place.
    """

    picture: str
    blocks: dict[str, str]
    counts: dict[str, str]
    maps: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for image in (self.picture, *self.blocks.values(), *self.maps.values()):
            if not isinstance(image, str) or not image.startswith("data:image/"):
                raise SettingsError(f"picture of a report: got {str(image)[:40]!r}, expected data:image/…")
        if self.blocks.keys() != self.counts.keys():
            raise SettingsError(f"blocks of a picture: got {list(self.blocks)}, and counts of {list(self.counts)}")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that the report shows; what is None or empty is left out of the page.

    ``before`` and ``after`` map a metric to a number or None: ``parameters``, ``macs``, ``size_bytes``,
    ``peak_memory_bytes``, ``top1`` and ``top5`` (per cent), ``loss``, ``latency_s`` and ``compiled_latency_s``
    (seconds), ``throughput`` (images/s). Other keys are shown too; those that end in ``_s``, ``_bytes`` or
    ``_percent`` with that unit. ``agreement`` holds ``agreement`` (per cent), ``cosine``, ``divergence`` and
    ``count`` (images compared). ``predicted_loss`` and ``measured_loss`` are rises of the loss. ``curves`` maps a
    name to a list of series ``{"x": [...], "y": [...]}``, each optionally with ``"label"``, ``"x_label"``,
    ``"y_label"`` (series of one share a panel) and ``"reference"`` (true for a line to compare with); None is a gap.
    ``pictures`` show which tokens ran as one.
    ``between`` holds metrics of the model after compression where ``after`` is that of the tuned one. ``facts`` maps a
    name, such as that of a curve, to texts by what they say.

    Raises SettingsError for malformed curves.
    """

    title: str
    model: str
    created: str
    command: str | None
    settings: dict[str, Any]
    environment: dict[str, Any]
    before: dict[str, float | None]
    after: dict[str, float | None]
    agreement: dict[str, float | None]
    predicted_loss: float | None
    measured_loss: float | None
    sites: tuple[SiteRow, ...]
    spectra: tuple[Spectrum, ...]
    notes: tuple[str, ...]
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    between: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    judged_on: str | None = None
    speed: dict[str, float] = field(default_factory=dict)
    pictures: tuple[ShownPicture, ...] = ()

    def __post_init__(self) -> None:
        for name, series in self.curves.items():
            for entry in series:
                _check_series(name, entry)

    def to_json(self) -> str:
        """The report as JSON. Values that JSON does not know are written as their text, NaN and infinity as
        ``"nan"``, ``"inf"`` and ``"-inf"``."""
        document = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        return json.dumps(_encode(document), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "ReportData":
        """The report that ``to_json`` wrote.

        Raises StoreError if the text is damaged or something else, and what the parts raise for values out of range.
        """
        try:
            document = parsed(text)
        except ValueError as error:
            raise StoreError(f"the report is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise StoreError(f"the JSON is not a report: expected an object whose 'format' is {_FORMAT!r}")
        if document.get("version") not in range(1, _VERSION + 1):
            raise StoreError(f"version of the report: got {document.get('version')!r}, expected 1 to {_VERSION}")
        content = {key: value for key, value in document.items() if key not in ("format", "version")}
        try:
            for key in ("before", "between", "after", "agreement", "predicted_loss", "measured_loss", "curves"):
                if key in content:
                    content[key] = _decode(content[key])
            rows = content.get("sites", ())
            rows = map(_of_version_1, rows) if document["version"] == 1 else rows
            content["sites"] = tuple(_build(SiteRow, row) for row in rows)
            content["spectra"] = tuple(_build(Spectrum, row) for row in content.get("spectra", ()))
            content["pictures"] = tuple(_build(ShownPicture, row) for row in content.get("pictures", ()))
            content["notes"] = tuple(content.get("notes", ()))
            return _build(cls, content)
        except (AttributeError, TypeError) as error:
            raise StoreError(f"the report is damaged: {error}") from error


def rank_for_energy(singular_values: Sequence[float], energy: float) -> int:
    """The smallest r such that the first r singular values hold the share ``energy`` of the sum of them all.

    The sum is of the values, not of their squares, as in COMCAT's Figures 1 and 2. No values, or none but zeros, need
    rank 0. Raises SettingsError if ``energy`` is not in (0, 1], NumericsError for values not finite or negative.
    """
    if not 0 < energy <= 1:
        raise SettingsError(f"energy: got {energy}, expected more than 0 and at most 1")
    _check_values(singular_values, "the spectrum")
    largest = max(singular_values, default=0.0)
    if largest == 0:
        return 0
    sums = list(accumulate(value / largest for value in singular_values))
    # 0.55 × 100 is a hair above 55 in floating point: the tolerance keeps such shares exact.
    enough = energy * sums[-1] * (1 - 1e-12)
    return next(rank for rank, total in enumerate(sums, start=1) if total >= enough)


def _check_values(values: Sequence[float], place: str) -> None:
    bad = next((value for value in values if not (math.isfinite(value) and value >= 0)), None)
    if bad is not None:
        raise NumericsError(f"singular values of {place}: got {bad}, expected finite numbers of at least 0")


def _check_series(name: str, entry: Any) -> None:
    if not isinstance(entry, Mapping) or not {"x", "y"} <= set(entry):
        raise SettingsError(f"curve {name!r}: got {entry!r}, expected series of the form {{'x': [...], 'y': [...]}}")
    sizes = []
    for axis in ("x", "y"):
        values = entry[axis]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise SettingsError(f"curve {name!r}: {axis} is {values!r}, expected a list of numbers")
        for value in values:
            if not (value is None or isinstance(value, int | float)):
                raise SettingsError(f"curve {name!r}: {axis} holds {value!r}, expected numbers or None")
        sizes.append(len(values))
    if sizes[0] != sizes[1]:
        raise SettingsError(f"curve {name!r}: got {sizes[0]} values of x and {sizes[1]} of y, expected as many of each")


def _build(kind: type, content: Any) -> Any:
    """An instance of the dataclass ``kind`` from a JSON object; StoreError for fields missing or unknown."""
    if not isinstance(content, dict):
        raise StoreError(f"the report is damaged: got {content!r}, expected an object of {kind.__name__}")
    known = {entry.name: entry for entry in fields(kind)}
    for key in content:
        if key not in known:
            raise StoreError(f"the report is damaged: {kind.__name__} has no field {key!r}{nearest(key, known)}")
    for key, entry in known.items():
        if key not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise StoreError(f"the report is damaged: {kind.__name__} without its field {key!r}")
    if kind is Spectrum:
        content = {**content, "singular_values": tuple(content["singular_values"])}
    if kind is SiteRow:
        losses = ("predicted_loss", "rival_loss", "macs_before", "macs_after")
        content = {**content, **{key: _decode(content[key]) for key in losses if key in content}}
    return kind(**content)


def _of_version_1(row: Any) -> Any:
    """A site's row as version 1 had it: ``rank`` and ``full_rank``, all of thin factors."""
    if not isinstance(row, dict) or not {"rank", "full_rank"} <= set(row):
        return row
    rest = {key: value for key, value in row.items() if key not in ("rank", "full_rank")}
    return {**rest, "form": None if row["rank"] is None else "product", "keep": row["rank"], "full": row["full_rank"]}


def _encode(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    # NumPy's and torch's scalars know their Python number.
    return _encode(value.item()) if getattr(value, "ndim", None) == 0 else str(value)


def _decode(value: Any) -> Any:
    """Numbers that JSON could not hold, restored; labels stay text."""
    if isinstance(value, dict):
        return {key: item if key.endswith("label") else _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value

"""What a compressed model carries with it: enough to save it, load it again and say how it came about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .plan import Plan

Numbers = Mapping[str, float | None]
"""Measurements by name, such as ``top1`` (per cent), ``latency_s`` (seconds) or ``parameters``."""

_STALE = ("top1", "top5", "loss")
"""What tuning changes of the numbers after compression."""


@dataclass(frozen=True, kw_only=True)
class Results(Mapping[str, Any]):
    """What was measured of a model: what the report, the model card and the folder say of it.

    Attributes:
        before, after: the model before compression and as it is now.
        judged_on: in words, the pictures that its accuracy was measured on.
        agreement: with the model before: ``agreement`` (per cent), ``cosine``, ``divergence``, and the ``count`` of
            pictures.
        predicted_loss, measured_loss: the rise of the loss by compression, in nats a picture.
        untuned: of a model that was tuned, what compression alone had left: ``after``'s accuracy and the fields above.
        tuning: the last tuning: settings, teacher, curve, seconds, images per second, and its evaluations.
        others: what is none of these, by name; what other versions and people wrote is kept.
    """

    before: Numbers = field(default_factory=dict)
    after: Numbers = field(default_factory=dict)
    judged_on: str | None = None
    agreement: Numbers = field(default_factory=dict)
    predicted_loss: float | None = None
    measured_loss: float | None = None
    untuned: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Results:
        """Results from what :meth:`to_dict` gave, or from what an older version wrote; what does not fit goes to
        ``others``.
        """
        known: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in (data or {}).items():
            if value is not None:
                (known if _fits(name, value) else others)[str(name)] = value
        return cls(**known, others=others)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without what is empty."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        return {**{name: value for name, value in given.items() if value not in (None, {})}, **self.others}

    def tuned(self, tuning: Mapping[str, Any]) -> Results:
        """The results with those of a tuning; what it has made untrue is put aside under ``untuned``."""
        if not tuning["curve"]:  # it made no step
            return replace(self, tuning=tuning)
        stale = {k: v for k, v in self.after.items() if k in _STALE}
        for name in ("judged_on", "agreement", "predicted_loss", "measured_loss"):
            if (value := getattr(self, name)) not in (None, {}):
                stale[name] = value
        return replace(
            self,
            after={k: v for k, v in self.after.items() if k not in _STALE},
            judged_on=None, agreement={}, predicted_loss=None, measured_loss=None,
            untuned=stale or self.untuned, tuning=tuning,
        )  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        """Deprecated: results were a dictionary once."""
        warnings.warn(f"results[{name!r}] is deprecated, say results.{name}", DeprecationWarning, stacklevel=2)
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


def _fits(name: str, value: Any) -> bool:
    if name in ("before", "after", "agreement", "untuned", "tuning"):
        return isinstance(value, Mapping)
    if name in ("predicted_loss", "measured_loss"):
        return isinstance(value, int | float)
    return name == "judged_on" and isinstance(value, str)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a compressed model carries with it as ``model.comcat_record``.

    Attributes:
        origin: ``comcat.models.Origin.to_dict()`` of the model before. settings: what the run was asked for.
        preprocess: ``Preprocess.to_dict()`` of the model's data config, if known.
        results: what was measured; what :meth:`Results.from_dict` takes becomes results.
    """

    plan: Plan
    origin: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    results: Results = field(default_factory=Results)

    def __post_init__(self) -> None:
        if not isinstance(self.results, Results):
            object.__setattr__(self, "results", Results.from_dict(self.results))

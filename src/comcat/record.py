"""What a compressed model carries with it: enough to save it, load it again and say how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a compressed model carries with it (as ``model.comcat_record``): enough to save it, load it again and say how it came about.

    Attributes:
        origin: ``comcat.models.Origin.to_dict()`` of the model before. settings: what the run was asked for.
        preprocess: ``Preprocess.to_dict()`` of the model's data config, if known. results: numbers measured, as the report shows them.
    """

    plan: Plan
    origin: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    results: dict[str, Any] = field(default_factory=dict)

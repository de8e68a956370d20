"""What is compared: rows of keywords, each a way to shrink a model by a share of its parameters.

A row is ``{"forms": ("ranks",), "statistic": "activation", …}``, fields of
:class:`comcat.methods.compress.CompressSettings`, or ``{"baselines": ("matrix", "svd")}``, names of
:data:`comcat.methods.baselines.BASELINES`, one for each part of the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import comcat
from comcat.errors import BudgetError, SettingsError, nearest
from comcat.measure import count_parameters
from comcat.methods.baselines import BASELINES
from comcat.methods.compress import CompressSettings, Prepared, prepare, propose

from .tasks import Task

METHODS: dict[str, dict[str, Any]] = {
    "ranks + units": {"forms": ("ranks", "units")},
    "ranks": {"forms": ("ranks",)},
    "units": {"forms": ("units",)},
    "ranks + units, activation": {"forms": ("ranks", "units"), "statistic": "activation"},
    "ranks, activation": {"forms": ("ranks",), "statistic": "activation"},
    "ranks, weights": {"forms": ("ranks",), "statistic": "weights"},
    "ranks, uniform": {"forms": ("ranks",), "ranks": "uniform"},
    "ranks, weights, uniform": {"forms": ("ranks",), "statistic": "weights", "ranks": "uniform"},
    "product + svd": {"baselines": ("product", "svd")},
    "paper code + svd": {"baselines": ("paper-code", "svd")},
    "unilateral + svd": {"baselines": ("unilateral", "svd")},
    "matrix + svd": {"baselines": ("matrix", "svd")},
    "product + tucker": {"baselines": ("product", "tucker")},
}
FREE = ("reduce", "ranks", "multiple", "tie", "per_head", "joint_refit", "sequential", "energy", "max_drop")
"""Settings that do not touch what is measured and factorised, so that rows which differ in nothing else share it."""


def chosen_methods(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows by name, all for no names. Raises :class:`SettingsError` for an unknown one."""
    for name in names:
        if name not in METHODS:
            raise SettingsError(f"got method {name!r}, expected one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    return {name: METHODS[name] for name in names or METHODS}


def unknown_settings(keywords: Mapping[str, Any]) -> list[str]:
    """Settings of a row that this version of the library does not know; such a row cannot be run."""
    if "baselines" in keywords:
        return [name for name in keywords["baselines"] if name not in BASELINES]
    known = {
        *CompressSettings.__dataclass_fields__,
        *(() if tuple(keywords.get("forms", ())) != ("ranks",) else ("forms",)),
    }
    return [name for name in keywords if name not in known]


class Shrinker:
    """Applies rows to one model. What rows share is measured once and kept while the seed stays the same."""

    def __init__(self, task: Task, model: nn.Module, *, pictures: int | None = None) -> None:
        self.task, self.model = task, model
        self.pictures = pictures or task.calibration
        self.sites = comcat.find_sites(model).only(*task.only)
        self._seed: int | None = None
        self._kept: dict[CompressSettings, tuple[Prepared, float]] = {}

    def shrink(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Any, dict[str, Any]]:
        """Shrink the model in place by a share of its parameters. Gives the handle that takes it back, and facts."""
        start = time.perf_counter()
        if "baselines" in keywords:
            handle, shared = self._by_baselines(keywords["baselines"], reduce), 0.0
        else:
            handle, shared = self._by_settings(keywords, reduce, seed)
        seconds = time.perf_counter() - start
        made_by = dict(handle.plan.made_by)
        facts = {
            "saved": made_by.get("saved"),
            "predicted_loss": made_by.get("predicted_loss"),
            "statistic": made_by.get("statistic"),
        }
        return handle, {**facts, "prepare_seconds": shared, "seconds": seconds, "plan": handle.plan.to_dict()["sites"]}

    def _by_settings(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Any, float]:
        known = {k: v for k, v in keywords.items() if k != "forms" or k in CompressSettings.__dataclass_fields__}
        asked = {
            "multiple": 1,
            "pictures": self.pictures,
            **known,
            "reduce": reduce,
            "seed": seed,
            "only": self.task.only,
        }
        settings = CompressSettings(**asked)
        prepared, seconds = self._prepared(settings)
        plan = propose(self.model, prepared, settings)
        more = {"sites": prepared.sites, "factorizations": prepared.factorizations, "joint_refit": settings.joint_refit}
        return comcat.apply_(self.model, plan, prepared.statistic, **more), seconds

    def _prepared(self, settings: CompressSettings) -> tuple[Prepared, float]:
        """What does not depend on the budget, and the seconds that it took when it was made."""
        if settings.seed != self._seed:
            self._kept, self._seed = {}, settings.seed
        default = CompressSettings(reduce=0.5)
        key = replace(settings, **{name: getattr(default, name) for name in FREE})
        if key not in self._kept:
            start = time.perf_counter()
            batches = self.task.calibration_batches(settings.seed, self.pictures)
            prepared = prepare(self.model, batches, settings)
            self._kept[key] = (prepared, time.perf_counter() - start)
        return self._kept[key]

    def _by_baselines(self, names: Sequence[str], reduce: float) -> Any:
        """One baseline a part of the model; every part saves the same share, so that the whole saves ``reduce``."""
        parts = [BASELINES[name] for name in names]
        dense = sum(s.parameters() for part in parts for s in part.sites(self.sites).values())
        whole = count_parameters(self.model)
        share = reduce * whole / dense
        if share >= 1:
            raise BudgetError(
                f"got reduce={reduce:g}, but the parts of {' + '.join(names)} are {dense / whole:.2f} of the model"
            )
        plans = [part(self.model, self.sites, share) for part in parts]
        sites = {name: entry for plan in plans for name, entry in plan.sites.items()}
        saved = sum(
            p.made_by["saved"] * sum(s.parameters() for s in b.sites(self.sites).values())
            for p, b in zip(plans, parts, strict=True)
        )
        plan = comcat.Plan(sites=sites, made_by={"baselines": list(names), "saved": saved / whole})
        return comcat.apply_(self.model, plan, parts[0].statistic, sites=self.sites)

"""What is compared: rows of keywords, each a way to shrink a model by a share of its parameters.

A row is ``{"forms": "ranks", "statistic": "activation", …}``, fields of
:class:`comcat.methods.settings.CompressSettings`, or ``{"baselines": ("matrix", "svd")}``, names of
:data:`comcat.methods.baselines.BASELINES`, one for each part of the model. Sizes have multiple 1 unless a row says so.
Rows of tokens, ``{"merge": {"how": "grid"}}`` (fields of :class:`comcat.methods.merging.MergeSettings`) and
``{"published": {}}`` (:mod:`.published`), run 1 − reduce of the tokens, on the mean over blocks, and have all
parameters. Rows with ``"budget": "macs"`` save that share of the multiply-accumulates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import comcat
from comcat.errors import BudgetError, SettingsError, nearest
from comcat.factors import Statistic
from comcat.measure import count_parameters
from comcat.methods.baselines import BASELINES, Baseline
from comcat.methods.prepare import Prepared, prepare
from comcat.methods.propose import propose
from comcat.methods.sequential import apply_sequentially
from comcat.methods.settings import DRAWN, CompressSettings, MergeSettings

from .published import apply_published_
from .tasks import Task

METHODS: dict[str, dict[str, Any]] = {
    "ranks + units": {},
    "ranks": {"forms": "ranks"},
    "units": {"forms": "units"},
    "ranks + units, multiple chosen": {"multiple": None},
    "ranks + units, activation": {"statistic": "activation"},
    "ranks, activation": {"forms": "ranks", "statistic": "activation"},
    "ranks + units, uniform": {"ranks": "uniform"},
    "ranks, uniform": {"forms": "ranks", "ranks": "uniform"},
    "ranks + units, weights": {"statistic": "weights"},
    "ranks, weights": {"forms": "ranks", "statistic": "weights"},
    "product + svd": {"baselines": ("product", "svd")},
    "paper code + svd": {"baselines": ("paper-code", "svd")},
    "unilateral + svd": {"baselines": ("unilateral", "svd")},
    "matrix + svd": {"baselines": ("matrix", "svd")},
    "FWSVD": {"baselines": ("matrix-fwsvd", "fwsvd")},
    "SVD-LLM": {"baselines": ("matrix-svd-llm", "svd-llm")},
    "feature PCA": {"baselines": ("matrix-feature-pca", "feature-pca")},
    "product + tucker": {"baselines": ("product", "tucker")},
    "product + magnitude": {"baselines": ("product", "magnitude")},
    "product + magnitude, refitted": {"baselines": ("product", "magnitude-refit")},
    "product + taylor": {"baselines": ("product", "taylor")},
    "product + taylor, refitted": {"baselines": ("product", "taylor-refit")},
    "ranks + units + tokens, MACs": {"forms": "ranks,units,tokens", "budget": "macs"},
    "ranks + units, MACs": {"forms": "ranks,units", "budget": "macs"},
    "tokens, MACs": {"forms": "tokens", "budget": "macs"},
    "tokens alike": {"merge": {"how": "similar"}},
    "tokens alike, replaced": {"merge": {"how": "similar", "residual": False}},
    "tokens of the grid": {"merge": {"how": "grid"}},
    "tokens dropped by attention": {"merge": {"how": "drop"}},
    "tokens dropped at random": {"merge": {"how": "drop", "by": "random"}},
    "tokens merged as published": {"published": {}},
}
SHARED_BY = ("reduce", "ranks", "multiple", "tie", "per_head", "joint_refit", "sequential")
"""Settings that do not touch what is measured and decomposed: rows that differ in these alone share it."""
_DEFAULT = CompressSettings(reduce=0.5)


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
    if "merge" in keywords:
        return [name for name in keywords["merge"] if name not in MergeSettings.__dataclass_fields__]
    if "published" in keywords:
        return list(keywords["published"])
    return [name for name in keywords if name not in CompressSettings.__dataclass_fields__]


def needs_pictures(keywords: Mapping[str, Any]) -> bool:
    """Whether a row depends on the calibration sample."""
    if "baselines" in keywords:
        return any(BASELINES[name].needs_pictures for name in keywords["baselines"])
    if "published" in keywords:
        return False
    return keywords.get("statistic") != "weights"


@dataclass(frozen=True)
class Applied:
    """A model made small in one or several steps: what there is to know of it, and the way back."""

    steps: tuple[Any, ...]
    plan: dict[str, Any]
    made_by: Mapping[str, Any]

    def revert(self) -> None:
        for step in reversed(self.steps):
            step.revert()


class Shrinker:
    """Applies rows to one model. What rows share is measured once and kept while the seed stays the same.

    ``forms`` are those of all the rows together, so a row of ranks takes longer where another has units.
    """

    def __init__(
        self, task: Task, model: nn.Module, *, pictures: int | None = None, forms: str = "ranks,units"
    ) -> None:
        self.task, self.model, self.forms = task, model, forms
        self.pictures = pictures or task.calibration
        self.sites = comcat.find_sites(model).only(*task.only)
        self._others = {
            "baselines": self._by_baselines, "merge": self._by_merging, "published": self._by_published,
        }  # fmt: skip
        self._seed: int | None = None
        self._kept: dict[Any, Any] = {}

    def shrink(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Applied, dict[str, Any]]:
        """Shrink the model in place by a share of its parameters. Gives the way back, and facts."""
        if seed != self._seed:
            self._kept, self._seed = {}, seed
        by = next((how for kind, how in self._others.items() if kind in keywords), self._by_settings)
        applied, shared, seconds = by(keywords, reduce, seed)
        facts = {name: applied.made_by.get(name) for name in ("saved", "predicted_loss", "statistic")}
        return applied, {**facts, "prepare_seconds": shared, "seconds": seconds, "plan": applied.plan}

    def _by_settings(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Applied, float, float]:
        asked = {"multiple": 1, "pictures": self.pictures, **keywords, "reduce": reduce, "seed": seed}
        settings = CompressSettings(**{**asked, "only": self.task.only})
        prepared, shared = self._prepared(settings)
        start = time.perf_counter()
        plan = propose(self.model, prepared, settings)
        if settings.sequential:
            batches = self.task.calibration_batches(seed, self.pictures)
            handle = apply_sequentially(self.model, plan, prepared, batches, settings, False)
        else:
            handle = comcat.apply_(
                self.model,
                plan,
                prepared.statistic,
                sites=prepared.sites,
                factorizations=prepared.factorizations,
                joint_refit=settings.joint_refit,
            )
        return Applied((handle,), plan.to_dict()["sites"], plan.made_by), shared, time.perf_counter() - start

    def _prepared(self, settings: CompressSettings) -> tuple[Prepared, float]:
        """What does not depend on the budget, and the seconds that it took when it was made."""
        key = replace(settings, **{name: getattr(_DEFAULT, name) for name in SHARED_BY}, forms=self._forms(settings))
        if key not in self._kept:
            start = time.perf_counter()
            batches = self.task.calibration_batches(settings.seed, self.pictures)
            prepared = prepare(self.model, batches, key)
            self._kept[key] = (prepared, time.perf_counter() - start)
        return self._kept[key]

    def _forms(self, settings: CompressSettings) -> str:
        """Forms to measure for: ranks and units of all rows, tokens only where this row has them."""
        own = set(str(settings.forms).split(","))
        return ",".join(sorted(own | set(self.forms.split(",")) - {"tokens"}))

    def _by_merging(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Applied, float, float]:
        """Blocks on fewer tokens, chosen by what was measured on the first pictures."""
        start = time.perf_counter()
        plan = comcat.merge(
            self.model, self.task.calibration_batches(seed, DRAWN), keep=1 - reduce, **keywords["merge"]
        )
        handle = comcat.apply_(self.model, plan)
        return Applied((handle,), plan.to_dict()["sites"], plan.made_by), 0.0, time.perf_counter() - start

    def _by_published(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Applied, float, float]:
        start = time.perf_counter()
        p = next(self.model.parameters())
        example = self.task.calibration_batches(seed, 1)[0][:1].to(p.device, p.dtype)
        merging = apply_published_(self.model, example, 1 - reduce)
        return Applied((merging,), {}, {}), 0.0, time.perf_counter() - start

    def _by_baselines(self, keywords: Mapping[str, Any], reduce: float, seed: int) -> tuple[Applied, float, float]:
        """One baseline a part of the model; every part saves the same share, so that the whole saves ``reduce``."""
        names = tuple(keywords["baselines"])
        parts = [BASELINES[name] for name in names]
        dense = [sum(s.parameters() for s in part.sites(self.sites).values()) for part in parts]
        whole = count_parameters(self.model)
        share = reduce * whole / sum(dense)
        if share >= 1:
            told = f"the parts of {' + '.join(names)} are {sum(dense) / whole:.2f} of the model"
            raise BudgetError(f"got reduce={reduce:g}, but {told}")
        statistics = [self._measured(name, part, seed) for name, part in zip(names, parts, strict=True)]
        start = time.perf_counter()
        plans = [p(self.model, self.sites, share, None, s) for p, (s, _) in zip(parts, statistics, strict=True)]
        with ExitStack() as undo:  # where one part fails, those before it go back
            steps = []
            for plan, (statistic, _) in zip(plans, statistics, strict=True):
                steps.append(comcat.apply_(self.model, plan, statistic, sites=self.sites))
                undo.callback(steps[-1].revert)
            undo.pop_all()
        saved = sum(plan.made_by["saved"] * d for plan, d in zip(plans, dense, strict=True)) / whole
        entries = {name: entry for plan in plans for name, entry in plan.to_dict()["sites"].items()}
        seconds = time.perf_counter() - start
        return Applied(tuple(steps), entries, {"saved": saved}), sum(s for _, s in statistics), seconds

    def _measured(self, name: str, part: Baseline, seed: int) -> tuple[Statistic, float]:
        """The statistic of a baseline, and the seconds that it took when it was made."""
        if not part.needs_pictures:
            return part.statistic, 0.0
        if name not in self._kept:
            start = time.perf_counter()
            batches = self.task.calibration_batches(seed, self.pictures)
            found = part.measured(self.model, self.sites, batches, seed=seed)
            self._kept[name] = (found, time.perf_counter() - start)
        return self._kept[name]

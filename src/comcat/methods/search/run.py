"""A search, on the loop of :mod:`comcat.runs.loop`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Pictures, Preprocess, batches, open_pictures
from ...errors import DataError, ModelError, SettingsError
from ...measure import evaluate, is_classifier, model_output
from ...models import preprocess_of
from ...plan import Plan
from ...runs.checkpoints import Checkpoints
from ...runs.loop import Run, carry_out, find_checkpoint
from ...runs.processes import Processes
from ...runs.seeding import derive_seed
from ...runs.state import fingerprint
from ...runs.watching import LossWatch
from ...settings import from_keywords
from ...tuning.data import Batch, Feed, TrainingData, open_labelled
from ...tuning.leaks import check_apart, check_sources
from ...wrappers import bare
from ..prepare import Prepared, prepare
from ..request import check_uncompressed
from ..settings import CompressSettings, check_forms
from .mixture import Mixture
from .objective import Objective
from .schedule import Phase, Schedule
from .settings import SearchSettings
from .space import space_of

HELD_OUT_CHECK = 1000
"""Held-out pictures on which each round's ranks are measured."""
_UNIMPORTANT = frozenset({"checkpoint_every", "keep", "workers"})
"""Settings that may change when a search goes on."""


def search(
    model: nn.Module,
    data: Pictures | str | Path,
    *,
    evaluation: Pictures | str | Path | None = None,
    preprocess: Preprocess | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Plan:
    """Find the ranks of a plan by search; the model itself is untouched.

    Args:
        data: training pictures, or what :func:`comcat.open_pictures` takes. Labels are used where there are any; else
            the model's own predictions stand in for them. Never the evaluation set.
        evaluation: the evaluation set, only to make sure that none of its pictures is in ``data``.
        preprocess: how pictures become inputs, by default as the model's data configuration says.
        out: folder for checkpoints: the same call goes on where it was stopped. ``restart`` forgets them first.
        settings: fields of :class:`SearchSettings`.

    Returns:
        The plan, within the budget. ``made_by["search"]`` holds what Figures 6 and 7 show: for every point step, round,
        expected cost (share of the whole model), loss, and for each round held-out top-1 at the ranks it settled on.

    Raises:
        BudgetError: if even the smallest candidates cost too much. DataError: where a part of the pictures is empty,
            labels do not fit, or pictures of the evaluation set are searched on. NumericsError: if the loss is no
            number or explodes. StoreError: where checkpoints were made with other settings.
    """
    chosen, model = from_keywords(SearchSettings, settings), bare(model)
    if evaluation is not None:
        check_sources(data, evaluation)
        data = open_labelled(model, data)
        processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
        with processes.together():
            if processes.main:
                check_apart(data, evaluation if isinstance(evaluation, Pictures) else open_pictures(evaluation))
    return search_(model, data, chosen, preprocess=preprocess, out=out, restart=restart, progress=progress)


def search_(
    model: nn.Module,
    data: Pictures | str | Path,
    settings: SearchSettings,
    *,
    preprocess: Preprocess | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    progress: bool = False,
) -> Plan:
    """:func:`search` with its settings in one piece."""
    run = Search(model, open_labelled(model, data), settings, preprocess)
    checkpoints = None if out is None else Checkpoints(Path(out) / "checkpoints", keep=settings.keep)
    found = find_checkpoint(checkpoints, run.identity, run.processes, restart=restart)
    with run.processes.together():
        run.prepare(progress=progress and run.processes.main)
    if found is None:
        run.begin()
    try:
        every = (settings.checkpoint_every,)
        carry_out(run, run.processes, checkpoints=checkpoints, every=every, since=found, progress=progress)
    finally:
        run.close()
    return run.plan()


class Search(Run):
    """One search: a copy of the model, the pictures in two parts, and what there is to choose from."""

    name = "searching"

    def __init__(
        self, model: nn.Module, pictures: Pictures, settings: SearchSettings, preprocess: Preprocess | None
    ) -> None:
        if not is_classifier(model):
            raise ModelError(
                "search minimises a classifier's cross-entropy, and this model has no classes; "
                "ranks='waterfill' needs none"
            )
        check_uncompressed(model)
        self.settings, self.schedule = settings, Schedule(settings)
        self.steps = self.schedule.steps
        device = next(model.parameters()).device
        self.processes = Processes(cpu=device.type == "cpu")
        if settings.batch_size % self.processes.count:
            raise SettingsError(
                f"got batch_size={settings.batch_size}, expected a multiple of the {self.processes.count} processes"
            )
        self.preprocess = preprocess_of(model) if preprocess is None else preprocess
        self.pictures = pictures
        weights_part, ranks_part = pictures.split(settings.held_out, settings.seed)
        self.parts: dict[Phase, Pictures] = {"weights": weights_part, "ranks": ranks_part}
        self.model = copy.deepcopy(model).eval().to(device if self.processes.count == 1 else self.processes.device)
        self.labeller = None if pictures.has_labels else copy.deepcopy(self.model)
        self.identity = {
            **{f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _UNIMPORTANT},
            "data": pictures.name,
            "model": f"{type(model).__name__} with weights {fingerprint(model)}",
        }
        self.curve: list[dict[str, float]] = []

    # ---------------------------------------------------------------- before the first step

    def prepare(self, *, progress: bool = False) -> None:
        """Sites, candidates and costs: all that depends on the model and the settings alone."""
        for name, part in self.parts.items():
            if part.count is None:
                raise DataError(
                    f"{self.pictures.name} is a stream of unknown length: a search needs pictures that can be counted, "
                    "such as a folder or parquet files"
                )
            if part.count == 0:
                raise DataError(
                    f"no picture of {self.pictures.name} falls on the part that {name} are learned on "
                    f"(held_out={self.settings.held_out:g} of {self.pictures.count}); give more pictures"
                )
        self.prepared = self._measured(progress)
        self.space = space_of(self.model, self.prepared, self.settings)
        self.objective = Objective(
            self.settings, self.processes, self.labeller, goal=self.space.goal, fixed=self.space.fixed
        )
        self.feeds = {phase: self._feed(phase) for phase in self.parts}

    def begin(self) -> None:
        """Begin anew."""
        self._mix(self.prepared)

    def _mix(self, prepared: Prepared | None) -> None:
        self.mixture = Mixture(self.model, self.space.sites, self.space, self.settings, prepared)

    def _measured(self, progress: bool = False) -> Prepared:
        """What the model is like now, on pictures that the weights are learned on."""
        s = self.settings
        settings = CompressSettings(
            reduce=s.reduce, budget=s.budget, forms=s.forms, statistic=s.statistic, only=s.only, head=s.head,
            pictures=s.pictures, seed=s.seed,
        )  # fmt: skip
        chosen = self.parts["weights"].take(s.pictures, s.seed)
        shown = batches(chosen, self.preprocess, batch_size=min(64, s.batch_size))
        return prepare(self.model, shown, settings, progress=progress)

    def _feed(self, phase: Phase) -> Feed:
        data = TrainingData(
            pictures=self.parts[phase],
            transform=self.preprocess,
            batch_size=self.settings.batch_size // self.processes.count,
            seed=derive_seed(self.settings.seed, phase),
            processes=self.processes.count,
            process=self.processes.index,
            workers=self.settings.workers,
        )
        return Feed(data, self.processes, classes=self._classes() if self.labeller is None else None)

    def _classes(self) -> int:
        home = next(self.model.parameters())
        blank = self.preprocess.blank(home)
        with torch.no_grad():
            return model_output(self.model, blank).shape[1]

    # ---------------------------------------------------------------- one step

    def step(self, number: int, watch: LossWatch) -> Mapping[str, Any]:
        """One step on the probabilities or on the weights; a point of the curve."""
        round_, phase, within = self.schedule.at(number)
        if within == 0:
            self._enter(round_, phase)
        batch, count = self.feeds[phase].batch(self.schedule.seen(number))
        point = self._learn(number, phase, batch, count, watch)
        self.curve.append({"step": number + 1, "round": round_, **point})
        if phase == "ranks" and within == self.settings.rank_steps - 1:
            self.curve[-1]["top1"] = self._held_out_top1()
        return {
            "round": f"{round_ + 1}/{self.settings.rounds}",
            "phase": phase,
            "loss": f"{point['loss']:.3f}",
            "cost": f"{point['cost']:.3f}",
            "goal": f"{1 - self.settings.reduce:.3f}",
        }

    def _enter(self, round_: int, phase: Phase) -> None:
        """Begin a phase: decide the ranks for the weights; after the weights, put the channels in order anew."""
        if phase == "weights":
            self.mixture.begin_weights()
        elif round_ > 0 and self.settings.weight_steps:
            self.mixture.reorder(self._measured)

    def _learn(self, number: int, phase: Phase, batch: Batch, count: float, watch: LossWatch) -> dict[str, float]:
        mixture, cost = self.mixture, None
        optimizer = mixture.learning(phase)
        if phase == "ranks":
            mixture.leave_open()
            noise = torch.Generator().manual_seed(derive_seed(self.settings.seed, "gumbel", number))
            mixture.relaxation.sample(self.schedule.temperature(number), noise)
        local = self.objective.cross_entropy(self.model, batch, count)
        if phase == "ranks":
            cost = self.space.expected_cost(mixture.probabilities())
        loss, crossed, total = self.objective.over_processes(local, cost)
        loss.backward()
        learned = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.processes.add_(learned)
        watch.check(total, number + 1, mixture.relaxation.weights())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent = self.space.cost(mixture.likeliest()) if cost is None else float(cost.detach())
        return {"loss": total, "cross_entropy": float(crossed), "cost": spent / self.space.total}

    def _held_out_top1(self) -> float:
        """Top-1 in % at the likeliest ranks, on pictures that weights never saw (but α did)."""
        self.mixture.decide()
        chosen = self.parts["ranks"].take(HELD_OUT_CHECK, self.settings.seed)
        shown = batches(chosen, self.preprocess, batch_size=self.settings.batch_size)
        found = evaluate(self.model, shown, against=self.labeller)
        self.mixture.leave_open()
        return float(found.top1 if found.top1 is not None else found.agreement or 0.0)

    # ---------------------------------------------------------------- checkpoints, and the end

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.mixture.tensors()

    def state(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self._mix(None)
        self.mixture.restore(self.processes.share(tensors))
        self.curve = list(state["curve"])

    def close(self) -> None:
        """Let go of the pictures."""
        for feed in self.feeds.values():
            feed.close()

    def plan(self) -> Plan:
        """What α has come to."""
        s, space = self.settings, self.space
        choice = space.best(self.mixture.losses())
        every = max(1, len(self.curve) // 200)
        curve = [p for i, p in enumerate(self.curve) if i % every == 0 or "top1" in p]
        made_by = {
            "rule": "search",
            "statistic": s.statistic,
            "forms": list(check_forms(s.forms)),
            "budget": s.budget,
            "reduce": s.reduce,
            "multiple": s.multiple,
            "saved": 1 - space.cost(choice) / space.total,
            "predicted_loss": space.predicted_loss(choice) if s.statistic == "loss" else None,
            "search": {"settings": asdict(s), "curve": curve},
        }
        return Plan(sites=space.entries(choice), made_by=made_by, made_for=self.prepared.made_for)

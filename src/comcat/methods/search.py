"""Ranks found by search (COMCAT, Xiao et al. 2023, §3.2, Eq. 5–6, Figure 4).

Rounds alternate between the probabilities of candidate ranks (weights frozen) and the weights (ranks frozen at the likeliest
candidates). The probabilities minimise

    L = L_CE(Ȳ, Y) · (Σ_sites Σ_a p_a C(r_a) / ε)^β,    p = GumbelSoftmax(α),

on training pictures that the weights are never updated on. One forward stands for all candidates (:mod:`comcat.modules.relaxed`),
and the full factors stay as master weights: after each round they are put in order anew, so a rank chosen low can grow back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import StatisticName
from ..data import Pictures, Preprocess, batches
from ..errors import BudgetError, DataError, ModelError, SettingsError
from ..measure import evaluate, is_classifier, model_output
from ..models import preprocess_of
from ..plan import Plan, SitePlan
from ..relaxing import Relaxation, relax_
from ..runs.checkpoints import Checkpoints, check_settings
from ..runs.processes import Processes
from ..runs.seeding import derive_seed
from ..runs.state import fingerprint
from ..runs.watching import LossWatch
from ..settings import LARGEST_SEED, check_types, expect, from_keywords
from ..tuning.data import Batch, TrainingData, check_labels, open_labelled
from .allocate import Budget, allocate
from .candidates import Candidates, Grid, candidates_of, predicted_losses, settle, start_near
from .compress import CompressSettings, Prepared, prepare

Phase = Literal["ranks", "weights"]
HELD_OUT_CHECK = 1000
"""Held-out pictures on which each round's ranks are measured."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; the command line and recipes are made from these fields."""

    beta: float = 1.5
    """Exponent β of the cost in Eq. 6."""
    penalty: Literal["always", "above"] = "always"
    """Whether the cost weighs always, as in Eq. 6, or only above the budget."""
    grid: Grid = "near"
    """Candidate ranks: from a quarter to four times the closed form's, in equal steps up to the largest that saves, or the sets of the paper's code."""
    grid_size: int = 9
    """How many candidates there are near the closed form's rank, or in equal steps."""
    candidates: tuple[int, ...] = ()
    """Candidate ranks themselves, summed over the heads of a layer as the paper states them."""
    start: Literal["waterfill", "blind"] = "waterfill"
    """Begin at the closed form's ranks, or with all candidates alike as the paper does."""
    rounds: int = 4
    """Rounds of learning probabilities; between two of them, weights are learned."""
    rank_steps: int = 50
    """Steps a round on the probabilities."""
    weight_steps: int = 50
    """Steps a round on the weights; 0 keeps them as they are."""
    batch_size: int = 64
    """Pictures a step, over all processes."""
    rank_lr: float = 0.05
    """Adam's learning rate for α."""
    weight_lr: float = 2e-5
    """AdamW's learning rate for the weights."""
    weight_decay: float = 0.005
    """AdamW's weight decay."""
    temperature: float = 5.0
    """Temperature of the Gumbel-softmax at the first step."""
    final_temperature: float = 0.1
    """Temperature at the last; between the two it falls geometrically."""
    held_out: float = 0.2
    """Share of the training pictures that the probabilities are learned on and the weights never see."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What to compute the forward passes in."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    workers: int = 0
    """Processes that read and decode pictures ahead, for each training process."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "rounds", "rank_steps", "batch_size", "grid_size", "checkpoint_every", "keep", least=1)
        expect(self, "candidates", least=1)
        expect(self, "rank_lr", "temperature", "final_temperature", above=0)
        expect(self, "weight_steps", "beta", "weight_lr", "weight_decay", "workers", least=0)
        expect(self, "held_out", above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(SearchOptions):
    """What to search for, and how."""

    reduce: float = 0.5
    """Share of the whole model's cost to save, for example 0.5."""
    budget: Budget = "parameters"
    """What cost is: parameters or macs (multiply-accumulates)."""
    statistic: StatisticName = "loss"
    """What orders the channels and predicts losses: the weights alone (the paper), activations, or their effect on the loss."""
    multiple: int = 1
    """Candidates are multiples of it (per head); 8 suits 16-bit GPU kernels."""
    only: tuple[str, ...] = ()
    """Kinds (qk, vo, linear) or path prefixes (blocks.3) that may shrink; by default all."""
    pictures: int = 512
    """How many pictures to calibrate on, each round."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "reduce", above=0, below=1)
        expect(self, "multiple", "pictures", least=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)


def search(
    model: nn.Module,
    data: Pictures | str | Path,
    *,
    preprocess: Preprocess | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Plan:
    """Find the ranks of a plan by search; the model itself is untouched.

    Args:
        data: training pictures, or what :func:`comcat.open_pictures` takes. Labels are used where there are any; else the model's own
            predictions stand in for them. Never the evaluation set.
        preprocess: how pictures become inputs, by default as the model's data configuration says.
        out: folder for checkpoints: the same call goes on where it was stopped. ``restart`` forgets them first.
        settings: fields of :class:`SearchSettings`.

    Returns:
        The plan, within the budget. ``made_by["search"]`` holds what Figures 6 and 7 show: for every point step, round, expected cost
        (share of the whole model), loss, and for each round held-out top-1 at the ranks it settled on.

    Raises:
        BudgetError: if even the smallest candidates cost too much. DataError: where a part of the pictures is empty, or labels do not fit.
        NumericsError: if the loss is no number or explodes. StoreError: where checkpoints were made with other settings.
    """
    chosen = from_keywords(SearchSettings, settings)
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
    run = _Search(model, open_labelled(model, data), settings, preprocess, None if out is None else Path(out))
    return run.go(restart=restart, progress=progress)


class _Search:
    """One run: the model under search, the optimizers, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        pictures: Pictures,
        settings: SearchSettings,
        preprocess: Preprocess | None,
        out: Path | None,
    ) -> None:
        if not is_classifier(model):
            raise ModelError(
                "search minimises a classifier's cross-entropy, and this model has no classes; ranks='waterfill' needs none"
            )
        self.settings = settings
        device = next(model.parameters()).device
        self.processes = Processes(cpu=device.type == "cpu")
        self.device = device if self.processes.count == 1 else self.processes.device
        if settings.batch_size % self.processes.count:
            raise SettingsError(
                f"got batch_size={settings.batch_size}, expected a multiple of the {self.processes.count} processes"
            )
        self.preprocess = preprocess_of(model) if preprocess is None else preprocess
        self.pictures = pictures
        self.weights_part, self.ranks_part = pictures.split(settings.held_out, settings.seed)
        self.checkpoints = None if out is None else Checkpoints(out / "checkpoints", keep=settings.keep)
        self.model = copy.deepcopy(model).eval().to(self.device)
        self.labeller = None if pictures.has_labels else copy.deepcopy(self.model)
        self.model_name = f"{type(model).__name__} with weights {fingerprint(model)}"
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.watch = LossWatch()

    # ---------------------------------------------------------------- the run

    def go(self, *, restart: bool, progress: bool) -> Plan:
        from tqdm import tqdm

        saved = None
        if self.checkpoints is not None:
            if restart and self.processes.main:
                self.checkpoints.clear()
            self.processes.agree()
            saved = self.checkpoints.latest()
            if saved is not None:
                check_settings(saved, self._identity())
        with self.processes.together():
            self._prepare(progress and self.processes.main)
        if saved is None:
            self.relaxation = self._relax(self.prepared)
            self._start()
        else:
            self._restore(saved)
        s = self.settings
        total = s.rounds * s.rank_steps + (s.rounds - 1) * s.weight_steps
        bar = tqdm(
            total=total,
            initial=self.step,
            desc="searching",
            unit="step",
            disable=not (progress and self.processes.main),
        )
        streams: dict[Phase, Iterator[Batch]] = {}
        with bar:
            while self.step < total:
                round_, phase, inner = self.position(self.step)
                if inner == 0:
                    self._enter(round_, phase)
                if phase not in streams:
                    streams[phase] = self._stream(phase, self._seen(phase))
                point = self._one_step(phase, next(streams[phase]))
                self.step += 1
                self.curve.append({"step": self.step, "round": round_, **point})
                bar.set_postfix(
                    round=f"{round_ + 1}/{s.rounds}",
                    phase=phase,
                    loss=f"{point['loss']:.3f}",
                    cost=f"{point['cost']:.3f}",
                    goal=f"{1 - s.reduce:.3f}",
                )
                bar.update()
                if phase == "ranks" and inner == s.rank_steps - 1:
                    self.curve[-1]["top1"] = self._held_out_top1()
                if self.step % s.checkpoint_every == 0 or self.step == total:
                    self._save()
        return self._plan()

    def position(self, step: int) -> tuple[int, Phase, int]:
        """Round, phase and the step's number within the phase."""
        s = self.settings
        round_, inner = divmod(step, s.rank_steps + s.weight_steps)
        return (round_, "ranks", inner) if inner < s.rank_steps else (round_, "weights", inner - s.rank_steps)

    def _seen(self, phase: Phase) -> int:
        """Batches of a phase before this step."""
        s = self.settings
        round_, now, inner = self.position(self.step)
        before = round_ * (s.rank_steps if phase == "ranks" else s.weight_steps)
        if now == phase:
            return before + inner
        return before + (s.rank_steps if phase == "ranks" else 0)

    def _stream(self, phase: Phase, start: int) -> Iterator[Batch]:
        part = self.ranks_part if phase == "ranks" else self.weights_part
        data = TrainingData(
            pictures=part,
            transform=self.preprocess,
            batch_size=self.settings.batch_size // self.processes.count,
            seed=derive_seed(self.settings.seed, phase),
            processes=self.processes.count,
            process=self.processes.index,
            workers=self.settings.workers,
        )
        epoch, batch = divmod(start, data.steps())
        while True:
            yield from data.epoch(epoch, start=batch)
            epoch, batch = epoch + 1, 0

    # ---------------------------------------------------------------- setting up

    def _prepare(self, progress: bool) -> None:
        """Sites, candidates and costs: all that depends on the model and the settings alone."""
        for name, part in (("weights", self.weights_part), ("ranks", self.ranks_part)):
            if part.count == 0:
                raise DataError(
                    f"no picture of {self.pictures.name} falls on the part that {name} are learned on "
                    f"(held_out={self.settings.held_out:g} of {self.pictures.count}); give more pictures"
                )
        self.prepared = self._calibrated(progress)
        p, s = self.prepared, self.settings
        self.cost = (lambda site, rank: float(site.parameters(rank))) if p.macs is None else p.macs
        near = self._closed_form() if s.grid == "near" and not s.candidates else None
        self.candidates: dict[str, Candidates] = candidates_of(
            p.sites, self.cost, grid=s.grid, size=s.grid_size, near=near, totals=s.candidates, multiple=s.multiple
        )
        self.fixed = p.total - sum(self.cost(site, None) for site in p.sites.values())
        self.goal = (1 - s.reduce) * p.total
        self.predicted = predicted_losses(self.candidates, p.factorizations, relative=s.statistic != "loss")
        least = self.fixed + sum(min(c.costs) for c in self.candidates.values())
        if least > self.goal:
            raise BudgetError(
                f"got reduce={s.reduce:g}, but the smallest candidates save at most {1 - least / p.total:.4g} of the model's {s.budget}"
            )

    def _closed_form(self) -> dict[str, int]:
        """The ranks of the water-filled plan; sites that it leaves as they are are not named."""
        s, p = self.settings, self.prepared
        plan = allocate(
            self.model, p.statistic, reduce=s.reduce, budget=s.budget, sites=p.sites, factorizations=p.factorizations,
            multiple=s.multiple, total=p.total, macs=p.macs,
        )  # fmt: skip
        return {name: entry.rank for name, entry in plan.sites.items()}

    def _calibrated(self, progress: bool = False) -> Prepared:
        s = self.settings
        settings = CompressSettings(
            reduce=s.reduce, budget=s.budget, statistic=s.statistic, only=s.only, pictures=s.pictures, seed=s.seed
        )
        chosen = self.weights_part.take(s.pictures, s.seed)
        shown = batches(chosen, self.preprocess, batch_size=min(64, s.batch_size))
        return prepare(self.model, shown, settings, progress=progress)

    def _relax(self, prepared: Prepared | None) -> Relaxation:
        sites = self.prepared.sites
        ranks = {n: c.ranks for n, c in self.candidates.items()}
        if prepared is None:
            return relax_(self.model, sites, ranks, None)
        return relax_(self.model, sites, ranks, prepared.statistic, prepared.factorizations)

    def _start(self) -> None:
        if self.settings.start == "waterfill":
            choice = settle(self.candidates, self.predicted, self.goal - self.fixed)
            with torch.no_grad():
                for name, logits in self.relaxation.logits():
                    logits.copy_(start_near(choice[name], len(logits)))
        self.rank_optimizer = torch.optim.Adam([p for _, p in self.relaxation.logits()], lr=self.settings.rank_lr)
        self.weight_optimizer: torch.optim.Optimizer | None = None

    def _enter(self, round_: int, phase: Phase) -> None:
        """Begin a phase: decide the ranks for the weights; after the weights, put the channels in order anew."""
        if phase == "weights":
            self._decide()
            self.weight_optimizer = self._new_weight_optimizer()
        elif round_ > 0 and self.settings.weight_steps:
            logits = {n: p.detach().clone() for n, p in self.relaxation.logits()}
            moments = self.rank_optimizer.state_dict()
            self.relaxation.fold()
            self.relaxation = self._relax(self._calibrated())
            with torch.no_grad():
                for name, p in self.relaxation.logits():
                    p.copy_(logits[name])
            self.rank_optimizer = torch.optim.Adam([p for _, p in self.relaxation.logits()], lr=self.settings.rank_lr)
            self.rank_optimizer.load_state_dict(moments)
            self.weight_optimizer = None

    def _decide(self) -> None:
        self.relaxation.decide(
            {n: self.candidates[n].ranks[soft.likeliest] for n, soft in self.relaxation.soft.items()}
        )

    def _new_weight_optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.AdamW([p for _, p in self.relaxation.weights()], lr=s.weight_lr, weight_decay=s.weight_decay)

    # ---------------------------------------------------------------- one step

    def _one_step(self, phase: Phase, batch: Batch) -> dict[str, float]:
        learns_ranks = phase == "ranks"
        for _, p in self.relaxation.weights():
            p.requires_grad_(not learns_ranks)
        for _, p in self.relaxation.logits():
            p.requires_grad_(learns_ranks)
        optimizer = self.rank_optimizer if learns_ranks else self.weight_optimizer
        assert optimizer is not None
        if learns_ranks:
            self.relaxation.decide(None)
            noise = torch.Generator().manual_seed(derive_seed(self.settings.seed, "gumbel", self.step))
            self.relaxation.sample(self.temperature(), noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            local = self._cross_entropy(batch)
        crossed = self._sum(local.detach().clone())
        cost = self.expected_cost() if learns_ranks else torch.tensor(float(self.decided_cost()), device=self.device)
        if learns_ranks:
            penalty = self.penalty(cost)
            share = 1 / self.processes.count
            loss = (
                local * penalty.detach() + share * crossed * penalty
            )  # both factors' part of the gradient, summed over processes
        else:
            penalty, loss = torch.ones(()), local
        loss.backward()
        self._sum_gradients([p for group in optimizer.param_groups for p in group["params"]])
        total = float(crossed * penalty.detach().to(crossed))
        self.watch.last_good = self._last_good()
        self.watch.check(total, self.step + 1, self.relaxation.weights())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "cross_entropy": float(crossed), "cost": float(cost.detach()) / self.prepared.total}

    def temperature(self) -> float:
        """Falls geometrically over the steps on ranks."""
        s = self.settings
        done = self._seen("ranks") / max(s.rounds * s.rank_steps - 1, 1)
        return s.temperature * (s.final_temperature / s.temperature) ** done

    def expected_cost(self) -> Tensor:
        """``Σ_sites Σ_a p_a C(r_a)`` and what does not change, (): Eq. 6."""
        total = torch.tensor(float(self.fixed), device=self.device)
        for name, soft in self.relaxation.soft.items():
            costs = torch.tensor(self.candidates[name].costs, dtype=torch.float32, device=self.device)
            total = total + soft.probabilities() @ costs
        return total

    def decided_cost(self) -> float:
        return self.fixed + sum(c.costs[self.relaxation.soft[n].likeliest] for n, c in self.candidates.items())

    def penalty(self, cost: Tensor) -> Tensor:
        """``(cost / ε)^β``, ε the budget."""
        ratio = cost / self.goal
        return (ratio.clamp(min=1.0) if self.settings.penalty == "above" else ratio) ** self.settings.beta

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """This process's part of the mean over the global batch."""
        images, weights = batch.images.to(self.device), batch.weights.to(self.device)
        output = model_output(self.model, images.to(next(self.model.parameters()).dtype)).float()
        if self.labeller is None:
            assert batch.labels is not None
            check_labels(batch.labels, output.shape[-1])
            labels = batch.labels.to(self.device)
        else:
            with torch.no_grad():
                labels = model_output(self.labeller, images).float().softmax(-1)
        losses = F.cross_entropy(output, labels, reduction="none")
        return (losses * weights).sum() / self._sum(weights.sum()).clamp(min=1)

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.processes.count > 1:
            dist.all_reduce(value)
        return value

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.processes.count == 1:
            return
        used = [p for p in parameters if p.grad is not None]
        flat = self._sum(torch.cat([p.grad.flatten() for p in used]))  # type: ignore[union-attr]
        for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
            p.grad = part.view_as(p)

    def _held_out_top1(self) -> float:
        """Top-1 in % at the likeliest ranks, on pictures that weights never saw (but α did)."""
        self._decide()
        chosen = self.ranks_part.take(HELD_OUT_CHECK, self.settings.seed)
        found = evaluate(
            self.model, batches(chosen, self.preprocess, batch_size=self.settings.batch_size), reference=self.labeller
        )
        self.relaxation.decide(None)
        return float(found.top1 if found.top1 is not None else found.agreement or 0.0)

    # ---------------------------------------------------------------- the end

    def _plan(self) -> Plan:
        losses = {n: (-logits.detach().double().log_softmax(-1)).tolist() for n, logits in self.relaxation.logits()}
        choice = settle(self.candidates, losses, self.goal - self.fixed)
        entries = {
            n: SitePlan(rank=c.ranks[choice[n]], full_rank=c.site.full_rank)
            for n, c in self.candidates.items()
            if c.costs[choice[n]] < self.cost(c.site, None)
        }
        spent = self.fixed + sum(c.costs[choice[n]] for n, c in self.candidates.items())
        s, total = self.settings, self.prepared.total
        every = max(1, len(self.curve) // 200)
        made_by = {
            "rule": "search", "statistic": s.statistic, "budget": s.budget, "reduce": s.reduce, "multiple": s.multiple, "saved": 1 - spent / total,
            "predicted_loss": sum(self.predicted[n][i] for n, i in choice.items()) if s.statistic == "loss" else None,
            "search": {"settings": asdict(s), "curve": [p for i, p in enumerate(self.curve) if i % every == 0 or "top1" in p]},
        }  # fmt: skip
        return Plan(sites=entries, made_by=made_by)

    # ---------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with its checkpoints."""
        unimportant = {"checkpoint_every", "keep", "workers"}
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in unimportant}
        return {**settings, "data": self.pictures.name, "model": self.model_name}

    def _last_good(self) -> str:
        last = None if self.checkpoints is None else self.checkpoints.latest()
        return "no checkpoint was written" if last is None else f"the last good checkpoint is {last.path}"

    def _save(self) -> None:
        if self.checkpoints is None or not self.processes.main:
            return
        ranks = {f"logits/{n}": p.detach() for n, p in self.relaxation.logits()}
        ranks |= {f"center/{n}": c for n, c in self.relaxation.centers.items()}
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "ranks": ranks,
            "rank_optimizer": _moments(self.rank_optimizer),
        }
        if self.weight_optimizer is not None:
            tensors["weight_optimizer"] = _moments(self.weight_optimizer)
        self.checkpoints.save(self.step, tensors, {"settings": self._identity(), "curve": self.curve})

    def _restore(self, saved: Any) -> None:
        self.relaxation = self._relax(None)
        self._start()
        self.step, self.curve = saved.step, list(saved.state["curve"])
        tensors = saved.tensors("ranks")
        self.model.load_state_dict(saved.tensors("model"))
        with torch.no_grad():
            for name, p in self.relaxation.logits():
                p.copy_(tensors[f"logits/{name}"])
            for name, center in self.relaxation.centers.items():
                center.copy_(tensors[f"center/{name}"])
        _set_moments(self.rank_optimizer, saved.tensors("rank_optimizer"))
        if (saved.path / "weight_optimizer.safetensors").is_file():
            self._decide()
            self.weight_optimizer = self._new_weight_optimizer()
            _set_moments(self.weight_optimizer, saved.tensors("weight_optimizer"))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by the number of the parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{k}": v for i, entry in state.items() for k, v in entry.items()}


def _set_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

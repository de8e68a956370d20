"""A model in training whose gates close: what a step of tuning does, and what becomes of the gates besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...data import Batches, batches
from ...errors import SettingsError
from ...forms.gates import Gates
from ...modules.gates import Gate
from ...plan import Plan
from ...runs.seeding import derive_seed
from ...runs.watching import LossWatch
from ...tuning.setup import Setup
from ...tuning.step import Training
from .ground import ClosedForm, Ground
from .marks import Marks, ranked, scores
from .schedule import Schedule
from .settings import PruneSettings
from .takeover import StandIn, reader_of, stand_ins

STAND_IN = tuple(field.name for field in fields(StandIn))


class GatedTraining(Training):
    """Tuning of a model with gates. ``marks`` are there from the first step on; ``history`` tells every choice."""

    name = "prune"

    def __init__(
        self, setup: Setup, settings: PruneSettings, ground: Ground, gates: Gates, closed: ClosedForm | None
    ) -> None:
        super().__init__(setup)
        if self.accelerator.is_fsdp2:
            raise SettingsError("pruning needs whole weights in every process: launch it with DDP instead of FSDP")
        self.asked, self.ground, self.gates, self.closed = settings, ground, gates, closed
        self.schedule = Schedule(settings, setup.steps)
        self.marks = Marks(Plan(sites={}), {n: _in_order(gate) for n, gate in gates.items()})
        self.stand_ins: dict[str, StandIn] = {}
        self.history: list[dict[str, Any]] = []
        self.gate_optimizer = torch.optim.Adam([g.opening for g in gates.values()], lr=settings.gate_lr)

    def step(self, number: int, watch: LossWatch) -> Mapping[str, Any]:
        """Mark channels anew if it is time for that, then one update of weights and gates."""
        if number in self.schedule.choices:
            self._mark(number)
        return {**super().step(number, watch), "saves": f"{self.marks.plan.made_by['saved']:.3f}"}

    # ---------------------------------------------------------------- marks

    def _mark(self, number: int) -> None:
        before, reduce = self.marks, self.schedule.reduce(number)
        if number == 0 and self.closed is not None:
            plan = self.ground.plan(self.closed.spectra, reduce, self.closed.statistic)
            self.marks = Marks(plan, self.closed.orders)
        else:
            found, orders = ranked(self.ground.sites, self.processes.share(self._scores(number)))
            self.marks = Marks(self.ground.plan(found, reduce), orders)
        if self.asked.take_over:
            self.stand_ins = self.processes.share(self._stand_ins())
        plan = self.marks.plan
        self.history.append(
            {
                "step": number,
                "saves": plan.made_by["saved"],
                "marked": self.marks.count(),
                "returned": self.marks.returned(before),
                "predicted_loss": plan.made_by["predicted_loss"],
            }
        )

    def _scores(self, number: int) -> dict[str, Tensor]:
        seed = derive_seed(self.asked.seed, "gates", number)
        return scores(self.learner.bare, self.gates, self._shown_to_gates(), seed=seed)

    def _stand_ins(self) -> dict[str, StandIn]:
        marked = {name: self.marks.mask(name) for name in self.gates}
        return stand_ins(self.learner.bare, self.ground.sites, self.gates, marked, self._shown_to_gates())

    def _shown_to_gates(self) -> Batches:
        s = self.asked
        chosen = self.setup.data.pictures.take(s.pictures, s.seed)
        return batches(chosen, self.setup.preprocess, batch_size=min(64, s.batch_size))

    # ---------------------------------------------------------------- gates

    def update(self, number: int) -> None:
        super().update(number)
        before = {name: gate.opening.detach().clone() for name, gate in self.gates.items()}
        self._move_gates(number, before)
        for model in {self.learner.bare, self.learner.judged}:  # the moving average has the same gates
            for name, stand_in in self.stand_ins.items():
                reader, gate = reader_of(model, self.ground.sites[name]), self.gates[name]
                assert reader is not None
                stand_in.take_over_(reader, before[name].flatten(), gate.opening.detach().flatten(), gate.rest)

    @torch.no_grad()
    def _move_gates(self, number: int, before: Mapping[str, Tensor]) -> None:
        """Open gates learn; of marked ones the task's gradient is reset, and they are pulled shut."""
        marked = {name: self.marks.mask(name) for name in self.gates}
        openings = [gate.opening for gate in self.gates.values()]
        self.processes.add_([g.grad for g in openings if g.grad is not None])
        for name, gate in self.gates.items():
            if gate.opening.grad is not None:
                gate.opening.grad.div_(self.processes.count).masked_fill_(marked[name], 0.0)
        for group in self.gate_optimizer.param_groups:
            group["lr"] = self.asked.gate_lr * (self.learner.lr / self.asked.lr if self.asked.lr else 0.0)
        self.gate_optimizer.step()
        self.gate_optimizer.zero_grad(set_to_none=True)
        shut = number >= self.schedule.shut
        for name, gate in self.gates.items():
            gate.opening.copy_(torch.where(marked[name], before[name], gate.opening))
            pull_(gate, self.marks.last(name), 1.0 if shut else 1 / self.schedule.closing, shut=shut)

    # ---------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}
        moments = self.gate_optimizer.state_dict()["state"]
        for number, (name, gate) in enumerate(self.gates.items()):
            kept[f"opening/{name}"], kept[f"order/{name}"] = gate.opening.detach(), self.marks.orders[name]
            if gate.rest is not None:
                kept[f"rest/{name}"] = gate.rest
            kept |= {f"{moment}/{name}": value for moment, value in moments.get(number, {}).items()}
            if name in self.stand_ins:
                kept |= {f"stand_in.{field}/{name}": value for field, value in vars(self.stand_ins[name]).items()}
        return {**super().tensors(), "gates": {n: t.cpu().contiguous() for n, t in kept.items()}}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "gated": list(self.gates), "plan": self.marks.plan.to_dict(), "marked": self.history}

    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        super().restore(step, tensors, state)
        kept: Mapping[str, Tensor] = self.processes.share(dict(tensors.get("gates", {})))
        moments: dict[int, dict[str, Tensor]] = {}
        orders, self.stand_ins = {}, {}
        for number, (name, gate) in enumerate(self.gates.items()):
            home = gate.opening.device
            with torch.no_grad():
                gate.opening.copy_(kept[f"opening/{name}"])
            rest = kept.get(f"rest/{name}")
            gate.rest, orders[name] = None if rest is None else rest.to(home), kept[f"order/{name}"].to(home)
            found = {m: kept[f"{m}/{name}"] for m in ("step", "exp_avg", "exp_avg_sq") if f"{m}/{name}" in kept}
            if found:
                moments[number] = found
            if f"stand_in.weights/{name}" in kept:
                self.stand_ins[name] = StandIn(**{f: kept[f"stand_in.{f}/{name}"].to(home) for f in STAND_IN})
        groups = self.gate_optimizer.state_dict()["param_groups"]
        self.gate_optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.marks = Marks(Plan.from_dict(state["plan"]), orders)
        self.history = list(state["marked"])


@torch.no_grad()
def pull_(gate: Gate, columns: Tensor, step: float, *, shut: bool = False) -> None:
    """Pull marked channels of all heads together towards 0, in place: the proximal step of a group lasso.

    ``G ← G · max(0, 1 − step / ‖G‖)`` with ``‖G‖`` the root mean square over the heads of a column.

    Args:
        columns: channels by head, (heads, marked). step: an open group is shut after ``1 / step`` pulls.
        shut: set them to 0 at once.
    """
    group = gate.opening.gather(1, columns)
    norm = group.square().mean(0).sqrt()
    left = torch.zeros_like(norm) if shut else (1 - step / norm.clamp_min(1e-12)).clamp_min(0)
    gate.opening.scatter_(1, columns, group * left)


def _in_order(gate: Gate) -> Tensor:
    heads, channels = gate.opening.shape
    return torch.arange(channels, device=gate.opening.device).expand(heads, -1).clone()

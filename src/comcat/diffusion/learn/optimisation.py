"""What a step of learning a concept does: noise, prediction, error, update; on :mod:`comcat.runs.loop`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...runs.loop import Run
from ...runs.processes import Processes
from ...runs.seeding import derive_seed
from ...runs.watching import LossWatch
from ..pipeline.failures import shortage_explained
from ..pipeline.families import Conditions, Family
from ..pipeline.noising import Noising
from ..pipeline.offloading import is_offloaded, kept_for_gradients
from ..pipeline.residence import computing_dtype
from .settings import CustomizeSettings


class Batch(NamedTuple):
    """What all processes see in a step: latents (batch, channels, height, width), conditions, weights (batch,), and
    what counts of each place, (batch, 1, height, width).
    """

    latents: Tensor
    conditions: Conditions
    weights: Tensor
    masks: Tensor


class Source(Protocol):
    """Draws the batch of a step, whatever steps were drawn before."""

    def __call__(self, step: int, generator: torch.Generator) -> Batch: ...


def share_of(batch: Any, processes: Processes) -> Any:
    """This process's part of tensors (batch, …), or of a dictionary of them."""
    if isinstance(batch, dict):
        return {name: share_of(value, processes) for name, value in batch.items()}
    return batch[processes.index :: processes.count]


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps that are done."""
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Time in steps, since this process began."""


class Optimisation(Run):
    """AdamW on a few parameters of a frozen pipeline.

    Args:
        parameters: what is trained, by the names it has on disk.
        source: draws batches.
        constrain: called before the first step and after each.
        identity: what a checkpoint to go on from must agree with.
        afterwards: called with the number of steps done, when they are kept.
    """

    name = "learning"

    def __init__(
        self,
        family: Family,
        noising: Noising,
        parameters: Mapping[str, nn.Parameter],
        source: Source,
        settings: CustomizeSettings,
        processes: Processes,
        constrain: Callable[[], None] = lambda: None,
        identity: Mapping[str, Any] = MappingProxyType({}),
        afterwards: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.constrain, self.afterwards = constrain, afterwards
        self.steps, self.identity = settings.steps, identity
        constrain()
        self.family, self.noising, self.parameters = family, noising, dict(parameters)
        self.source, self.settings, self.processes = source, settings, processes
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.dtype = computing_dtype(family.denoiser)
        self.keeping = kept_for_gradients if is_offloaded(family.denoiser) else nullcontext
        half = self.dtype == torch.float16
        # Gradients pass through the frozen model in its own type; in float16 small ones would vanish.
        self.scaler = torch.amp.GradScaler(family.device.type, enabled=half, init_scale=2.0**12)
        self.progress = Progress()

    def loss(self, step: int) -> Tensor:
        """This process's part of the weighted mean of squared errors at a step (Eq. 7)."""
        generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, "step", step))
        batch = self.source(step, generator)
        times = self.noising.draw(len(batch.latents), generator).to(batch.latents.device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
        latents, conditions, weights, masks, times, noise = (
            share_of(part, self.processes) for part in (*batch, times, noise)
        )
        noisy = self.noising.mix(latents, noise, times)
        predicted = self.family.predict(
            noisy.to(self.dtype), times, {k: _as_computed(k, v, self.dtype) for k, v in conditions.items()}
        )
        errors = (predicted.float() - self.noising.target(latents, noise, times).float()).square() * masks
        errors = errors.flatten(1).mean(1)
        return (errors * weights.to(errors) * self.noising.weight(times).to(errors)).sum()

    def step(self, number: int, watch: LossWatch) -> Mapping[str, str]:
        """One update by the batch of a step, shared out among the processes."""
        started = time.perf_counter()
        trained = list(self.parameters.values())
        self.optimizer.zero_grad(set_to_none=True)
        with shortage_explained(f"training at step {number}", self._what_would_fit()):
            with self.keeping():
                loss = self.loss(number)
            self.scaler.scale(loss).backward()
        self._gather()
        value = self._summed(loss)
        watch.check(value, number, self.parameters.items(), advice="a lower lr may help")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(number)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(trained, self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.constrain()
        self.progress.step = number + 1
        self.progress.losses.append(value)
        self.progress.seconds += time.perf_counter() - started
        return {"loss": f"{_recent(self.progress.losses):.4f}"}

    def _gather(self) -> None:
        """Gradients and moments to where their parameters are now: offloading may move those as it moves the weights
        beside them.
        """
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(parameter.device)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key != "step":
                    self.optimizer.state[parameter][key] = value.to(parameter.device)

    def _summed(self, loss: Tensor) -> float:
        """The loss over all processes; the parameters' gradients become their sums.

        What is trained is so small that one reduction costs nothing, and the models need no wrapper.
        """
        total = loss.detach().float().clone()
        if self.processes.count > 1:
            for parameter in self.parameters.values():
                if parameter.grad is None:  # it had no part in this process's share
                    parameter.grad = torch.zeros_like(parameter)
        self.processes.add_([total, *(p.grad for p in self.parameters.values() if p.grad is not None)])
        return float(total)

    def after(self, done: int) -> None:
        """What the owner of the run does between steps."""
        self.afterwards(done)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The parameters and the optimizer's moments, by name."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {"adapter": dict(self.parameters), "optimizer": moments}

    def state(self) -> dict[str, Any]:
        """The rest of what a later run needs to go on, as plain data."""
        return {"losses": self.progress.losses, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`tensors` and :meth:`state` gave; the main process alone needs the tensors."""
        tensors = self.processes.share(tensors)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors["adapter"][name])
            own = {k: v for k, v in tensors["optimizer"].items() if k.rpartition(".")[0] == name}
            self.optimizer.state[parameter] = {
                k.rpartition(".")[2]: v if k.endswith(".step") else v.to(parameter.device) for k, v in own.items()
            }
        self.scaler.load_state_dict(state["scaler"])
        self.progress.step, self.progress.losses = step, list(state["losses"])

    def _what_would_fit(self) -> list[str]:
        settings, advice = self.settings, []
        if settings.batch_size > 1:
            advice.append("batch_size 1")
        if not settings.gradient_checkpointing:
            advice.append("gradient_checkpointing")
        if settings.text_encoder or settings.new_token:
            advice.append("leaving the text encoder as it is")
        if self.dtype == torch.float32:
            advice.append("a base in 16 bit (dtype bfloat16)")
        side = settings.resolution or self.family.resolution()
        if side // 2 >= self.family.multiple():
            advice.append(f"resolution {side // 2} instead of {side}, a quarter of the activations")
        return advice


def _as_computed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A condition in the type to compute in; masks stay, and numbers of pixels, which 16 bit would round."""
    return value.to(dtype) if value.is_floating_point() and name != "time_ids" else value


def _recent(losses: list[float], window: int = 50) -> float:
    """The mean of the last losses: single ones depend on the time drawn more than on what was learned."""
    last = losses[-window:]
    return sum(last) / len(last)

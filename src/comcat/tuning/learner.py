"""A model in training: which of its weights change, how they are updated, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, nearest
from ..measure.running import unwrap
from ..models.failures import required
from ..runs.state import model_state, optimizer_groups, optimizer_tensors, restore_model, restore_optimizer
from .settings import TuneSettings

_UNDECAYED = (
    "*cls_token",
    "*dist_token",
    "*distillation_token",
    "*reg_token",
    "*register_tokens",
    "*pos_embed",
    "*position_embeddings",
)


class Learner:
    """A model with its optimizer (AdamW), schedule (cosine) and moving average, spread over processes by accelerate."""

    def __init__(self, model: nn.Module, settings: TuneSettings, steps: int, accelerator: Any) -> None:
        """``model`` is trained itself, but for parameters without ``requires_grad``; ``steps`` are those of the run."""
        required("timm")
        from timm.optim import param_groups_weight_decay
        from timm.scheduler import CosineLRScheduler
        from timm.utils.model_ema import ModelEmaV3

        self.settings, self.accelerator = settings, accelerator
        model.train()
        undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=(*undecayed, *_UNDECAYED))
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=accelerator.device.type == "cuda")
        # Before the model is spread: a sharded one cannot be copied.
        ema = None if settings.ema is None else ModelEmaV3(model, decay=settings.ema, use_warmup=True)
        self.model, prepared = accelerator.prepare(model, optimizer)
        self._prepared, self.optimizer = prepared, prepared.optimizer
        self.ema = ema
        if ema is not None and accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            ema.module = fsdp2_prepare_model(accelerator, ema.module)
        elif ema is not None:
            ema.to(accelerator.device)
        self._schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(steps, 1),
            lr_min=settings.min_lr,
            warmup_t=int(settings.warmup * steps),
            warmup_lr_init=settings.min_lr,
            t_in_epochs=False,
        )

    @property
    def bare(self) -> nn.Module:
        """The model without the wrapper of DDP."""
        return unwrap(self.model)

    @property
    def judged(self) -> nn.Module:
        """What is evaluated and returned: the moving average if there is one."""
        return self.bare if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.bare.named_parameters()

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        self._schedule.step_update(step)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, averaged over the processes."""
        self.accelerator.backward(loss)

    def part(self, *, last: bool) -> AbstractContextManager:
        """Where a part of a batch goes forward and backward.

        Gradients are averaged over the processes after the last part alone.
        """
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def update(self, step: int) -> None:
        """Change the weights by the gradients, at the end of a step counted from 0."""
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._prepared.step()
        self._prepared.zero_grad()
        if self.ema is not None:
            self.ema.update(self.bare, step=step + 1)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors to go on with, in the main process, in named groups. All processes must call it."""
        tensors = {"model": model_state(self.bare), "optimizer": optimizer_tensors(self.bare, self.optimizer)}
        return tensors if self.ema is None else {**tensors, "ema": model_state(self.ema.module)}

    def state(self) -> dict[str, Any]:
        """The plain data to go on with. All processes must call it."""
        scaler = self.accelerator.scaler
        groups = optimizer_groups(self.bare, self.optimizer)
        return {"groups": groups, "scaler": None if scaler is None else scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
        """Take up what :meth:`tensors` and :meth:`state` gave; the main process alone needs the tensors.

        All must call it.
        """
        restore_model(self.bare, tensors.get("model", {}))
        restore_optimizer(self.bare, self.optimizer, tensors.get("optimizer", {}), plain["groups"])
        if self.ema is not None:
            restore_model(self.ema.module, tensors.get("ema", {}))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(plain["scaler"])


def freeze_but(model: nn.Module, words: Sequence[str]) -> None:
    """Freeze all parameters but those with one of the words in their path: ``attn``, ``blocks.3``, ``head``.

    No words freeze none.
    Raises SettingsError for a word that is in no path.
    """
    names = [name for name, _ in model.named_parameters()]
    for word in words:
        if not any(_within(word, name) for name in names):
            known = {part for name in names for part in (*name.split("."), name.rpartition(".")[0])}
            raise SettingsError(f"only: no weight lies in {word!r}{nearest(word, known)}")
    if words:
        for name, parameter in model.named_parameters():
            if not any(_within(word, name) for word in words):
                parameter.requires_grad_(False)


def _within(word: str, name: str) -> bool:
    return f".{word}." in f".{name}."


def freeze_unused(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Freeze parameters that the outputs do not depend on.

    They would never change, and DDP would wait for their gradients.
    Raises SettingsError where no parameter is left.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    connected = [output.sum() for output in outputs if output.requires_grad]
    used: list[Tensor] = []
    if trained and connected:
        gradients = torch.autograd.grad(torch.stack(connected).sum(), trained, allow_unused=True)
        used = [p for p, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    if not used:
        raise SettingsError("nothing to tune: all parameters that matter are frozen")
    kept = {id(p) for p in used}
    for parameter in trained:
        parameter.requires_grad_(id(parameter) in kept)

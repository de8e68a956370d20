"""A few prompts drawn with an adapter: what its projections read, and what the denoiser gives with and without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pipeline.components import denoiser_of
from ..pipeline.failures import failures_told, shortage_explained
from ..pipeline.families import drawn_as
from .fuse import plain_linear
from .places import Place
from .records import Adapter


@dataclass
class _Moments:
    """Sums over tokens x, each with a last 1: of x xᵀ, and of that of the means of each sequence."""

    count: int = 0
    whole: Tensor | None = None
    means: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Tokens (batch, tokens, in)."""
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2).detach().double().cpu()
        mean = x.mean(1)
        self.count += x.shape[0] * x.shape[1]
        whole, means = x.flatten(0, 1).mT @ x.flatten(0, 1), mean.mT @ mean * x.shape[1]
        self.whole = whole if self.whole is None else self.whole + whole
        self.means = means if self.means is None else self.means + means


@dataclass
class Trial:
    """What was seen, and what the denoiser gave at each of its calls. ``draw`` draws the same again."""

    pipe: Any
    adapter: Adapter
    draw: Callable[[], None]
    moments: dict[str, _Moments] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    linears: dict[str, Any] = field(default_factory=dict)

    def gram(self, path: str, *, centred: bool) -> Tensor:
        """The mean of x xᵀ over the tokens that a projection read, each with a last 1, (in + 1, in + 1); ``centred``:
        of their differences from the mean of their sequence, which is all that keys can say in a softmax.
        """
        seen = self.moments[path]
        assert seen.whole is not None and seen.means is not None, "the prompts came through it"
        return (seen.whole - seen.means if centred else seen.whole) / seen.count

    @torch.no_grad()
    def difference(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """‖with the updates − with the adapter‖, relative to the latter, and to what the adapter changes."""
        missing = size = change = 0.0
        with self._silent():
            plain = self._again()
            with self._written(updates):
                written = self._again()
        for output, now, without in zip(self.outputs, written, plain, strict=True):
            wanted = _prediction(output).double()
            missing += float((now.double() - wanted).square().sum())
            size += float(wanted.square().sum())
            change += float((wanted - without.double()).square().sum())
        off = missing**0.5
        return off / max(size**0.5, 1e-30), off / max(change**0.5, 1e-30)

    def _again(self) -> list[Tensor]:
        """What the denoiser gives for the same latents, with whatever the text encoders make of the prompts now."""
        seen: list[Tensor] = []

        def instead(module: Any, args: Any, output: Any) -> Any:
            seen.append(_prediction(output).detach().clone())
            return copy.deepcopy(self.outputs[len(seen) - 1])  # so that the next step's latents are the same as well

        with denoiser_of(self.pipe).model.register_forward_hook(instead):
            self.draw()
        return seen

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """The adapter at strength 0."""
        before = {path: terms.scale for path, terms in self.adapter.terms.items()}
        for terms in self.adapter.terms.values():
            terms.scale = 0.0
        try:
            yield
        finally:
            for path, terms in self.adapter.terms.items():
                terms.scale = before[path]

    @contextmanager
    def _written(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """The weights with the updates in them; they come back bit for bit."""
        kept = {path: self.linears[path].weight.detach().clone() for path in updates}
        try:
            for path, (a, b) in updates.items():
                weight = self.linears[path].weight
                weight.copy_((weight.double().cpu() + (a @ b).mT).to(weight))
            yield
        finally:
            for path, weight in kept.items():
                self.linears[path].weight.copy_(weight)


def _prediction(output: Any) -> Tensor:
    """Of a denoiser's output, (batch, …). Z-Image gives a list of pictures."""
    return torch.stack(list(output[0])) if isinstance(output[0], list | tuple) else output[0]


def drawn(
    pipe: Any,
    adapter: Adapter,
    places: Sequence[Place],
    prompts: Sequence[str],
    *,
    steps: int,
    size: int | None,
    seed: int,
) -> Trial:
    """Draw each prompt once with the adapter, and see."""
    more = drawn_as(pipe).drawing() | ({} if size is None else {"height": size, "width": size})
    progress = dict(getattr(pipe, "_progress_bar_config", {}))

    def draw() -> None:
        pipe.set_progress_bar_config(**{**progress, "disable": True})
        try:
            for number, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(seed + number)
                with (
                    failures_told(pipe, steps, size),
                    shortage_explained("drawing a prompt", ["a smaller size"]),
                ):
                    pipe(prompt=prompt, num_inference_steps=steps, generator=generator, output_type="latent", **more)
        finally:
            pipe.set_progress_bar_config(**progress)

    trial = Trial(pipe, adapter, draw)
    handles = []
    for place in places:
        for path, module in place.projections().items():
            key = f"{place.path}.{path}"
            if key in trial.linears:
                continue
            trial.linears[key] = plain_linear(module)
            moments = trial.moments[key] = _Moments()
            handles.append(module.register_forward_pre_hook(lambda m, args, to=moments: to.add(args[0])))

    def called(module: Any, args: Any, output: Any) -> None:
        trial.outputs.append(copy.deepcopy(output))

    handles.append(denoiser_of(pipe).model.register_forward_hook(called))
    try:
        draw()
    finally:
        for handle in handles:
            handle.remove()
    return trial

"""A pipeline made ready for training, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from .families import Family
from .offloading import check_offloading, comes_in_parts, is_offloaded, recomputed

_PLAIN = object()
_PACKS = "support_avx512bf16_for_cpu"
"""Of bitsandbytes' layers of 4 bit: whether they pack their weights for this CPU."""
_CHECKPOINTING = "_gradient_checkpointing_func"
"""Of diffusers' models and their blocks: what computes a block, and again for its gradients."""


def check_whole(pipe: Any) -> None:
    """Raises ModelError if hooks of diffusers act in the pipeline's parts other than by offloading, if that fetches
    weights ahead, or if layers of 4 bit are not ready. A step of training needs the denoiser's weights in one type, and
    all of it computed.
    """
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    for name, part in parts.items():
        _check_quantised(name, part)
        check_offloading(name, part)
    for name, part in parts.items():
        hooks = {one for one in _hooks(part) if one != "group_offloading"}
        if "layerwise_casting" in hooks:
            raise ModelError(
                f"the {name} keeps its weights in another type than it computes in (layerwise casting), and gradients "
                "would meet them as they are kept: load it without, or quantised to 8 bit by torchao"
            )
        if hooks:
            raise ModelError(
                f"hooks of diffusers act in the {name} ({', '.join(sorted(hooks))}), so that a step need not compute "
                "all of it: take them out, disable_cache() those of a cache"
            )


def _check_quantised(name: str, part: nn.Module) -> None:
    """bitsandbytes quantises a layer when it first moves; until then its weights have a state that is None."""
    for path, module in part.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", _PLAIN) is None:
            raise ModelError(
                f"{name}.{path} is a {type(module).__name__} whose weights are not quantised yet: move the pipeline to "
                "its device first, pipe.to('cuda')"
            )


@contextmanager
def _unpacked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """On some CPUs bitsandbytes packs layers of 4 bit for inference at their first call, and then no gradient passes
    them: they are unpacked, and stay so.
    """
    packing = [m for part in modules for m in part.modules() if vars(m).get(_PACKS)]
    for module in packing:
        module.state_dict()  # in which its weights are unpacked
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"a {type(module).__name__} has packed its weights for inference on this CPU, and no gradient passes "
                "them: load the pipeline anew and customize it before it draws"
            )
    for module in packing:
        setattr(module, _PACKS, False)
    try:
        yield
    finally:
        for module in packing:
            setattr(module, _PACKS, True)


def _hooks(part: nn.Module) -> set[str]:
    """The names of the hooks that diffusers has registered anywhere in a part."""
    registries = (vars(m).get("_diffusers_hook") for m in part.modules())
    return {name for registry in registries if registry is not None for name in registry.hooks}


def computing_dtype(denoiser: nn.Module) -> torch.dtype:
    """The type that a denoiser computes in: that of its first weights which are no whole numbers, as quantised ones
    are. Raises ModelError if there are none, or some have 8 bit and no scale.
    """
    kinds = [p.dtype for p in denoiser.parameters() if p.is_floating_point()]
    if small := [str(kind).removeprefix("torch.") for kind in kinds if kind.itemsize < 2]:
        raise ModelError(
            f"the {type(denoiser).__name__} has weights in {small[0]}, in which nothing can be computed: load it in "
            "bfloat16, or quantised by torchao or bitsandbytes"
        )
    if not kinds:
        raise ModelError(f"the {type(denoiser).__name__} has no weights of 16 bit or more, expected its norms in them")
    return kinds[0]


@contextmanager
def frozen(family: Family) -> Iterator[None]:
    """All parts in eval mode and without gradients of their own; what they were comes back."""
    modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
    parameters = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    modes = [(m, m.training) for m in modules]
    for module in modules:
        module.eval()
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        with _unpacked(modules):
            yield
    finally:
        for parameter, before in parameters:
            parameter.requires_grad_(before)
        for module, before in modes:
            module.train(before)


@contextmanager
def recomputing(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing in the denoiser if wanted, and of a kind that suits offloading; what was comes back."""
    how = {m: m._gradient_checkpointing_func for m in denoiser.modules() if hasattr(m, _CHECKPOINTING)}
    before = denoiser.is_gradient_checkpointing
    if wanted or before:
        denoiser.enable_gradient_checkpointing(*[recomputed] * is_offloaded(denoiser))
    try:
        yield
    finally:
        if wanted and not before:
            denoiser.disable_gradient_checkpointing()
        for module, function in how.items():
            setattr(module, _CHECKPOINTING, function)


class Idle:
    """The parts of a pipeline that a step does not need. They wait in the CPU's memory and come back to generate. Those
    whose weights come a layer at a time wait there anyway.
    """

    def __init__(self, family: Family, needed: Sequence[nn.Module]) -> None:
        modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
        parts = [m for m in modules if m not in needed and not comes_in_parts(m)]
        self.parts = [(m, next(m.parameters()).device) for m in parts if next(m.parameters(), None) is not None]

    def leave(self) -> None:
        """A part that refuses to be moved stays: transformers' in 8 bit of bitsandbytes do."""
        for module, _ in self.parts:
            with suppress(ValueError):
                module.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def come(self) -> None:
        for module, device in self.parts:
            with suppress(ValueError):
                module.to(device)

    @contextmanager
    def away(self) -> Iterator[None]:
        self.leave()
        try:
            yield
        finally:
            self.come()

    @contextmanager
    def back(self) -> Iterator[None]:
        self.come()
        try:
            yield
        finally:
            self.leave()

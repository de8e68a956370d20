"""What keeps adapters from being lost in silence: a watch over each model that carries some.

Other libraries exchange what computes attention (``enable_attention_slicing``, ``fuse_qkv_projections``, an
IP-Adapter), and copy weights out of models. Where the adapter can act on, the watch sees to it before each call; where
it cannot, the call says so. What would write or copy the model without its adapter is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ..pipeline.components import Component, components_of
from .hosts import CHANNELS
from .hosts.processors import Acting
from .places import places_at, submodule
from .records import records, settle

_WATCH = "comcat_watch"
_WAY_OUT = (
    "unload() the adapters first, and save() keeps each in a file of its own; merge() writes one into the weights"
)


def refresh_guard(target: Any) -> None:
    """Watch the models of a pipeline where adapters act, and no others."""
    held = records(target).values()
    for component in components_of(target).values():
        mine = tuple(p for record in held for p in record.paths if p.partition(".")[0] == component.name)
        _release(component.model)
        if mine:
            _watch(component, tuple(dict.fromkeys(mine)))


@dataclass(frozen=True)
class _Check:
    """A forward pre-hook: every place must act, and what the call cannot do is said."""

    component: str
    paths: tuple[str, ...]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # traced anew whenever a processor has become another
            if not _all_act(model, self.paths):
                _settled(self.component, model, self.paths)
            return
        _settle(self.component, model, self.paths)
        _say_what_has_no_effect(keywords)


def _settle(component: str, model: nn.Module, paths: tuple[str, ...]) -> None:
    for place in places_at(Component(component, model), paths):
        settle(place)


_settled: Any = torch.compiler.disable(_settle)
"""Breaks the graph, which happens only where something has displaced an adapter; a graph that must be whole says so."""


def _all_act(model: Any, paths: tuple[str, ...]) -> bool:
    """Whether all processors that adapters act in are in their places, asked so that it can be traced."""
    for path in paths:
        part = submodule(model, path.partition(".")[2])
        if CHANNELS in part._modules and hasattr(part, "processor") and not isinstance(part.processor, Acting):
            return False
    return True


def _say_what_has_no_effect(keywords: Mapping[str, Any]) -> None:
    for name, value in keywords.items():
        scale = value.get("scale", 1) if name.endswith("attention_kwargs") and isinstance(value, Mapping) else 1
        if scale != 1:
            warnings.warn(
                f"{name}={{'scale': {scale}}} acts on LoRAs alone; adapters of comcat keep the scale that "
                "comcat.diffusion.set_scale() has set",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Refusal:
    """Stands in for a method that would lose the adapters."""

    what: str

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        raise ModelError(f"{self.what} would lose the adapters that this model carries: {_WAY_OUT}")


@dataclass(frozen=True)
class _PartRefusal:
    """A hook on the state of a part of the model: ``ControlNetModel.from_unet`` and its like copy part by part."""

    part: str

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if prefix == "":  # asked for by itself, and not as a part of the whole
            raise ModelError(f"the state of {self.part} alone cannot be copied while adapters act in it: {_WAY_OUT}")


def _watch(component: Component, paths: tuple[str, ...]) -> None:
    model: Any = component.model
    handles = [model.register_forward_pre_hook(_Check(component.name, paths), with_kwargs=True)]
    for part in dict.fromkeys(path.split(".")[1] for path in paths):
        child: Any = getattr(model, part)
        handles.append(child.register_state_dict_pre_hook(_PartRefusal(f"{component.name}.{part}")))
    setattr(model, _WATCH, tuple(handles))
    model.save_pretrained = _Refusal("save_pretrained()")


def _release(model: Any) -> None:
    for handle in getattr(model, _WATCH, ()):
        handle.remove()
    if hasattr(model, _WATCH):
        delattr(model, _WATCH)
        del model.save_pretrained

"""The places of adapters: attention modules of a pipeline, each with the host that knows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...modules.adapters import ExtraChannels
from ..pipeline.components import Component
from ..pipeline.offloading import computing_device, is_offloaded
from .hosts import CHANNELS, AdapterHost, Found, find_in, host_of

FUSED = "comcat_fused"
"""The attribute of an attention that holds what stood there before something was fused into it."""


@dataclass(frozen=True)
class Fused:
    """What stood where wider projections stand now: modules by path below the attention, attributes by name,
    channels.
    """

    modules: Mapping[str, nn.Module]
    attributes: Mapping[str, Any]
    channels: ExtraChannels
    width: int
    """Of the wider heads."""
    fold: float
    """What W_Q was multiplied by."""


@dataclass(frozen=True)
class Place:
    """One attention of a pipeline. ``path`` has the component's name in front:
    ``unet.mid_block.attentions.0…attn2``.
    """

    path: str
    attention: Any
    host: AdapterHost
    model: Any
    """The component that it is part of."""

    @property
    def fused(self) -> Fused | None:
        """What has been fused into the attention's weights, or None."""
        return vars(self.attention).get(FUSED, (None,))[0]

    def set_fused(self, state: Fused | None) -> None:
        if state is None:
            delattr(self.attention, FUSED)
        else:
            setattr(self.attention, FUSED, (state,))  # in a tuple: none of it is part of the model while it is fused

    @property
    def mounted(self) -> ExtraChannels | None:
        """The extra channels that the attention computes with, or None."""
        return self.attention._modules.get(CHANNELS)

    @property
    def channels(self) -> ExtraChannels | None:
        """The extra channels, whether the attention computes with them or they are fused into its weights, or None."""
        fused = self.fused
        return self.mounted if fused is None else fused.channels

    def mount(self, channels: ExtraChannels) -> None:
        self.attention.add_module(CHANNELS, channels.train(self.attention.training))
        self.host.mount(self.attention)

    def refresh(self) -> None:
        self.host.refresh(self.attention)

    def unmount(self) -> None:
        self.host.unmount(self.attention)
        delattr(self.attention, CHANNELS)

    def projections(self) -> dict[str, Any]:
        """The frozen linear layers by path below the attention."""
        paths = self.host.projections(self.attention).values()
        return {path: self.host.frozen(self.attention, path) for path in paths}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the factors stand beside."""
        return next(self._query.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the projections compute, also where something keeps their weights elsewhere in between."""
        offloaded = (m for m in (self._query, self.model) if is_offloaded(m))
        return computing_device(next(offloaded, self._query))

    @property
    def _query(self) -> Any:
        return self.host.frozen(self.attention, self.host.projections(self.attention)["q_up"])


def find_places(component: Component) -> Found:
    """All attention of a component. Paths have its name in front."""
    found = find_in(component.model)
    return Found(
        [replace(a, path=f"{component.name}.{a.path}") for a in found.adaptable],
        [replace(r, name=f"{component.name}.{r.name}".rstrip(".")) for r in found.refused],
    )


def places_at(component: Component, paths: Iterable[str]) -> Iterator[Place]:
    """The places of a component whose paths :func:`find_places` has told. Paths of other components are passed over."""
    host = host_of(component.model)
    for path in paths:
        name, _, inner = path.partition(".")
        if name == component.name:
            assert host is not None, f"{path} was found by a host"
            yield Place(path, submodule(component.model, inner), host, component.model)


def submodule(model: Any, path: str) -> Any:
    """``get_submodule`` without its checks, since this is asked before every call of a model."""
    part = model
    for name in path.split("."):
        if (part := part._modules.get(name)) is None:
            raise ModelError(f"{type(model).__name__} has no {path} any more, where an adapter acts")
    return part


def place_at(components: Mapping[str, Component], path: str) -> Place:
    """The place of one such path."""
    return next(places_at(components[path.partition(".")[0]], [path]))

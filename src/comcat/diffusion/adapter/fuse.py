"""Writing adapters into wider projections, so that stock processors run them.

Extra channels of a head are extra rows of W_Q, W_K, W_V and extra columns of W_O. Heads become wider, k + r. Where the
processor takes its scale from the width, √((k + r)/k) goes into W_Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SettingsError, UnsupportedSite, listed
from ...grad_mode import outside_inference_mode
from ...hosts.mounting import exchange
from ...modules.adapters import padded_width
from ..pipeline.components import components_of
from .places import Fused, Place
from .records import adapters, check_unfused, check_whole, located, records


@outside_inference_mode
def fuse(target: Any) -> None:
    """Write all adapters, each at its scale, into wider projections, and give the model's own processors back: faster,
    until :func:`unfuse`.

    Raises:
        SettingsError: if there is nothing to fuse. UnsupportedSite: if a LoRA that is not merged sits on a projection,
            or something between q and k (normalisation, rotary embeddings) would act on the extra channels as well.
            Then nothing has changed.
    """
    if not adapters(target):
        raise SettingsError("there is no adapter to fuse")
    check_unfused(target)
    places = list(_places(target))
    if reasons := [f"{place.path} ({reason})" for place in places if (reason := _why_not(place))]:
        raise UnsupportedSite(f"cannot fuse {len(reasons)} of {len(places)} attentions: {listed(reasons)}")
    for place in places:
        _fuse(place)


@outside_inference_mode
def unfuse(target: Any) -> None:
    """Take the adapters out of the weights again: the old modules come back, bit for bit, and the adapters act beside
    them as before.

    Raises:
        SettingsError: if nothing is fused. UnsupportedSite: if the wider projections hold something that has come
            since, as a LoRA, which would be lost with them. Then nothing has changed.
    """
    fused = [(place, place.fused) for place in _places(target) if place.fused is not None]
    if not fused:
        raise SettingsError("there is no fused adapter")
    reasons = [f"{place.path} ({reason})" for place, state in fused if (reason := _why_not_back(place, state))]
    if reasons:
        raise UnsupportedSite(f"cannot unfuse {len(reasons)} of {len(fused)} attentions: {listed(reasons)}")
    for place, state in fused:
        _unfuse(place, state)


def plain_linear(module: Any) -> nn.Linear | None:
    """The linear layer whose weights are all that a projection computes with, or None; a LoRA that is merged into it is
    no hindrance.
    """
    if getattr(module, "merged", False):
        module = module.base_layer
    return module if type(module) is nn.Linear and module.weight.is_floating_point() else None


def not_plain(place: Place) -> str | None:
    """Why an attention's projections cannot be written to, or None."""
    for path, module in place.projections().items():
        linear = plain_linear(module)
        if linear is None and type(module).__module__.startswith("peft."):
            return f"{path} carries a LoRA that is not merged; fuse_lora() or unload it first"
        if linear is None:
            return f"{path} is a {type(module).__name__}, expected a plain linear layer"
        if not linear.weight.is_floating_point() or hasattr(linear.weight, "__tensor_flatten__"):
            kind = type(linear.weight).__name__
            return f"the weights of {path} are quantised ({kind}), and would be rounded again: take a base of 16 bit"
        if linear.weight.is_meta:
            return f"the weights of {path} are not there: offloaded, or on the meta device"
    return place.host.copied(place.attention) or place.host.shared(place.attention)


def _places(target: Any) -> Iterator[Place]:
    """Every attention that has extra channels, once."""
    components = components_of(target)
    seen: set[str] = set()
    for name, record in records(target).items():
        check_whole(target, name, record)
        for place in located(components, record):
            if place.path not in seen:
                seen.add(place.path)
                yield place


def _why_not(place: Place) -> str | None:
    if (between := place.host.between(place.attention)) is not None:
        return f"its processor applies {between} to whole heads, extra channels included"
    return not_plain(place)


def _fuse(place: Place) -> None:
    attention, channels = place.attention, place.mounted
    assert channels is not None, "adapters() has found them"
    own = place.projections()
    query: Any = plain_linear(own[place.host.projections(attention)["q_up"]])
    width = query.out_features // channels.heads + max(channels.ranks("qk"), channels.ranks("vo"))
    width = padded_width(width, query.weight)
    fold, attributes = place.host.widened(attention, width)
    state = Fused(own, {name: getattr(attention, name) for name in attributes}, channels, width, fold)
    wider = _wider(place, state)
    place.unmount()
    for path, module in wider.items():
        exchange(attention, path, module)
    for name, value in attributes.items():
        setattr(attention, name, value)
    place.set_fused(state)


def _unfuse(place: Place, state: Fused) -> None:
    for path, module in state.modules.items():
        now = next(place.attention.get_submodule(path).parameters())
        exchange(place.attention, path, module.to(now.device, now.dtype))  # it did not move with the model meanwhile
        state.channels.to(now.device)
    for name, value in state.attributes.items():
        setattr(place.attention, name, value)
    place.set_fused(None)
    place.mount(state.channels)
    place.refresh()


def _why_not_back(place: Place, state: Fused) -> str | None:
    """What would be lost with the wider projections of an attention, or None."""
    if (copied := place.host.copied(place.attention)) is not None:
        return f"{copied}; undo that first"
    for path, module in _wider(place, state).items():
        now = place.attention.get_submodule(path)
        if type(now) is not nn.Linear:
            return f"{path} has become a {type(now).__name__}, as a LoRA makes it; unload that first"
        if not all(map(_same, now.parameters(), module.parameters())):
            return f"{path} has changed, as by fuse_lora(); take that back first"
    return None


def _same(now: Tensor, written: Tensor) -> bool:
    """Whether a weight is what was written, moved and cast as it may be, to 16 bit and back too."""
    kinds = (now.dtype, torch.float16, torch.bfloat16)
    return now.shape == written.shape and any(now.equal(written.to(now.device, k).to(now.dtype)) for k in kinds)


@torch.no_grad()
def _wider(place: Place, state: Fused) -> dict[str, nn.Linear]:
    """The wider projections by path."""
    channels, width, wider = state.channels, state.width, {}
    for factor, path in place.host.projections(place.attention).items():
        linear, rows = plain_linear(state.modules[path]), channels.factor(factor)
        if factor.endswith("out_up"):
            wider[path] = _wide_output(linear, rows, channels.heads, width)
        else:
            fold = state.fold if factor.endswith("q_up") else 1.0
            wider[path] = _wide_input(linear, rows, channels.heads, width, fold)
    return wider


def _wide_input(linear: Any, rows: Tensor | None, heads: int, width: int, fold: float) -> nn.Linear:
    """W_Q, W_K or W_V with ``rows`` (heads, ranks, in) behind each head's own, and zeros up to ``width``."""
    own = linear.weight.double().unflatten(0, (heads, -1))  # (heads, head_dim, in)
    joined = own if rows is None else torch.cat([own, rows.double()], dim=1)
    weight = F.pad(joined, (0, 0, 0, width - joined.shape[1])).flatten(0, 1) * fold
    bias = None
    if linear.bias is not None:
        bias = F.pad(linear.bias.double().unflatten(0, (heads, -1)), (0, width - own.shape[1])).flatten() * fold
    return _linear(linear, weight, bias)


def _wide_output(linear: Any, columns: Tensor | None, heads: int, width: int) -> nn.Linear:
    """W_O with ``columns`` (out, heads, ranks) behind each head's own, and zeros up to ``width``."""
    own = linear.weight.double().unflatten(1, (heads, -1))  # (out, heads, head_dim)
    joined = own if columns is None else torch.cat([own, columns.double()], dim=2)
    return _linear(linear, F.pad(joined, (0, width - joined.shape[2])).flatten(1), linear.bias)


def _linear(like: Any, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=like.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(like.weight.dtype), requires_grad=like.weight.requires_grad)
    return linear

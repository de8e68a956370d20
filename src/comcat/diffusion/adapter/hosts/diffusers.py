"""diffusers' attention: a module that holds the projections, and an exchangeable *processor* that computes with them.

The processor is the library's own seam, so it is what gives way, to one that lets it compute and joins the extra
channels (``processors.py``); the module, its projections and the blocks around them stay as they are. What has to be
known of a processor is one line of ``layouts.py``. One that merely computes the same attention in another way (slices,
xformers) gives way as well and comes back when the last adapter goes; one that has weights of its own (IP-Adapter)
keeps its place, and adapters act in what it computes of the text; one that computes something else (perturbed
attention) is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...pipeline.components import is_attention
from .layouts import COPYING, layout_of, reason_against
from .processors import PARALLEL, Acting, AdapterProcessor, own_processor, projections_of, release, taken_over
from .protocol import CHANNELS, AdaptableAttention, Found, RefusedAttention, Where, Widened

_REFINERS = "refiner"
"""Part of the paths of blocks that see the picture or the text alone, in models of one stream (Z-Image, Lumina 2)."""


class DiffusersHost:
    """UNets and transformers of diffusers."""

    name = "UNet or transformer of diffusers"

    def resembles(self, model: nn.Module) -> bool:
        return any(is_attention(module) for module in model.modules())

    def find(self, model: nn.Module) -> Found:
        found = Found([], [])
        for path, module in model.named_modules():
            if not is_attention(module):
                continue
            if (reason := _why_not(module)) is None:
                found.adaptable.append(_anatomy(path, module))
            else:
                found.refused.append(RefusedAttention(path, reason, where=_where(path, module)))
        return _read_later(model, found)

    def projections(self, attention: Any) -> dict[str, str]:
        return projections_of(attention)

    def frozen(self, attention: Any, path: str) -> Any:
        return attention.get_submodule(path)

    def mount(self, attention: Any) -> None:
        attention.set_processor(taken_over(attention.processor))

    def refresh(self, attention: Any) -> None:
        """Nothing to do: the processor reads how many channels there are."""

    def unmount(self, attention: Any) -> None:
        if isinstance(attention.processor, AdapterProcessor):  # else another has taken the place: leave it alone
            attention.set_processor(own_processor(attention))
        release(attention.processor)

    def why_not(self, attention: Any) -> str | None:
        return _why_not(attention)

    def reclaim(self, attention: Any) -> str | None:
        if isinstance(attention.processor, Acting):
            return None
        if (reason := _why_not(attention)) is None:
            self.mount(attention)
        return reason

    def copied(self, attention: Any) -> str | None:
        if hasattr(attention, "unfuse_projections"):  # such attention has one processor for both
            fused = getattr(attention, "fused_projections", False)
        else:  # the older kind keeps its flag when it is unfused
            fused = type(own_processor(attention)).__name__ in COPYING
        return "fuse_qkv_projections() has copied its q, k and v into one layer" if fused else None

    def shared(self, attention: Any) -> str | None:
        layout = layout_of(own_processor(attention))
        return None if layout is None else layout.beside

    def sweep(self, model: nn.Module) -> None:
        """``fuse_qkv_projections`` sets processors aside for ``unfuse_qkv_projections`` to bring back."""
        aside: dict[str, Any] = getattr(model, "original_attn_processors", None) or {}
        for path, processor in aside.items():
            attention = model.get_submodule(path.removesuffix(".processor"))
            if getattr(attention, CHANNELS, None) is None:
                release(processor)
                if isinstance(processor, AdapterProcessor):
                    aside[path] = processor.before

    def between(self, attention: Any) -> str | None:
        layout = layout_of(own_processor(attention))
        across = getattr(attention, "is_cross_attention", False)
        turned = layout is not None and bool(layout.rotary) and not (across and layout.rotary == "self")
        normalised = getattr(attention, "norm_q", None) is not None or getattr(attention, "norm_k", None) is not None
        acting = ["q/k normalisation"] * normalised + ["rotary embeddings"] * turned
        return " and ".join(acting) or None

    def widened(self, attention: Any, width: int) -> Widened:
        """Some stock processors scale logits by 1/√width, others by the attention's ``scale``: with both, these
        agree.
        """
        inner = attention.heads * width
        attributes = {"scale": width**-0.5, "inner_dim": inner, "inner_kv_dim": inner}
        return Widened(attention.scale * width**0.5, attributes)


def _anatomy(path: str, attention: Any) -> AdaptableAttention:
    widths: dict[str, int] = {}
    missing: dict[str, str] = {}
    for factor, name in projections_of(attention).items():
        layer = attention.get_submodule(name)
        widths[factor] = layer.out_features if factor.endswith("out_up") else layer.in_features
    if "out_up" not in widths:
        missing["vo"] = "its output projection is fused with the MLP's, outside the attention"
        widths = {factor: width for factor, width in widths.items() if not factor.endswith(("v_down", "out_up"))}
    if "add_out_up" not in widths:  # nobody reads what the text's queries find
        widths.pop("add_q_up", None)
    order = ("q_up", "k_down", "v_down", "out_up", "add_k_down", "add_v_down", "add_q_up", "add_out_up")
    widths = {factor: widths[factor] for factor in order if factor in widths}
    return AdaptableAttention(path, _where(path, attention), widths, attention.heads, _head_dim(attention), missing)


def _read_later(model: nn.Module, found: Found) -> Found:
    """Without the factors of the text's own queries and output where they are the last that the text comes to: a
    denoiser's prediction is of the picture, and only a later attention could read there what they write.
    """
    kinds = {a.path: a.where for a in found.adaptable} | {r.name: r.where for r in found.refused}
    meeting = [path for path, _ in model.named_modules() if kinds.get(path, "self") != "self"]
    return found._replace(adaptable=[_shortened(a) if a.path in meeting[-1:] else a for a in found.adaptable])


def _shortened(one: AdaptableAttention) -> AdaptableAttention:
    unread = {factor: width for factor, width in one.widths.items() if factor in ("add_q_up", "add_out_up")}
    return replace(one, widths={f: w for f, w in one.widths.items() if f not in unread}, unread=unread)


def _head_dim(attention: Any) -> int:
    if hasattr(attention, PARALLEL):
        return attention.head_dim
    return attention.to_q.out_features // attention.heads


def _where(path: str, attention: Any) -> Where:
    layout = layout_of(own_processor(attention))
    if layout is not None and layout.joint and _REFINERS not in path:
        return "joint"
    if getattr(attention, "add_q_proj", None) is not None:
        return "joint"
    return "cross" if getattr(attention, "is_cross_attention", False) else "self"


def _why_not(attention: Any) -> str | None:
    """Why an attention cannot carry terms, or None if it can."""
    if (reason := reason_against(own_processor(attention))) is not None:
        return reason
    if not hasattr(attention, PARALLEL) and getattr(attention, "to_k", None) is None:
        return "it has no keys of the picture"
    if getattr(attention, "add_k_proj", None) is not None and getattr(attention, "add_q_proj", None) is None:
        return "keys and values of a given picture stand beside those of the text, in a softmax of their own"
    return None

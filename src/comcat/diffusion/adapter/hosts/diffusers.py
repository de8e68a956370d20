"""diffusers' attention: a module that holds the projections, and an exchangeable *processor* that computes with them.

The processor is the library's own seam, so it is what gives way; the module, its projections and the blocks around them
stay as they are.

Which protocol a processor follows shows in its class alone, so classes are what is asked for here. A processor that
merely computes the same attention in another way (slices, xformers) gives way as well and comes back when the last
adapter goes; one that computes something else (IP-Adapter, perturbed attention) is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .processors import AdapterProcessor, FluxProcessor, JointProcessor, PlainProcessor
from .protocol import CHANNELS, AdaptableAttention, Found, RefusedAttention, Where, Widened

_COPYING = ("FusedAttnProcessor2_0", "FusedJointAttnProcessor2_0")
"""Those that read copies of q, k and v in one layer (``fuse_qkv_projections``). Ours read the projections themselves.
"""
_KINDS: tuple[tuple[type[AdapterProcessor], tuple[str, ...]], ...] = (
    (
        PlainProcessor,
        ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", _COPYING[0]),
    ),
    (JointProcessor, ("JointAttnProcessor2_0", "XFormersJointAttnProcessor", _COPYING[1])),
    (FluxProcessor, ("FluxAttnProcessor",)),
)


class DiffusersHost:
    """UNets and transformers of diffusers."""

    name = "UNet or transformer of diffusers"

    def resembles(self, model: nn.Module) -> bool:
        return any(_is_attention(module) for module in model.modules())

    def find(self, model: nn.Module) -> Found:
        found = Found([], [])
        for path, module in model.named_modules():
            if not _is_attention(module):
                continue
            if (reason := _why_not(module)) is None:
                found.adaptable.append(_anatomy(path, module))
            else:
                found.refused.append(RefusedAttention(path, reason, where=_where(module)))
        return found

    def projections(self, attention: Any) -> dict[str, str]:
        names = {"q_up": "to_q", "k_down": "to_k", "v_down": "to_v", "out_up": "to_out.0"}
        names |= {"add_q_up": "add_q_proj", "add_k_down": "add_k_proj"}
        names |= {"add_v_down": "add_v_proj", "add_out_up": "to_add_out"}
        return {f: path for f, path in names.items() if getattr(attention, path.partition(".")[0], None) is not None}

    def frozen(self, attention: Any, path: str) -> Any:
        return attention.get_submodule(path)

    def mount(self, attention: Any) -> None:
        kind = _kind(attention.processor)
        assert kind is not None, f"{type(attention.processor).__name__} is known to find"
        attention.set_processor(kind(attention.processor))

    def refresh(self, attention: Any) -> None:
        """Nothing to do: the processor reads how many channels there are."""

    def unmount(self, attention: Any) -> None:
        if isinstance(attention.processor, AdapterProcessor):  # else another has taken the place: leave it alone
            attention.set_processor(_own_processor(attention))

    def why_not(self, attention: Any) -> str | None:
        return _why_not(attention)

    def reclaim(self, attention: Any) -> str | None:
        if isinstance(attention.processor, AdapterProcessor):
            return None
        if (reason := _why_not(attention)) is None:
            self.mount(attention)
        return reason

    def copied(self, attention: Any) -> str | None:
        if hasattr(attention, "unfuse_projections"):  # such attention has one processor for both
            fused = getattr(attention, "fused_projections", False)
        else:  # the older kind keeps its flag when it is unfused
            fused = type(_own_processor(attention)).__name__ in _COPYING
        return "fuse_qkv_projections() has copied its q, k and v into one layer" if fused else None

    def sweep(self, model: nn.Module) -> None:
        """``fuse_qkv_projections`` sets processors aside for ``unfuse_qkv_projections`` to bring back."""
        aside: dict[str, Any] = getattr(model, "original_attn_processors", None) or {}
        for path, processor in aside.items():
            attention = model.get_submodule(path.removesuffix(".processor"))
            if isinstance(processor, AdapterProcessor) and getattr(attention, CHANNELS, None) is None:
                aside[path] = processor.before

    def between(self, attention: Any) -> str | None:
        if getattr(attention, "norm_q", None) is None and getattr(attention, "norm_k", None) is None:
            return None
        return "q/k normalisation" + (" and rotary embeddings" if _is_flux(attention) else "")

    def widened(self, attention: Any, width: int) -> Widened:
        """Some stock processors scale logits by 1/√width, others by the attention's ``scale``: with both, these
        agree.
        """
        inner = attention.heads * width
        attributes = {"scale": width**-0.5, "inner_dim": inner, "inner_kv_dim": inner}
        return Widened(attention.scale * width**0.5, attributes)


def _is_attention(module: Any) -> bool:
    return hasattr(module, "get_processor") and hasattr(module, "to_q")


def _anatomy(path: str, attention: Any) -> AdaptableAttention:
    widths = {"q_up": attention.to_q.in_features, "k_down": attention.to_k.in_features}
    missing: dict[str, str] = {}
    if getattr(attention, "to_out", None) is None:
        missing["vo"] = "its output projection is fused with the MLP's, outside the attention"
    else:
        widths |= {"v_down": attention.to_v.in_features, "out_up": attention.to_out[0].out_features}
    if _has_context_stream(attention):
        context = attention.add_k_proj.in_features
        widths |= {"add_k_down": context, "add_v_down": context}
        if getattr(attention, "to_add_out", None) is not None:  # else nobody reads what the text's queries find
            widths |= {"add_q_up": context, "add_out_up": attention.to_add_out.out_features}
    head_dim = attention.to_q.out_features // attention.heads
    return AdaptableAttention(path, _where(attention), widths, attention.heads, head_dim, missing)


def _where(attention: Any) -> Where:
    if _has_context_stream(attention) or _is_flux(attention):  # Flux's single blocks: both in one stream
        return "joint"
    return "cross" if getattr(attention, "is_cross_attention", False) else "self"


def _has_context_stream(attention: Any) -> bool:
    return getattr(attention, "add_q_proj", None) is not None


def _is_flux(attention: Any) -> bool:
    return _kind(_own_processor(attention)) is FluxProcessor


def _own_processor(attention: Any) -> Any:
    """The processor that computes this attention where no adapter does."""
    processor = attention.processor
    if not isinstance(processor, AdapterProcessor):
        return processor
    return _stock(attention, processor) if processor.before is None else processor.before


def _stock(attention: Any, processor: AdapterProcessor) -> Any:
    """A new processor of the kind that the library gives an attention by default."""
    default = getattr(type(attention), "_default_processor_cls", None)
    if default is None:
        from diffusers.models import attention_processor

        default = getattr(attention_processor, processor.stock)
    return default()


def _kind(processor: Any) -> type[AdapterProcessor] | None:
    return next((kind for kind, names in _KINDS if type(processor).__name__ in names), None)


def _why_not(attention: Any) -> str | None:
    """Why an attention cannot carry terms, or None if it can."""
    processor = _own_processor(attention)
    name = type(processor).__name__
    if "IPAdapter" in name:
        return f"an IP-Adapter computes this attention ({name}); unload_ip_adapter() first"
    if "CustomDiffusion" in name:
        return f"Custom Diffusion's own weights compute this attention ({name})"
    if "AddedKV" in name:
        return f"keys and values of the text are added to those of the picture ({name})"
    if _kind(processor) is None:
        known = ", ".join(name for _, names in _KINDS for name in names)
        return f"its processor is a {name}, expected one of {known}"
    if attention.to_k is None or attention.to_k.out_features != attention.to_q.out_features:
        return "it has fewer keys and values than queries (grouped or multi-query attention)"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it computes in parallel on several devices"
    return None

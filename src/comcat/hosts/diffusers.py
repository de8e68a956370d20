"""diffusers' attention: a module that holds the projections, and an exchangeable *processor* that computes with them.

The processor is the library's own seam, so it is what gives way; the module, its projections and the blocks around them stay as they are.
Projections are always called as modules, never read, so that LoRA, quantised layers and hooks keep working.

Which protocol a processor follows shows in its class alone, so classes are what is asked for here. A processor that merely computes the
same attention in another way (slices, xformers) gives way as well and comes back when the last adapter goes; one that computes something
else (IP-Adapter, perturbed attention) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..sites import Refusal

Where = Literal["cross", "self", "joint", "text"]

_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
_JOINT = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor")
_FLUX = ("FluxAttnProcessor",)


@dataclass(frozen=True)
class AdaptableAttention:
    """An attention that can carry low-rank terms.

    Attributes:
        path: of the module in its model. where: what attends to what.
        widths: the factors that it can carry by name (see :mod:`comcat.modules.adapters`), with the width each reads or writes.
        heads, head_dim: number and width of the frozen heads.
        missing: why one of the products cannot be had here, by product.
    """

    path: str
    where: Where
    widths: dict[str, int]
    heads: int
    head_dim: int
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def products(self) -> tuple[str, ...]:
        """``("qk", "vo")``, or the one that can be had."""
        return tuple(p for p, side in (("qk", "q_up"), ("vo", "out_up")) if side in self.widths)

    def parameters(self, rank: int) -> int:
        """How many parameters the terms of a rank have."""
        return self.heads * rank * sum(self.widths.values())


@dataclass(frozen=True)
class RefusedAttention(Refusal):
    """An attention that cannot carry terms, and what attends to what in it."""

    where: Where = "cross"


class AdapterProcessor(nn.Module):
    """A processor that computes the attention it took over with extra channels in its heads.

    A module, so that its weights move and are trained with the model. ``channels`` reads and writes the extra channels and makes the one
    fused call (:class:`comcat.modules.adapters.ExtraChannels`); ``before`` is the processor that stood here.

    diffusers hands a processor only those keywords that its ``__call__`` names.
    """

    def __init__(self, channels: nn.Module, before: Any) -> None:
        super().__init__()
        self.channels: Any = channels
        self.before = before

    def extra(self, x: Tensor, context: Tensor, prefix: str = "") -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Extra channels of queries from ``x``, of keys and values from ``context``."""
        read = self.channels.read
        return read("q", x, prefix), read("k", context, prefix), read("v", context, prefix)


class PlainProcessor(AdapterProcessor):
    """Self- and cross-attention over one stream, as in the UNets of Stable Diffusion; the protocol of ``AttnProcessor2_0``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape if hidden_states.ndim == 4 else None
        x = hidden_states if picture is None else hidden_states.flatten(2).mT  # (batch, tokens, in)
        keys = (x if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        mask = _mask(attn, attention_mask, keys, x.shape[0])
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        context = x
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)
        q, k, v = (_heads(attn, y) for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        q, k = _normalised(attn.norm_q, q), _normalised(attn.norm_k, k)
        o, extra = self.channels.attend(q, k, v, self.extra(x, context), scale=attn.scale, mask=mask)
        y = self.channels.write(attn.to_out[0](o.flatten(2)), extra)
        y = attn.to_out[1](y)
        if picture is not None:
            y = y.mT.reshape(picture)
        if attn.residual_connection:
            y = y + residual
        return y / attn.rescale_output_factor


class JointProcessor(AdapterProcessor):
    """Joint attention of pictures and text, as in SD3 (with q/k normalisation in SD3.5); the protocol of ``JointAttnProcessor2_0``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, context = hidden_states, encoder_hidden_states
        streams = [_stream(attn, x)]
        extras = [self.extra(x, x)]
        if context is not None:  # behind the picture's tokens
            streams.append(_context_stream(attn, context))
            extras.append(self.extra(context, context, "add_"))
        q, k, v = _concatenated(streams)
        o, extra = self.channels.attend(q, k, v, _concatenated(extras), scale=attn.scale)
        o_x, o_context = o[:, : x.shape[1]], o[:, x.shape[1] :]
        e_x, e_context = (None, None) if extra is None else (extra[:, : x.shape[1]], extra[:, x.shape[1] :])
        y = attn.to_out[1](self.channels.write(attn.to_out[0](o_x.flatten(2)), e_x))
        if context is None:
            return y
        if attn.context_pre_only:
            return y, o_context.flatten(2)
        return y, self.channels.write(attn.to_add_out(o_context.flatten(2)), e_context, "add_")


class FluxProcessor(AdapterProcessor):
    """Flux's attention, with q/k normalisation and rotary embeddings, in double and single blocks; the protocol of ``FluxAttnProcessor``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, context = hidden_states, encoder_hidden_states
        streams = [_stream(attn, x)]
        extras = [self.extra(x, x)]
        if context is not None:  # in front of the picture's tokens
            streams.insert(0, _context_stream(attn, context))
            extras.insert(0, self.extra(context, context, "add_"))
        q, k, v = _concatenated(streams)
        if image_rotary_emb is not None:
            q, k = _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb)
        o, extra = self.channels.attend(q, k, v, _concatenated(extras), scale=attn.head_dim**-0.5, mask=attention_mask)
        if context is None:
            return o.flatten(2)
        words = context.shape[1]
        o_context, o_x = o[:, :words], o[:, words:]
        e_context, e_x = (None, None) if extra is None else (extra[:, :words], extra[:, words:])
        y = attn.to_out[1](self.channels.write(attn.to_out[0](o_x.flatten(2)), e_x))
        return y, self.channels.write(attn.to_add_out(o_context.flatten(2)), e_context, "add_")


def find_attention(model: nn.Module) -> tuple[list[AdaptableAttention], list[RefusedAttention]]:
    """Every attention of a UNet or transformer in the order of its modules: what can carry terms, and what cannot and why."""
    found: list[AdaptableAttention] = []
    refused: list[RefusedAttention] = []
    for path, module in model.named_modules():
        if hasattr(module, "get_processor") and hasattr(module, "to_q"):
            if (reason := _why_not(module)) is None:
                found.append(_anatomy(path, module))
            else:
                refused.append(RefusedAttention(path, reason, where=_where(module)))
    return found, refused


def _anatomy(path: str, attn: Any) -> AdaptableAttention:
    widths = {"q_up": attn.to_q.in_features, "k_down": attn.to_k.in_features}
    missing: dict[str, str] = {}
    if getattr(attn, "to_out", None) is None:
        missing["vo"] = "its output projection is fused with the MLP's, outside the attention"
    else:
        widths |= {"v_down": attn.to_v.in_features, "out_up": attn.to_out[0].out_features}
    if _has_context_stream(attn):
        context = attn.add_k_proj.in_features
        widths |= {"add_k_down": context, "add_v_down": context}
        if getattr(attn, "to_add_out", None) is not None:  # else nobody reads what the text's queries find
            widths |= {"add_q_up": context, "add_out_up": attn.to_add_out.out_features}
    return AdaptableAttention(path, _where(attn), widths, attn.heads, attn.to_q.out_features // attn.heads, missing)


def _where(attn: Any) -> Where:
    if (
        _has_context_stream(attn) or _kind(own_processor(attn)) is FluxProcessor
    ):  # Flux's single blocks: both in one stream
        return "joint"
    return "cross" if getattr(attn, "is_cross_attention", False) else "self"


def _has_context_stream(attn: Any) -> bool:
    return getattr(attn, "add_q_proj", None) is not None


def own_processor(attn: Any) -> Any:
    """The processor that the model had before any adapter."""
    return attn.processor.before if isinstance(attn.processor, AdapterProcessor) else attn.processor


def mount(attn: Any, channels: nn.Module) -> None:
    """Let an attention that :func:`find_attention` found compute with extra channels."""
    kind = _kind(attn.processor)
    assert kind is not None, f"{type(attn.processor).__name__} is known to find_attention"
    attn.set_processor(kind(channels, attn.processor).train(attn.training))


def refresh(attn: Any) -> None:
    """Nothing to tell: the processor reads how many channels there are."""


def projections(attn: Any) -> dict[str, str]:
    """The frozen projections beside which factors stand, by factor: paths below the attention."""
    names = {"q_up": "to_q", "k_down": "to_k", "v_down": "to_v", "out_up": "to_out.0", "add_q_up": "add_q_proj"}
    names |= {"add_k_down": "add_k_proj", "add_v_down": "add_v_proj", "add_out_up": "to_add_out"}
    return {factor: path for factor, path in names.items() if getattr(attn, path.partition(".")[0], None) is not None}


def unmount(attn: Any) -> None:
    """Give an attention its own processor back."""
    attn.set_processor(attn.processor.before)


def drop_set_aside(model: Any, name: str) -> None:
    """Take an adapter out of the processors that ``fuse_qkv_projections`` has set aside for ``unfuse_qkv_projections`` to bring back."""
    aside = getattr(model, "original_attn_processors", None) or {}
    for path, processor in aside.items():
        if isinstance(processor, AdapterProcessor) and processor.channels.named(name) is not None:
            processor.channels.remove(name)
            if not processor.channels.names:
                aside[path] = processor.before


def widened(attn: Any, width: int) -> tuple[float, dict[str, Any]]:
    """What it takes for heads of another width: a factor for W_Q, and the attributes to set.

    Some stock processors scale the logits by 1/√width and others by the attention's ``scale``: with both, these agree.
    """
    inner = attn.heads * width
    return attn.scale * width**0.5, {"scale": width**-0.5, "inner_dim": inner, "inner_kv_dim": inner}


def between(attn: Any) -> str | None:
    """What stands between W_Q and W_K, so that they have no product, or None."""
    if getattr(attn, "norm_q", None) is not None or getattr(attn, "norm_k", None) is not None:
        return "q/k normalisation" + (" and rotary embeddings" if _kind(own_processor(attn)) is FluxProcessor else "")
    return None


def mounted(attn: Any) -> Any:
    """The extra channels of an attention, or None."""
    processor = getattr(attn, "processor", None)
    return processor.channels if isinstance(processor, AdapterProcessor) else None


def _kind(processor: Any) -> type[AdapterProcessor] | None:
    kinds: tuple[tuple[tuple[str, ...], type[AdapterProcessor]], ...] = (
        (_PLAIN, PlainProcessor),
        (_JOINT, JointProcessor),
        (_FLUX, FluxProcessor),
    )
    return next((kind for names, kind in kinds if type(processor).__name__ in names), None)


def _why_not(attn: Any) -> str | None:
    """Why an attention cannot carry terms, or None if it can."""
    processor = own_processor(attn)
    name = type(processor).__name__
    if "IPAdapter" in name:
        return f"an IP-Adapter computes this attention ({name}); unload_ip_adapter() first"
    if "Fused" in name or getattr(attn, "fused_projections", False):
        return "its q, k and v are one layer since fuse_qkv_projections(); call unfuse_qkv_projections() first"
    if "CustomDiffusion" in name:
        return f"Custom Diffusion's own weights compute this attention ({name})"
    if "AddedKV" in name:
        return f"keys and values of the text are added to those of the picture ({name})"
    if _kind(processor) is None:
        return f"its processor is a {name}, expected one of {', '.join((*_PLAIN, *_JOINT, *_FLUX))}"
    if attn.to_k is None or attn.to_k.out_features != attn.to_q.out_features:
        return "it has fewer keys and values than queries (grouped or multi-query attention)"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it computes in parallel on several devices"
    return None


def _heads(attn: Any, y: Tensor) -> Tensor:
    """(batch, tokens, heads · width) → (batch, tokens, heads, width)"""
    return y.unflatten(-1, (attn.heads, -1))


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _stream(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_heads(attn, y) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
    return _normalised(attn.norm_q, q), _normalised(attn.norm_k, k), v


def _context_stream(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_heads(attn, y) for y in (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)))
    return _normalised(attn.norm_added_q, q), _normalised(attn.norm_added_k, k), v


def _concatenated(streams: list[Any]) -> Any:
    """q, k, v of each stream, joined along the tokens; a part that is None in one stream is None in all."""
    if len(streams) == 1:
        return streams[0]
    return tuple(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x (batch, tokens, heads, width) by its token's angle; cos and sin are (tokens, width)."""
    cos, sin = (a[None, :, None, :].to(x.device) for a in angles)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _mask(attn: Any, mask: Tensor | None, keys: int, batch: int) -> Tensor | None:
    """A mask as the library hands it on, (batch, 1 or queries, keys), for (batch, heads, queries, keys)."""
    if mask is None:
        return None
    by_head: Tensor = attn.prepare_attention_mask(mask, keys, batch)  # (batch · heads, 1 or queries, keys)
    return by_head.view(batch, attn.heads, -1, by_head.shape[-1])

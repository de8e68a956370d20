"""diffusers' processors for attention with extra channels: one for each protocol that the library's own processors
follow.

Projections are always called as modules, never read, so that LoRA, quantised layers and hooks keep working.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....modules.adapters import CONTEXT, Extra
from .protocol import CHANNELS


class AdapterProcessor:
    """A processor that computes an attention with the extra channels that stand in it (``CHANNELS``).

    ``before`` is the processor that it took over from. It is None where the library has made this one anew from its
    class alone, as it does when it loads an IP-Adapter; ``stock`` names the processor that the library has by default.

    diffusers hands a processor only those keywords that its ``__call__`` names.
    """

    stock: str

    def __init__(self, before: Any = None) -> None:
        self.before = before


class PlainProcessor(AdapterProcessor):
    """Self- and cross-attention over one stream, as in Stable Diffusion's UNets; the protocol of
    ``AttnProcessor2_0``.
    """

    stock = "AttnProcessor2_0"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        channels = getattr(attn, CHANNELS)
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
        o, extra = channels.attend(q, k, v, _extra(channels, x, context), scale=attn.scale, mask=mask)
        y = channels.write(attn.to_out[0](o.flatten(2)), extra)
        y = attn.to_out[1](y)
        if picture is not None:
            y = y.mT.reshape(picture)
        if attn.residual_connection:
            y = y + residual
        return y / attn.rescale_output_factor


class JointProcessor(AdapterProcessor):
    """Joint attention of pictures and text, as in SD3; the protocol of ``JointAttnProcessor2_0``."""

    stock = "JointAttnProcessor2_0"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        channels = getattr(attn, CHANNELS)
        x, context = hidden_states, encoder_hidden_states
        streams = [_stream(attn, x)]
        extras = [_extra(channels, x, x)]
        if context is not None:  # behind the picture's tokens
            streams.append(_context_stream(attn, context))
            extras.append(_extra(channels, context, context, CONTEXT))
        q, k, v = _concatenated(streams)
        o, extra = channels.attend(q, k, v, _concatenated(extras), scale=attn.scale)
        o_x, o_context = o[:, : x.shape[1]], o[:, x.shape[1] :]
        e_x, e_context = (None, None) if extra is None else (extra[:, : x.shape[1]], extra[:, x.shape[1] :])
        y = attn.to_out[1](channels.write(attn.to_out[0](o_x.flatten(2)), e_x))
        if context is None:
            return y
        if attn.context_pre_only:
            return y, o_context.flatten(2)
        return y, channels.write(attn.to_add_out(o_context.flatten(2)), e_context, CONTEXT)


class FluxProcessor(AdapterProcessor):
    """Flux's attention, in double and single blocks, with q/k normalisation and rotary embeddings;
    ``FluxAttnProcessor``.
    """

    stock = "FluxAttnProcessor"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        channels = getattr(attn, CHANNELS)
        x, context = hidden_states, encoder_hidden_states
        streams = [_stream(attn, x)]
        extras = [_extra(channels, x, x)]
        if context is not None:  # in front of the picture's tokens
            streams.insert(0, _context_stream(attn, context))
            extras.insert(0, _extra(channels, context, context, CONTEXT))
        q, k, v = _concatenated(streams)
        if image_rotary_emb is not None:
            q, k = _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb)
        o, extra = channels.attend(q, k, v, _concatenated(extras), scale=attn.head_dim**-0.5, mask=attention_mask)
        if context is None:
            return o.flatten(2)
        words = context.shape[1]
        o_context, o_x = o[:, :words], o[:, words:]
        e_context, e_x = (None, None) if extra is None else (extra[:, :words], extra[:, words:])
        y = attn.to_out[1](channels.write(attn.to_out[0](o_x.flatten(2)), e_x))
        return y, channels.write(attn.to_add_out(o_context.flatten(2)), e_context, CONTEXT)


def _extra(channels: Any, x: Tensor, context: Tensor, prefix: str = "") -> Extra:
    """Extra channels of queries from ``x``, of keys and values from ``context``."""
    read = channels.read
    return read("q", x, prefix), read("k", context, prefix), read("v", context, prefix)


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
    """Turn each pair of neighbouring channels of x (batch, tokens, heads, width) by its token's angle; cos and sin are
    (tokens, width).
    """
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

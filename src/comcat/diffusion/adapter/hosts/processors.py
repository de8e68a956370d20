"""A processor of diffusers for attention with extra channels. It lets the library's own processor compute, and joins
the extra channels to queries, keys and values where that calls softmax attention: after normalisation, rotary
embeddings and all else that acts on them, whatever it is.

So no forward is written here a second time, and one processor serves every family of models. Two things happen around
the library's code:

- The attention that it is given tells what each of its projections has read, and adds what the extra channels say to
  what each output projection writes. The projections themselves are called as modules, so that LoRA, quantised layers
  and hooks keep working.
- ``scaled_dot_product_attention`` is met on its way (torch's function modes, which belong to the thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ....errors import ModelError
from ....modules.adapters import CONTEXT, SIDES, ExtraChannels, Side
from .layouts import LAYOUTS, Layout, layout_of
from .protocol import CHANNELS

PARALLEL = "to_qkv_mlp_proj"
"""The layer in front of attention and MLP at once, in Flux 2's single blocks."""


class Acting:
    """What every processor is that computes with the extra channels of its attention."""


class AdapterProcessor(Acting):
    """Computes an attention with the extra channels that stand in it (``CHANNELS``).

    ``before`` is the processor that it took over from. It is None where the library has made this one anew from its
    class alone, as it does for self-attention when it loads an IP-Adapter.

    diffusers hands a processor only those keywords that its ``__call__`` names: these are all that any of its own does.
    """

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(
        self,
        attn: Any,
        *tensors: Any,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        image_rotary_emb: Any = None,
        freqs_cis: Any = None,
        base_sequence_length: Any = None,
    ) -> Any:
        keywords = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "attention_mask": attention_mask,
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
            "freqs_cis": freqs_cis,
            "base_sequence_length": base_sequence_length,
        }
        engine, layout = engine_of(attn)
        return _joined(attn, engine, layout, tensors, keywords)


class ActingInPlace(Acting):
    """Mixed into the class of a processor that has weights of its own, as an IP-Adapter's. So it keeps its place, its
    weights move with the model, and the library still finds it by its class.
    """

    library_class: type

    def __call__(
        self,
        attn: Any,
        *tensors: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        keywords = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "temb": temb,
            "ip_adapter_masks": ip_adapter_masks,
        }
        own = super().__call__  # type: ignore[misc]
        return _joined(attn, own, LAYOUTS[self.library_class.__name__], tensors, keywords)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a class made at run time is not found by its name
        return _made, (self.library_class,), self.__dict__


@cache
def _acting(library_class: type) -> type:
    """The class of a processor of the library's that adapters act in."""
    named = {"__module__": library_class.__module__, "library_class": library_class}
    return type(f"{library_class.__name__}WithAdapters", (ActingInPlace, library_class), named)


def _made(library_class: type) -> Any:
    made = _acting(library_class)
    return made.__new__(made)  # type: ignore[call-overload]


def taken_over(processor: Any) -> Any:
    """The processor that adapters act in, where this one of the library's has computed."""
    layout = layout_of(processor)
    if layout is None or layout.beside is None:
        return AdapterProcessor(processor)
    processor.__class__ = _acting(type(processor))
    return processor


def release(processor: Any) -> None:
    """Make a processor with weights of its own the library's again."""
    if isinstance(processor, ActingInPlace):
        processor.__class__ = processor.library_class  # type: ignore[assignment]


def _joined(
    attn: Any, engine: Callable[..., Any], layout: Layout, tensors: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Any:
    """What the library's own code computes while the extra channels stand beside the heads."""
    joining = Joining(getattr(attn, CHANNELS), layout)
    seen = SeenAttention(attn, joining, projections_of(attn))
    given = {name: value for name, value in keywords.items() if value is not None}
    with _Meeting(joining):
        result = engine(seen, *tensors, **given)
    if joining.calls == 0 or (joining.calls > 1 and layout.beside is None):
        name = type(getattr(engine, "__self__", engine)).__name__
        raise ModelError(
            f"adapters cannot act in this attention: its {name} called softmax attention {joining.calls} times, "
            "expected once; another attention backend may be chosen for it"
        )
    return result


class Joining:
    """What one call of an attention knows: what its projections have read, and the extra channels of its outputs."""

    def __init__(self, channels: ExtraChannels, layout: Layout) -> None:
        self.channels, self.layout = channels, layout
        self.read: dict[str, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.calls = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In the place of ``scaled_dot_product_attention``: tensors are (batch, heads, tokens, width)."""
        self.calls += 1
        if self.calls > 1 and self.layout.beside:  # the same queries read other keys, of which adapters know nothing
            more: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if is_causal or dropout_p:
            raise ModelError("adapters cannot act in this attention: it is causal, or drops logits at random")
        repeated = query.shape[1] // key.shape[1] if enable_gqa else 1
        if repeated > 1:
            key, value = (x.repeat_interleave(repeated, dim=1) for x in (key, value))
        streams = [p for p in self.layout.order if f"{p}{SIDES['k']}" in self.read]
        q, k, v = (self._extra(side, streams) for side in ("q", "k", "v"))
        strength = float(query.shape[-1] ** -0.5 if scale is None else scale)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        o, extra = self.channels.attend(query, key, value, (q, k, v), scale=strength, mask=attn_mask)
        if extra is not None:
            counts = [self.read[f"{p}{SIDES['q']}"].shape[1] for p in streams]
            self.extra = dict(zip(streams, extra.split(counts, dim=1), strict=True))
        return o.transpose(1, 2)

    def _extra(self, side: Side, streams: Iterable[str]) -> Tensor | None:
        """The extra channels of q, k or v of all tokens, (batch, tokens, heads, ranks), or None if there are none."""
        found = [self.channels.read(side, self.read[f"{p}{SIDES[side]}"], p) for p in streams]
        parts = [part for part in found if part is not None]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None


class SeenAttention:
    """An attention as its processor sees it while adapters act in it."""

    fused_projections = False
    """Copies of q, k and v in one layer stay aside: the projections themselves are called."""

    def __init__(self, attention: Any, joining: Joining, projections: Mapping[str, str]) -> None:
        self._attention = attention
        factors: dict[str, list[str]] = {}
        for factor, path in projections.items():
            factors.setdefault(path, []).append(factor)
        for path, names in factors.items():
            name, _, first = path.partition(".")
            module = getattr(attention, name)
            if not names[0].endswith(SIDES["out"]):
                setattr(self, name, _Reading(module, joining, names))
            elif first:
                setattr(self, name, [_Writing(module[0], joining, names[0]), *module[1:]])
            else:
                setattr(self, name, _Writing(module, joining, names[0]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _Reading:
    """A projection that tells what it has read."""

    def __init__(self, module: Callable[..., Tensor], joining: Joining, factors: list[str]) -> None:
        self.module, self.joining, self.factors = module, joining, factors

    def __call__(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            self.joining.read[factor] = x
        return self.module(x)


class _Writing:
    """An output projection, and what the extra channels add to what it writes."""

    def __init__(self, module: Callable[..., Tensor], joining: Joining, factor: str) -> None:
        self.module, self.joining = module, joining
        self.stream = CONTEXT if factor.startswith(CONTEXT) else ""

    def __call__(self, x: Tensor) -> Tensor:
        return self.joining.channels.write(self.module(x), self.joining.extra.get(self.stream), self.stream)


class _Meeting(TorchFunctionMode):
    """Inside the block softmax attention is computed by a :class:`Joining`."""

    def __init__(self, joining: Joining) -> None:
        super().__init__()
        self.joining = joining

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.joining.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def projections_of(attention: Any) -> dict[str, str]:
    """See :meth:`comcat.diffusion.adapter.hosts.protocol.AdapterHost.projections`."""
    if hasattr(attention, PARALLEL):  # Flux 2's single blocks: one layer in front of attention and MLP, one behind
        return dict.fromkeys(("q_up", "k_down", "v_down"), PARALLEL) | {"out_up": "to_out"}
    names = {"q_up": "to_q", "k_down": "to_k", "v_down": "to_v", "out_up": "to_out.0"}
    names |= {"add_q_up": "add_q_proj", "add_k_down": "add_k_proj"}
    names |= {"add_v_down": "add_v_proj", "add_out_up": "to_add_out"}
    return {f: path for f, path in names.items() if getattr(attention, path.partition(".")[0], None) is not None}


def engine_of(attention: Any) -> tuple[Any, Layout]:
    """The processor of the library's that computes an attention under :class:`AdapterProcessor`, and what it does."""
    own = own_processor(attention)
    layout = layout_of(own)
    assert layout is not None, f"{type(own).__name__} is known to find"
    return (own if layout.computed_by is None else _named(layout.computed_by)), layout


def own_processor(attention: Any) -> Any:
    """The processor that computes this attention where no adapter does."""
    processor = attention.processor
    if not isinstance(processor, AdapterProcessor):
        return processor
    return _stock(attention) if processor.before is None else processor.before


def _stock(attention: Any) -> Any:
    """A new processor of the kind that the library gives an attention by default."""
    default = getattr(type(attention), "_default_processor_cls", None)
    if default is not None:
        return default()
    joint = getattr(attention, "add_q_proj", None) is not None
    return _named("JointAttnProcessor2_0" if joint else "AttnProcessor2_0")


def _named(name: str) -> Any:
    from diffusers.models import attention_processor

    return getattr(attention_processor, name)()

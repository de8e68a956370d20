"""What the processors of diffusers do, one line each: the table to which a family of models is added.

Which protocol a processor follows shows in its class alone, so classes are what is asked for here. What a line says is
proven for each against explicit logits, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ....modules.adapters import CONTEXT


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What has to be known of a processor.

    Attributes:
        joint: text and picture share one attention. order: of the streams' tokens, where each has projections of its
            own, by the prefix of its factors. rotary: queries and keys are turned by their places; ``"self"``: where
            both are of the same tokens. computed_by: the processor that computes the same through torch's softmax
            attention, where this one does not. beside: what else reads its queries, with keys of its own and further
            calls of softmax attention.
    """

    joint: bool = False
    order: tuple[str, ...] = (CONTEXT, "")
    rotary: bool | Literal["self"] = False
    computed_by: str | None = None
    beside: str | None = None


_PLAIN, _SD3 = "AttnProcessor2_0", "JointAttnProcessor2_0"
_TURNED = Layout(joint=True, rotary=True)
LAYOUTS: dict[str, Layout] = {
    # Stable Diffusion 1, 2 and XL; PixArt
    "AttnProcessor2_0": Layout(),
    "AttnProcessor": Layout(computed_by=_PLAIN),
    "SlicedAttnProcessor": Layout(computed_by=_PLAIN),
    "XFormersAttnProcessor": Layout(computed_by=_PLAIN),
    "FusedAttnProcessor2_0": Layout(computed_by=_PLAIN),
    "IPAdapterAttnProcessor2_0": Layout(
        beside="an IP-Adapter reads its queries and writes through its output; unload_ip_adapter() first"
    ),
    # Stable Diffusion 3
    "JointAttnProcessor2_0": Layout(order=("", CONTEXT)),
    "XFormersJointAttnProcessor": Layout(order=("", CONTEXT), computed_by=_SD3),
    "FusedJointAttnProcessor2_0": Layout(order=("", CONTEXT), computed_by=_SD3),
    # Flux, Chroma
    "FluxAttnProcessor": _TURNED,
    # Flux 2
    "Flux2AttnProcessor": _TURNED,
    "Flux2ParallelSelfAttnProcessor": _TURNED,
    "QwenDoubleStreamAttnProcessor2_0": _TURNED,
    "ZSingleStreamAttnProcessor": _TURNED,
    "Lumina2AttnProcessor2_0": _TURNED,
    "CogView4AttnProcessor": _TURNED,
    "AuraFlowAttnProcessor2_0": Layout(joint=True),
    "FusedAuraFlowAttnProcessor2_0": Layout(joint=True, computed_by="AuraFlowAttnProcessor2_0"),
    "HunyuanAttnProcessor2_0": Layout(rotary=True),
    "FusedHunyuanAttnProcessor2_0": Layout(rotary=True, computed_by="HunyuanAttnProcessor2_0"),
    "SanaAttnProcessor2_0": Layout(),
    "WanAttnProcessor": Layout(rotary="self"),
}
COPYING = tuple(name for name in LAYOUTS if name.startswith("Fused"))
"""Those that read copies of q, k and v in one layer (``fuse_qkv_projections``). Ours has the projections called."""

_REASONS = {
    "IPAdapter": "an IP-Adapter computes this attention ({}); unload_ip_adapter() first",
    "CustomDiffusion": "Custom Diffusion's own weights compute this attention ({})",
    "AddedKV": "keys and values of the text are added to those of the picture ({})",
    "Linear": "it is linear attention ({}), which forms no logits: neither product has a place in it",
    "PAG": "perturbed-attention guidance computes this attention ({})",
}


def layout_of(processor: Any) -> Layout | None:
    """What a processor does, None if it is none of those known."""
    return LAYOUTS.get(name_of(processor))


def name_of(processor: Any) -> str:
    """The name of the library's class, also where adapters act in what it computes."""
    return getattr(processor, "library_class", type(processor)).__name__


def reason_against(processor: Any) -> str | None:
    """Why adapters cannot act where a processor computes, None if they can."""
    name = name_of(processor)
    if name not in LAYOUTS:
        for part, reason in _REASONS.items():
            if part in name:
                return reason.format(name)
        return f"its processor is a {name}, of which it is not known where it calls softmax attention, and on what"
    backend = str(getattr(processor, "_attention_backend", None) or "native")
    if "native" not in backend.lower():
        return f"the attention backend {backend} computes it; set_attention_backend('native') first"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it computes in parallel on several devices"
    return None

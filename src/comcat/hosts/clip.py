"""CLIP's text encoder in a diffusion pipeline: transformers' attention with separate projections.

Its own forward reads the width of a head from ``head_dim`` and passes its scale to whichever attention function is chosen. So the module
stays, and wider projections take the place of its own: each calls the one that it replaces and joins the extra channels head by head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .diffusers import AdaptableAttention, RefusedAttention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_CHANNELS = "comcat_channels"


class WideProjection(nn.Module):
    """A projection of q, k or v whose heads have the extra channels behind their own."""

    comcat_module = True

    def __init__(self, base: nn.Module, side: str, channels: nn.Module, heads: int) -> None:
        super().__init__()
        self.base, self.side, self.heads = base, side, heads
        self._channels: tuple[Any] = (channels,)  # a submodule of the attention, not of each projection

    def forward(self, x: Tensor) -> Tensor:
        own = self.base(x).unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, width)
        return self._channels[0].join(own, self._channels[0].read(self.side, x)).flatten(2)


class WideOutput(nn.Module):
    """The output projection for :class:`WideProjection`: reads the heads' own channels, and adds what the extra ones say."""

    comcat_module = True

    def __init__(self, base: nn.Module, channels: nn.Module, heads: int, width: int) -> None:
        super().__init__()
        self.base, self.heads, self.width = base, heads, width
        self._channels: tuple[Any] = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        o = x.unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, width + ranks)
        return self._channels[0].write(self.base(o[..., : self.width].flatten(2)), o[..., self.width :])


def find_attention(model: nn.Module) -> tuple[list[AdaptableAttention], list[RefusedAttention]]:
    """Every attention of a CLIP text encoder. Other text encoders (T5) have none that can carry terms, and it says why."""
    found = [_anatomy(path, module) for path, module in model.named_modules() if _is_clip(module)]
    if found:
        return found, []
    reason = f"{type(model).__name__} is no CLIP text encoder, whose attention alone is known"
    return [], [RefusedAttention("", reason, where="text")]


def mount(attn: Any, channels: nn.Module) -> None:
    """Let an attention compute with extra channels."""
    width = attn.head_dim
    attn.add_module(_CHANNELS, channels.train(attn.training))
    for name in _PROJECTIONS:
        setattr(attn, name, WideProjection(getattr(attn, name), name[0], channels, attn.num_heads))
    attn.out_proj = WideOutput(attn.out_proj, channels, attn.num_heads, width)


def refresh(attn: Any) -> None:
    """Tell an attention how wide its heads are now."""
    attn.head_dim = attn.out_proj.width + mounted(attn).ranks("qk")


def unmount(attn: Any) -> None:
    """Give an attention its own projections back."""
    attn.head_dim = attn.out_proj.width
    for name in (*_PROJECTIONS, "out_proj"):
        setattr(attn, name, getattr(attn, name).base)
    delattr(attn, _CHANNELS)


def drop_set_aside(model: Any, name: str) -> None:
    """Nothing to do: transformers sets no attention aside."""


def projections(attn: Any) -> dict[str, str]:
    """The frozen projections beside which factors stand, by factor: paths below the attention."""
    return {"q_up": "q_proj", "k_down": "k_proj", "v_down": "v_proj", "out_up": "out_proj"}


def widened(attn: Any, width: int) -> tuple[float, dict[str, Any]]:
    """What it takes for heads of another width: a factor for W_Q, and the attributes to set."""
    return 1.0, {"head_dim": width}  # its scale is an attribute of its own


def between(attn: Any) -> str | None:
    """Nothing stands between W_Q and W_K."""
    return None


def mounted(attn: Any) -> Any:
    """The extra channels of an attention, or None."""
    return getattr(attn, _CHANNELS, None)


def _is_clip(module: Any) -> bool:
    names = (*_PROJECTIONS, "out_proj", "head_dim", "num_heads", "embed_dim", "scale")
    return all(hasattr(module, n) for n in names) and hasattr(module.q_proj, "forward")


def _anatomy(path: str, attn: Any) -> AdaptableAttention:
    widths: dict[str, int] = dict.fromkeys(("q_up", "k_down", "v_down", "out_up"), attn.embed_dim)
    return AdaptableAttention(path, "text", widths, attn.num_heads, attn.embed_dim // attn.num_heads)

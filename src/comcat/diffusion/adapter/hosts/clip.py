"""CLIP's text encoder in a diffusion pipeline: transformers' attention with separate projections.

Its own forward reads the width of a head from ``head_dim`` and passes its scale to whichever attention function is
chosen. So the module stays, and wider projections take the place of its own: each calls the one that it replaces and
joins the extra channels head by head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....modules.adapters import ExtraChannels
from .protocol import CHANNELS, AdaptableAttention, Found, Widened

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ClipHost:
    """CLIP text encoders of transformers."""

    name = "CLIP text encoder"

    def resembles(self, model: nn.Module) -> bool:
        return any(_is_attention(module) for module in model.modules())

    def find(self, model: nn.Module) -> Found:
        return Found([_anatomy(path, module) for path, module in model.named_modules() if _is_attention(module)], [])

    def projections(self, attention: Any) -> dict[str, str]:
        return {"q_up": "q_proj", "k_down": "k_proj", "v_down": "v_proj", "out_up": "out_proj"}

    def frozen(self, attention: Any, path: str) -> Any:
        module = attention.get_submodule(path)
        return module.base if isinstance(module, WideProjection | WideOutput) else module

    def mount(self, attention: Any) -> None:
        channels, heads = getattr(attention, CHANNELS), attention.num_heads
        for name in _PROJECTIONS:
            setattr(attention, name, WideProjection(getattr(attention, name), name[0], channels, heads))
        attention.out_proj = WideOutput(attention.out_proj, channels, heads, _head_dim(attention))

    def refresh(self, attention: Any) -> None:
        attention.head_dim = _head_dim(attention) + getattr(attention, CHANNELS).ranks("qk")

    def unmount(self, attention: Any) -> None:
        attention.head_dim = _head_dim(attention)
        for name in (*_PROJECTIONS, "out_proj"):
            setattr(attention, name, self.frozen(attention, name))

    def why_not(self, attention: Any) -> str | None:
        if getattr(attention, CHANNELS, None) is None:
            return None
        now = ((name, getattr(attention, name)) for name in (*_PROJECTIONS, "out_proj"))
        gone = next(((n, type(m).__name__) for n, m in now if not isinstance(m, WideProjection | WideOutput)), None)
        return None if gone is None else f"a {gone[1]} has taken the place of its {gone[0]}"

    def reclaim(self, attention: Any) -> str | None:
        return self.why_not(attention)  # what takes the place of a projection computes something else

    def copied(self, attention: Any) -> str | None:
        return None

    def shared(self, attention: Any) -> str | None:
        return None

    def sweep(self, model: nn.Module) -> None:
        """Nothing to do: transformers sets no attention aside."""

    def between(self, attention: Any) -> str | None:
        return None

    def widened(self, attention: Any, width: int) -> Widened:
        return Widened(1.0, {"head_dim": width})  # its scale is an attribute of its own


class WideProjection(nn.Module):
    """A projection of q, k or v whose heads have the extra channels behind their own."""

    comcat_module = True

    def __init__(self, base: nn.Module, side: str, channels: ExtraChannels, heads: int) -> None:
        super().__init__()
        self.base, self.side, self.heads = base, side, heads
        self._channels: tuple[Any] = (channels,)  # a submodule of the attention, not of each projection

    def forward(self, x: Tensor) -> Tensor:
        own = self.base(x).unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, width)
        return self._channels[0].join(own, self._channels[0].read(self.side, x)).flatten(2)


class WideOutput(nn.Module):
    """The output projection for :class:`WideProjection`: reads the heads' own channels, and adds what the extra ones
    say.
    """

    comcat_module = True

    def __init__(self, base: nn.Module, channels: ExtraChannels, heads: int, width: int) -> None:
        super().__init__()
        self.base, self.heads, self.width = base, heads, width
        self._channels: tuple[Any] = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        o = x.unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, width + ranks)
        return self._channels[0].write(self.base(o[..., : self.width].flatten(2)), o[..., self.width :])


def _is_attention(module: Any) -> bool:
    names = (*_PROJECTIONS, "out_proj", "head_dim", "num_heads", "embed_dim", "scale")
    return all(hasattr(module, n) for n in names) and hasattr(module.q_proj, "forward")


def _anatomy(path: str, attention: Any) -> AdaptableAttention:
    widths: dict[str, int] = dict.fromkeys(("q_up", "k_down", "v_down", "out_up"), attention.embed_dim)
    return AdaptableAttention(path, "text", widths, attention.num_heads, _head_dim(attention))


def _head_dim(attention: Any) -> int:
    """The width of a frozen head; the attention's own ``head_dim`` counts the extra channels as well."""
    return attention.embed_dim // attention.num_heads

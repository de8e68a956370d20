"""Attention that adds a position bias of its own to the logits: Swin, BEiT, relative-position ViT, MaxViT.

What stands in for such a module is the module itself, without its projections and with low-rank attention in their
place. It keeps its bias tables, its settings and the methods by which the host resizes its windows. Its class is one of
those below put before the host's own, so that its forward is ours and all else is the host's.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "proj_drop")
_BIASES = ("q_bias", "k_bias", "v_bias")


class BiasedAttention(nn.Module):
    """A host's attention whose projections gave way to ``core``, which takes the bias as its mask."""

    comcat_module = True
    if TYPE_CHECKING:  # TorchScript reads what a class is annotated with
        core: Any
        rel_pos: Any
        relative_position_bias_table: Tensor | None
        _get_rel_pos_bias: Any

    def own_bias(self) -> Tensor | None:
        """The additive bias of the module itself, (1, heads, tokens, tokens), if it has one."""
        if hasattr(self, "_get_rel_pos_bias"):
            if self.relative_position_bias_table is not None:
                return self._get_rel_pos_bias()
        elif hasattr(self, "rel_pos"):
            if self.rel_pos is not None:
                return self.rel_pos.get_bias()
        return None

    def __reduce__(self) -> tuple:
        """Pickle by the two classes that make this one up, which can be found by name."""
        ours, host = type(self).__bases__
        return _blank, (ours, host), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.upgrade_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def upgrade_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Read what the first saved models have below ``source`` as what this module has itself."""
        for name in [n for n in state_dict if n.startswith(f"{prefix}source.")]:
            state_dict[prefix + name.removeprefix(f"{prefix}source.")] = state_dict.pop(name)


class BeitAttention(BiasedAttention):
    """``forward(x, shared_rel_pos_bias)``: BEiT's relative position bias, its own and a shared one."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = self.own_bias()
        if bias is None:
            return self.core(x, shared_rel_pos_bias)
        return self.core(x, bias if shared_rel_pos_bias is None else bias + shared_rel_pos_bias)


class WindowAttention(BiasedAttention):
    """``forward(x, mask)``: Swin's bias and the mask of shifted windows, (windows, tokens, tokens)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self.own_bias()  # (1, heads, tokens, tokens)
        if mask is not None:
            bias = mask[:, None] if bias is None else bias + mask[:, None]  # (windows, heads, tokens, tokens)
            bias = bias.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)  # windows vary fastest in the batch
        return self.core(x, bias)


class RelPosAttention(BiasedAttention):
    """``forward(x, shared_rel_pos)``: the bias of a relative-position module, or a shared one."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = self.own_bias()
        return self.core(x, shared_rel_pos if bias is None else bias)


BY_SIGNATURE: dict[str, type[BiasedAttention]] = {
    "shared_rel_pos_bias": BeitAttention,
    "mask": WindowAttention,
    "shared_rel_pos": RelPosAttention,
}
"""Which one stands in, by the last argument of the host's forward."""


def own_bias(module: nn.Module) -> Tensor | None:
    """The additive bias that a host's module puts on its logits, (1, heads, tokens, tokens), if it has one."""
    table: Any = getattr(module, "relative_position_bias_table", None)
    rel_pos: Any = getattr(module, "rel_pos", None)
    known = (table is not None and hasattr(module, "_get_rel_pos_bias")) or hasattr(rel_pos, "get_bias")
    return BiasedAttention.own_bias(module) if known else None  # type: ignore[arg-type]


def stand_in(ours: type[BiasedAttention], module: nn.Module, core: nn.Module) -> nn.Module:
    """``module`` with ``core`` in place of its projections.

    It shares all else with ``module``, which is not changed.
    """
    bare: Any = copy.copy(module)
    bare.__class__ = _joined(ours, type(module))
    bare._modules = {k: v for k, v in module._modules.items() if k not in _PROJECTIONS}
    bare._parameters = {k: v for k, v in module._parameters.items() if k not in _BIASES}
    bare._buffers = {k: v for k, v in module._buffers.items() if k not in _BIASES}
    bare.q_bias = bare.k_bias = bare.v_bias = None
    bare.core = core
    return bare


@functools.cache
def _joined(ours: type[BiasedAttention], host: type[nn.Module]) -> type[nn.Module]:
    return type(ours.__name__, (ours, host), {"__module__": ours.__module__})


def _blank(ours: type[BiasedAttention], host: type[nn.Module]) -> nn.Module:
    """An instance without any state, for copies and pickles to fill."""
    joined = _joined(ours, host)
    return joined.__new__(joined)

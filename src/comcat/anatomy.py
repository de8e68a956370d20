"""The anatomy of one attention module: where its projections are in the host, and what its products are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


def part(model: nn.Module, path: str) -> Any:
    """The module at a path. (Typed as Any: torch types every attribute of a module as ``Tensor | Module``.)"""
    return model.get_submodule(path)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1×1 convolution, which is a linear layer over positions."""
    if type(module) is not nn.Conv2d:
        return False
    ones = (*module.kernel_size, *module.stride, module.groups)
    return all(n == 1 for n in ones) and module.padding in ((0, 0), "same", "valid")


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or puts out with channels last; of a convolution, (batch, height, width, channels)."""
    return x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x


@dataclass(frozen=True)
class Projection:
    """Rows of a layer in the host: where W_Q (or W_K, W_V) of all heads lives.

    Attributes:
        path: the module that holds the rows.
        start, stop: its rows (heads · width, head by head); of the first head, where the rows of heads lie apart.
        bias: path of a bias that the host keeps apart from the layer and adds itself (BEiT's ``q_bias``), if it does.
        heads, step: where rows of heads lie apart: how many heads, and how many rows from one's first to the next's.
        names: the module's parameters that hold weight and bias. bias_start: the first row in the bias, where it is
            another one than in the weight.
        seen: path of the layer that is called for these rows while the host is observed; by default ``path``.
    """

    path: str
    start: int
    stop: int
    bias: str | None = None
    heads: int = 1
    step: int = 0
    names: tuple[str, str] = ("weight", "bias")
    bias_start: int | None = None
    seen: str | None = None

    @property
    def called(self) -> str:
        """Path of the layer whose output holds these rows, while the host is observed."""
        return self.path if self.seen is None else self.seen

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.heads * (self.stop - self.start)

    @property
    def rows(self) -> slice | list[int]:
        """Which rows of the weight."""
        if self.heads == 1:
            return slice(self.start, self.stop)
        return [h * self.step + i for h in range(self.heads) for i in range(self.start, self.stop)]

    @property
    def channels(self) -> slice | list[int]:
        """Which channels of the output of the layer that is ``called``."""
        return self.rows if self.seen is None else slice(None)

    def weight(self, model: nn.Module) -> Tensor:
        """The rows, (heads · width, in); of a convolution over single points as well. Not to be written into."""
        weight = getattr(part(model, self.path), self.names[0])
        return (weight.flatten(1) if weight.ndim > 2 else weight)[self.rows]

    def bias_or_none(self, model: nn.Module) -> Tensor | None:
        """The bias of these rows, (heads · width,), or None."""
        if self.bias is not None:
            owner, _, name = self.bias.rpartition(".")
            return getattr(part(model, owner), name)
        bias = getattr(part(model, self.path), self.names[1])
        return None if bias is None else bias[self._bias_rows]

    def write_(self, model: nn.Module, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Write other rows, or another bias of them, into the host."""
        with torch.no_grad():
            if weight is not None:
                held = getattr(part(model, self.path), self.names[0])
                held[self.rows] = weight.to(held).view(-1, *held.shape[1:])
            if bias is not None and self.bias is not None:
                held = self.bias_or_none(model)
                assert held is not None
                held.copy_(bias)
            elif bias is not None:
                held = getattr(part(model, self.path), self.names[1])
                held[self._bias_rows] = bias.to(held)

    @property
    def _bias_rows(self) -> slice | list[int]:
        if self.bias_start is None:
            return self.rows
        return slice(self.bias_start, self.bias_start + self.count)


@dataclass(frozen=True)
class Attention:
    """The anatomy of one attention module: where its projections are and what its products are worth.

    ``mount`` names how a replacement takes its place: ``"whole"`` (the module gives way to a low-rank attention behind
    the same signature), ``"crossed"`` (likewise, where queries, keys and values may come from different inputs),
    ``"parts"`` (the host's own forward stays, its projections are exchanged, and ``widths`` name the attributes that
    say how wide a head is), or ``"padded"`` (the same with heads padded to the width that the forward reckons with).

    ``keeps_key_bias`` says that a constant added to the keys is not lost in the softmax, since there are keys besides
    those of tokens (``bias_k``, ``bias_v`` at ``path``, or a zero).
    """

    path: str
    host: str
    mount: Literal["whole", "crossed", "parts", "padded"]
    signature: str
    heads: int
    width: int
    in_features: int
    out_features: int
    scale: float
    q: Projection
    k: Projection
    v: Projection
    out: str
    qk_reason: str | None = None
    vo_reason: str | None = None
    folds_value_bias: bool = True
    keeps_key_bias: bool = False
    widths: tuple[str, ...] = ("head_dim",)

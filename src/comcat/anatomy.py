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


def layer_and_norm(module: nn.Module) -> tuple[Any, Any] | None:
    """A linear layer (or 1×1 convolution) and the batch norm right behind it, where a module holds nothing else.

    In evaluation ``s ⊙ (W x + b) + t`` is one layer with the weight ``s ⊙ W`` and the bias ``s ⊙ b + t``.
    """
    if isinstance(module, nn.Linear | nn.Conv2d) or next(iter(module._parameters), None) is not None:
        return None
    kinds = (nn.Identity, nn.modules.batchnorm._BatchNorm)
    found = [m for m in module.modules() if isinstance(m, kinds[1]) or next(m.children(), None) is None]
    found = [m for m in found if not isinstance(m, nn.Identity)]
    if len(found) != 2 or not (isinstance(found[0], nn.Linear) or is_pointwise(found[0])):
        return None
    layer, norm = found
    fits = isinstance(norm, kinds[1]) and norm.num_features == len(layer.get_parameter("weight"))
    return (layer, norm) if fits and norm.track_running_stats and norm.affine else None  # type: ignore[union-attr]


def dense_in(module: nn.Module | None) -> Any:
    """The linear layer or 1×1 convolution that a module is, or is before its batch norm; else None."""
    if module is None or isinstance(module, nn.Linear) or is_pointwise(module):
        return module
    found = layer_and_norm(module)
    return None if found is None else found[0]


def over_maps(layer: nn.Module) -> bool:
    """Whether a layer has channels first: a convolution, or one before its batch norm."""
    return isinstance(layer, nn.Conv2d) or isinstance(dense_in(layer), nn.Conv2d)


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or puts out with channels last; of a convolution, (batch, height, width, channels)."""
    return x.movedim(1, -1) if over_maps(layer) else x


def _folded(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight (out, in) and bias (out,) of a layer with its batch norm, as in evaluation; None of any other module."""
    found = layer_and_norm(module)
    if found is None:
        return None
    layer, norm = found
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
    return layer.weight.flatten(1) * scale[:, None], norm.bias - mean * scale


@dataclass(frozen=True)
class Projection:
    """Rows of a layer in the host: where W_Q (or W_K, W_V) of all heads lives.

    Attributes:
        path: the module that holds the rows: a layer, or one with its batch norm (see :func:`layer_and_norm`).
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
        if (folded := _folded(part(model, self.path))) is not None:
            return folded[0][self.rows]
        weight = getattr(part(model, self.path), self.names[0])
        return (weight.flatten(1) if weight.ndim > 2 else weight)[self.rows]

    def bias_or_none(self, model: nn.Module) -> Tensor | None:
        """The bias of these rows, (heads · width,), or None."""
        if self.bias is not None:
            owner, _, name = self.bias.rpartition(".")
            return getattr(part(model, owner), name)
        if (folded := _folded(part(model, self.path))) is not None:
            return folded[1][self._bias_rows]
        bias = getattr(part(model, self.path), self.names[1])
        return None if bias is None else bias[self._bias_rows]

    def write_(self, model: nn.Module, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Write other rows, or another bias of them, into the host."""
        with torch.no_grad():
            if (normed := layer_and_norm(part(model, self.path))) is not None:
                self._write_before_norm_(model, *normed, weight, bias)
                return
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

    def _write_before_norm_(
        self, model: nn.Module, layer: Any, norm: Any, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """The batch norm becomes neutral on these rows, but for its bias."""
        weight = self.weight(model) if weight is None else weight
        bias = self.bias_or_none(model) if bias is None else bias
        assert bias is not None
        mean = norm.running_mean[self.rows] - (0 if layer.bias is None else layer.bias[self.rows])
        norm.weight[self.rows] = (norm.running_var[self.rows] + norm.eps).sqrt().to(norm.weight)
        norm.bias[self.rows] = bias.to(norm.bias) + mean.to(norm.bias)
        layer.weight[self.rows] = weight.to(layer.weight).view(-1, *layer.weight.shape[1:])

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

    ``normed`` says that a batch norm behind a projection is folded into what takes its place (exact in evaluation).

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
    normed: bool = False
    widths: tuple[str, ...] = ("head_dim",)

    @property
    def value_width(self) -> int:
        """Channels of a head's values; ``width`` is that of its queries and keys."""
        return self.v.count // self.heads

"""Is there a product? Structural proof by gauge invariance, whatever the class is called.

A QK product exists exactly where the attention's output does not change under ``W_Q → W_Q R``, ``W_K → W_K R⁻ᵀ`` for
any invertible R in every head, and softmax runs over keys exactly where a constant added to every key changes nothing.
A VO product exists where ``W_V → W_V R``, ``W_O → R⁻¹ W_O`` changes nothing; attention rows sum to one where a constant
c added to the values moves the output by ``c W_O``. Anything that sits between the two factors (a norm, rotary
embeddings, a gate, channel attention) breaks the symmetry. The probe works on a copy of one module with random weights,
in float64, so that zero initialisations hide nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites import Attention, Projection, dense_in, layer_and_norm, over_maps, part
from .mounting import drop_hooks
from .structures import rows_in

TOLERANCE = 1e-5
"""Relative.

A broken symmetry moves the output by its own size; some hosts take the softmax in float32 whatever comes in.
"""


_OTHER_DROPOUTS = ("proj", "path", "resid", "out_drop", "ffn", "mlp")
"""Words in the names of dropouts that act on something else."""

Bias = Callable[[nn.Module], Tensor | None]


@dataclass(frozen=True)
class Symmetry:
    """What the probe found: which products exist, and whether values pass with weights that sum to one.

    ``in_turn`` says that a VO product would exist if the output layer read head by head, not channel by channel, and
    ``in_part`` that one exists with a part of the channels that it reads.
    """

    qk: bool
    vo: bool
    rows_sum_to_one: bool
    in_turn: bool = False
    in_part: bool = False


@dataclass(frozen=True)
class Trial:
    """Arguments of a forward besides the tokens, and the mask on the logits (boolean or additive) that they should
    amount to.
    """

    keywords: Mapping[str, Any]
    mask: Tensor | None


class NotItsOwn(Exception):
    """A copy of a module does not compute with its own weights, so that a trial on it proves nothing."""


@torch.no_grad()
def probe(copied: nn.Module, attention: Attention, calls: Sequence[Callable[[nn.Module], Tensor]]) -> Symmetry:
    """Probe a random copy of an attention module in every way of calling it. Paths are read relative to it.

    Raises:
        NotItsOwn: where a change of one factor alone changes nothing.
    """
    a, generator = attention, torch.Generator().manual_seed(1)
    before = [call(copied) for call in calls]
    rotate, inverse_t, shift = _change_of_basis(a.heads, a.width, generator)

    def unchanged(other: nn.Module, expected: Sequence[Tensor] = before) -> bool:
        after = (call(other) for call in calls)
        return all(
            bool((y - e).abs().max() <= TOLERANCE * (1 + e.abs().max())) for y, e in zip(after, expected, strict=True)
        )

    qk_copy = copy.deepcopy(copied)
    _transform_rows(qk_copy, a.q, a.heads, rotate)
    if unchanged(qk_copy):
        raise NotItsOwn
    _transform_rows(qk_copy, a.k, a.heads, inverse_t)
    qk = unchanged(qk_copy)
    if qk and _shift_bias(qk_copy, a.k, shift):
        qk = unchanged(qk_copy)

    rotate, inverse_t, shift = _change_of_basis(a.heads, a.value_width, generator)
    vo_copy = copy.deepcopy(copied)
    _transform_rows(vo_copy, a.v, a.heads, rotate)
    if unchanged(vo_copy):
        raise NotItsOwn
    out = part(vo_copy, a.out)
    if dense_in(out) is None:
        return Symmetry(qk, vo=False, rows_sum_to_one=False)
    before_out, count = out.weight.clone(), a.v.count

    def undone_from(start: int) -> bool:
        weight = before_out.flatten(1).clone()  # (out, channels)
        w = weight[:, start : start + count].unflatten(1, (a.heads, a.value_width))  # (out, heads, width)
        weight[:, start : start + count] = torch.einsum("ohw,hwv->ohv", w, inverse_t).flatten(1)
        out.weight.copy_(weight.view_as(out.weight))
        return unchanged(vo_copy)

    if rows_in(out) != count:
        in_part = any(undone_from(start) for start in range(0, rows_in(out) - count + 1, count))
        return Symmetry(qk, vo=False, rows_sum_to_one=False, in_part=in_part)
    vo = undone_from(0)
    w = before_out.flatten(1).unflatten(1, (a.value_width, a.heads))  # (out, width, heads)
    out.weight.copy_(torch.einsum("owh,hwv->ovh", w, inverse_t).flatten(1).view_as(out.weight))
    in_turn = not vo and unchanged(vo_copy)
    sums = vo
    if vo and _shift_bias(copied, a.v, shift):  # without a value bias there is none to fold
        moved = shift @ part(copied, a.out).weight.flatten(1).mT
        sums = before[0].shape[-1] == len(moved) and unchanged(copied, [e + moved for e in before])
        _shift_bias(copied, a.v, -shift)
    return Symmetry(qk, vo, sums, in_turn)


def _change_of_basis(heads: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An invertible matrix R a head, R⁻ᵀ, (heads, width, width), and a constant for all channels, (heads · width,)."""
    rotate = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
    rotate = rotate / width**0.5 + torch.eye(width, dtype=torch.float64)
    shift = torch.randn(heads * width, generator=generator, dtype=torch.float64)
    return rotate, torch.linalg.inv(rotate).mT, shift


@torch.no_grad()
def read_past(copied: nn.Module, attention: Attention, calls: Sequence[Callable[[nn.Module], Tensor]]) -> str | None:
    """The first projection that a forward does not call, if any: then it computes with weights that it reads itself."""
    called: set[str] = set()
    paths = dict.fromkeys((attention.q.path, attention.k.path, attention.v.path, attention.out))
    handles = [part(copied, path).register_forward_hook(lambda m, i, o, path=path: called.add(path)) for path in paths]
    for call in calls:
        call(copied)
    for handle in handles:
        handle.remove()
    return next((path for path in paths if path not in called), None)


@torch.no_grad()
def is_read_rightly(copied: nn.Module, attention: Attention) -> bool:
    """Whether layers with a batch norm compute what the weights and biases say that are read of the two together."""
    a, generator = attention, torch.Generator().manual_seed(0)
    for p in (a.q, a.k, a.v):
        module = part(copied, p.path)
        if layer_and_norm(module) is None:
            continue
        weight, bias = p.weight(copied), p.bias_or_none(copied)
        x = torch.randn(2, 3, weight.shape[1], generator=generator, dtype=torch.float64)
        try:
            y = module(x.mT[..., None])[..., 0].mT if over_maps(module) else module(x)
        except Exception:  # whatever a stranger's forward makes of tokens
            return False
        expected = F.linear(x, weight, bias)
        if (y[..., p.rows] - expected).abs().max() > TOLERANCE * (1 + expected.abs().max()):
            return False
    return True


class _Other(nn.Module):
    """What computes as a layer does, and is of another class."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@torch.no_grad()
def checks_types(copied: nn.Module, attention: Attention, calls: Sequence[Callable[[nn.Module], Tensor]]) -> bool:
    """Whether a forward fails where its projections are modules of other classes that compute the same."""
    others = copy.deepcopy(copied)
    for path in dict.fromkeys((attention.q.path, attention.k.path, attention.v.path, attention.out)):
        owner, _, name = path.rpartition(".")
        setattr(others.get_submodule(owner), name, _Other(part(others, path)))
    try:
        for call in calls:
            call(others)
    except Exception:  # whatever a stranger's check raises
        return True
    return False


def random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode with random weights in float64, on the CPU, that calls no one's hooks."""
    copied = copy.deepcopy(module).to("cpu", torch.float64)
    copied.eval()  # apart, since some classes return nothing there
    drop_hooks(copied)
    with torch.no_grad():
        for module in copied.modules():
            for p in module.parameters(recurse=False):
                reads = p[0].numel() if isinstance(module, nn.Conv2d) else p.shape[-1]  # or the softmax is one-hot
                scale = reads**-0.5 if p.ndim > 1 else 0.3
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return copied


def structure(module: nn.Module) -> tuple:
    """Equal for modules of one class, shape and setting: all blocks of a model are probed once."""
    plain = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, bool, str, type(None))))
    shapes = tuple((n, tuple(t.shape)) for n, t in module.state_dict(keep_vars=True).items())
    return type(module), vars(module).get("forward"), repr(module), shapes, plain


def norm_and_gate(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norm and the sigmoid gate that some attention modules put on the concatenated heads, before the output
    projection.
    """
    norm, gate = getattr(module, "norm", None), getattr(module, "gate", None)
    return (
        norm if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) else None,
        gate if isinstance(gate, nn.Linear) else None,
    )


def _transform_rows(module: nn.Module, projection: Projection, heads: int, matrix: Tensor) -> None:
    """``W → W R`` for each head's rows (and bias); ``matrix`` is (heads, width, width)."""
    weight, bias = projection.weight(module).unflatten(0, (heads, -1)), projection.bias_or_none(module)
    turned = None
    if bias is not None:
        turned = torch.einsum("hw,hwv->hv", bias.unflatten(0, (heads, -1)), matrix).flatten()
    projection.write_(module, torch.einsum("hwd,hwv->hvd", weight, matrix).flatten(0, 1), turned)


def _shift_bias(module: nn.Module, projection: Projection, shift: Tensor) -> bool:
    bias = projection.bias_or_none(module)
    if bias is None:
        return False
    projection.write_(module, bias=bias + shift)
    return True


@torch.no_grad()
def is_plain(module: nn.Module, a: Attention, x: Tensor, bias: Bias | None, trials: Sequence[Trial]) -> bool:
    """Whether the module returns one tensor, that of plain softmax attention under the mask of every trial."""

    def project(p: Projection) -> Tensor:
        return F.linear(x, p.weight(module), p.bias_or_none(module)).unflatten(-1, (a.heads, -1)).transpose(1, 2)

    norm, gate = norm_and_gate(module)
    out = part(module, a.out)
    try:
        additive = None if bias is None else bias(module)
        for trial in trials:
            mask = additive if trial.mask is None else trial.mask if additive is None else additive + trial.mask
            o = F.scaled_dot_product_attention(project(a.q), project(a.k), project(a.v), attn_mask=mask, scale=a.scale)
            o = o.transpose(1, 2).flatten(2)
            o = norm(o) if norm is not None else o
            o = o * gate(x).sigmoid() if gate is not None else o
            expected = F.linear(o, out.weight, out.bias)
            y = module(x, **trial.keywords)
            if not isinstance(y, Tensor) or y.shape != expected.shape:
                return False
            if (y - expected).abs().max() > TOLERANCE * (1 + expected.abs().max()):
                return False
    except Exception:  # whatever a stranger's forward makes of these arguments, it is not plain attention
        return False
    return True


def attention_dropout(module: nn.Module) -> float:
    """The largest dropout of a module that may act on attention weights: a module with ``p`` or a number."""
    children = [(n, getattr(m, "p", None)) for n, m in module.named_children()]
    found = [
        p for n, p in (*children, *vars(module).items()) if "drop" in n and not any(o in n for o in _OTHER_DROPOUTS)
    ]
    return max((p for p in found if isinstance(p, float)), default=0.0)

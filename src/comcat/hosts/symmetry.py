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

from ..sites import Attention, Host, Projection, part
from .mounting import drop_hooks

TOLERANCE = 1e-5
"""Relative.

A broken symmetry moves the output by its own size; some hosts take the softmax in float32 whatever comes in.
"""


Bias = Callable[[nn.Module], Tensor | None]


@dataclass(frozen=True)
class Symmetry:
    """What the probe found: which products exist, whether values pass with weights that sum to one, and whether the
    output is plain softmax attention.
    """

    qk: bool
    vo: bool
    rows_sum_to_one: bool
    plain: bool


@dataclass(frozen=True)
class Trial:
    """Arguments of a forward besides the tokens, and the mask on the logits (boolean or additive) that they should
    amount to.
    """

    keywords: Mapping[str, Any]
    mask: Tensor | None


def probe(
    host: Host,
    module: nn.Module,
    attention: Attention,
    tokens: int,
    bias: Bias | None = None,
    trials: Sequence[Trial] = (Trial({}, None),),
) -> Symmetry:
    """Probe one attention module. ``attention``'s paths are read relative to ``module``.

    Args:
        tokens: how many tokens to feed (a window's area where a position bias fixes it).
        bias: returns the additive bias that a module itself puts on its logits, for the comparison with plain
            attention.
        trials: the ways of calling the module in which it must match plain attention to count as such.
    """
    generator = torch.Generator().manual_seed(0)
    copied = random_copy(module, generator)
    with torch.no_grad():
        x = torch.randn(2, tokens, attention.in_features, generator=generator, dtype=torch.float64)
        plain = _matches_plain_attention(copied, attention, x, bias, trials)
        before = host.probe(copied, attention, x)
        rotate = torch.randn(
            attention.heads, attention.width, attention.width, generator=generator, dtype=torch.float64
        )
        rotate = rotate / attention.width**0.5 + torch.eye(attention.width, dtype=torch.float64)
        inverse_t = torch.linalg.inv(rotate).mT

        def unchanged(after: Tensor, expected: Tensor = before) -> bool:
            return bool((after - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()))

        def answers_for_itself(other: nn.Module) -> None:
            """One factor alone must change the output: a forward that is bound to another object's weights shows every
            symmetry.
            """
            if unchanged(host.probe(other, attention, x)):
                raise RuntimeError("a copy of it does not compute with its own weights")

        qk_copy = copy.deepcopy(copied)
        _transform_rows(qk_copy, attention.q, attention.heads, rotate)
        answers_for_itself(qk_copy)
        _transform_rows(qk_copy, attention.k, attention.heads, inverse_t)
        qk = unchanged(host.probe(qk_copy, attention, x))
        shift = torch.randn(attention.heads * attention.width, generator=generator, dtype=torch.float64)
        if qk and _shift_bias(qk_copy, attention.k, shift):
            qk = unchanged(host.probe(qk_copy, attention, x))

        vo_copy = copy.deepcopy(copied)
        _transform_rows(vo_copy, attention.v, attention.heads, rotate)
        answers_for_itself(vo_copy)
        out = part(vo_copy, attention.out)
        w = out.weight.unflatten(1, (attention.heads, attention.width))  # (out, heads, width)
        out.weight.copy_(torch.einsum("ohw,hwv->ohv", w, inverse_t).flatten(1))
        vo = unchanged(host.probe(vo_copy, attention, x))
        sums = False
        if vo:
            if _shift_bias(copied, attention.v, shift):
                moved = host.probe(copied, attention, x)
                sums = unchanged(moved, before + shift @ part(copied, attention.out).weight.mT)
            else:  # no value bias to shift and none to fold
                sums = True
    return Symmetry(qk, vo, sums, plain)


def read_past(host: Host, module: nn.Module, attention: Attention, tokens: int) -> str | None:
    """The first projection that a forward does not call, if any: then it computes with weights that it reads itself."""
    generator = torch.Generator().manual_seed(0)
    copied, called = random_copy(module, generator), set[str]()
    paths = dict.fromkeys((attention.q.path, attention.k.path, attention.v.path, attention.out))
    for path in paths:
        copied.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: called.add(path))
    with torch.no_grad():
        host.probe(copied, attention, torch.randn(2, tokens, attention.in_features, dtype=torch.float64))
    return next((path for path in paths if path not in called), None)


def random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode with random weights in float64, on the CPU, that calls no one's hooks."""
    copied = copy.deepcopy(module).to("cpu", torch.float64).eval()
    drop_hooks(copied)
    with torch.no_grad():
        for p in copied.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)
            )
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


def _matches_plain_attention(
    module: nn.Module, a: Attention, x: Tensor, bias: Bias | None, trials: Sequence[Trial]
) -> bool:
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
    """The dropout on attention weights, by the names that libraries give it: a module with ``p`` or a number."""
    for name in ("attn_drop", "attention_dropout", "dropout"):
        found = getattr(module, name, None)
        p = getattr(found, "p", found)
        if isinstance(p, float):
            return p
    return 0.0


def trial_failed(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:120]
    return f"a trial call on tokens alone failed ({type(error).__name__}: {line})"

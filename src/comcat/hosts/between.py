"""What stands between the two factors of a product that does not exist, found by trials rather than by names.

A part of the module stands between them where the product exists once the part does nothing. All trials run on a copy
with random weights (see ``symmetry``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..sites import Attention, Projection, is_within, part
from .calls import Call
from .structures import below, is_layer, is_strided
from .symmetry import TOLERANCE, probe

SUMMED = "queries and keys are sums of what several layers make, which comcat does not stand in for"
COARSE = "a projection passes over positions, which comcat does not stand in for"
EACH = "every head has a layer of its own, which comcat does not stand in for"


def not_carried(module: nn.Module, *projections: Projection) -> str | None:
    """Why a product that exists cannot be carried by what takes the layers' place, or None."""
    if any(is_strided(part(module, p.path)) for p in projections):
        return COARSE
    first = projections[0].path
    return EACH if first.endswith(".0") and isinstance(below(module, first[:-2]), nn.ModuleList) else None


def between_qk(copied: nn.Module, a: Attention, calls: Sequence[Call]) -> str:
    """What stands between W_Q and W_K.

    A softmax over keys that are all zero does not depend on queries, unless these meet something else there.
    """
    if (found := _obstacle(copied, a, calls, "qk")) is not None:
        return f"{found} sits between W_Q and W_K"
    keyless = copy.deepcopy(copied)
    _scale_(keyless, a.k, 0)
    if _moves(keyless, a.q, calls):
        holder = below(keyless, a.q.path.rpartition(".")[0])
        kept = [part(keyless, path) for path in (a.q.path, a.v.path, a.out)]
        for layer in holder.modules():
            if is_layer(layer) and not any(layer in around.modules() for around in kept):
                for p in layer.parameters():
                    p.detach().zero_()
        return "relative positions are computed from q" if _moves(keyless, a.q, calls) else SUMMED
    return "its output depends on more of W_Q and W_K than their product"


def between_vo(copied: nn.Module, a: Attention, calls: Sequence[Call]) -> str:
    """What stands between W_V and W_O."""
    if (found := _obstacle(copied, a, calls, "vo")) is not None:
        return f"{found} sits between W_V and W_O"
    if not _is_affine(copied, a.v, calls):
        return "something that is not linear (an activation, a norm, a softmax) sits between W_V and W_O"
    return "its output depends on more of W_V and W_O than their product"


def _obstacle(copied: nn.Module, a: Attention, calls: Sequence[Call], kind: str) -> str | None:
    """The path and class of the part without which a product exists."""
    for path in _candidates(copied, a, kind):
        other = copy.deepcopy(copied)
        owner, _, name = path.rpartition(".")
        setattr(other.get_submodule(owner), name, nn.Identity())
        try:
            if getattr(probe(other, a, calls), kind):
                return f"{path} ({type(part(copied, path)).__name__})"
        except Exception:  # whatever a stranger's forward makes of it, or nothing depends on the factors any more
            continue
    return None


def _candidates(copied: nn.Module, a: Attention, kind: str) -> list[str]:
    """Paths of what is beside the projections of queries and keys, or defined between those of values and the output's,
    and holds none of them.
    """
    factors = {a.q.path, a.k.path, a.v.path, a.out}
    named = dict(copied.named_modules())
    paths = [p for p, m in named.items() if not isinstance(m, nn.Identity) and not is_layer(m)]
    around = a.q.path.rpartition(".")[0]
    if isinstance(named[around], nn.ModuleList):
        around = around.rpartition(".")[0]
    if kind == "qk":
        paths = [p for p in paths if not around or is_within(p, around)]
    else:
        order = list(named)
        after = order[order.index(a.v.path) : order.index(a.out)]
        paths = [p for p in paths if not around or is_within(p, around) or p in after]
    return [p for p in paths if p and not any(is_within(f, p) or is_within(p, f) for f in factors)]


@torch.no_grad()
def _scale_(module: nn.Module, p: Projection, factor: float) -> None:
    bias = p.bias_or_none(module)
    p.write_(module, p.weight(module) * factor, None if bias is None else bias * factor)


@torch.no_grad()
def _moves(module: nn.Module, p: Projection, calls: Sequence[Call]) -> bool:
    """Whether another projection changes what comes out."""
    other = copy.deepcopy(module)
    _scale_(other, p, -2)
    return not all(_close(call(other), call(module)) for call in calls)


@torch.no_grad()
def _is_affine(module: nn.Module, p: Projection, calls: Sequence[Call]) -> bool:
    """Whether what comes out is affine in a projection, as far as three multiples of it show."""
    outputs = []
    for factor in (0, 1, 2):
        other = copy.deepcopy(module)
        _scale_(other, p, factor)
        outputs.append([call(other) for call in calls])
    return all(_close(second - first, first - zero) for zero, first, second in zip(*outputs, strict=True))


def _close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()))

"""How a weight is seen as a tensor, which ranks it may have, and what it then costs.

A *shape* is how a weight (out, in) is seen as a tensor, and its ranks, all of it JSON:
``{"out": [o_1, …], "in": [i_1, …], "ranks": […]}`` with ``o_1 · o_2 ⋯ = out`` and ``i_1 · i_2 ⋯ = in``; features are
numbered row-major over their modes, as ``Tensor.view`` does.

- ``"tucker"``: the tensor (o_1, …, i_1, …), one rank a mode, those of ``out`` first. One mode a side is the weight
  itself, ``U1 G U2ᵀ``.
- ``"tensor_train"``: as many modes in as out; mode k of the train is the pair (o_k, i_k), and the ranks are
  those of the bonds between pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError, counted, nearest

FORMS = ("tucker", "tensor_train")


def check_shape(form: str, shape: Any, in_features: int, out_features: int) -> None:
    """Raise PlanError where a shape is malformed, does not make up (out, in), or holds too large a rank."""
    if form not in FORMS:
        raise PlanError(f"got form {form!r}, expected one of {', '.join(FORMS)}{nearest(form, FORMS)}")
    keys = ("out", "in", "ranks")
    if not isinstance(shape, Mapping) or set(shape) != set(keys):
        raise PlanError(f"{form}: got shape {shape!r}, expected an object with 'out', 'in' and 'ranks'")
    for key in keys:
        if not isinstance(shape[key], list | tuple) or not all(type(n) is int and n >= 1 for n in shape[key]):
            raise PlanError(f"{form}: got {key} {shape[key]!r}, expected whole numbers from 1 on")
    for key, features in (("out", out_features), ("in", in_features)):
        if not shape[key] or math.prod(shape[key]) != features:
            raise PlanError(f"{form}: got {key} {list(shape[key])}, expected modes whose product is {features}")
    limits = _tucker_limits(shape) if form == "tucker" else _train_limits(shape)
    if len(shape["ranks"]) != len(limits):
        raise PlanError(f"{form}: got {counted(len(shape['ranks']), 'rank')}, expected {len(limits)}")
    for k, (rank, limit) in enumerate(zip(shape["ranks"], limits, strict=True)):
        if rank > limit:
            raise PlanError(f"{form}: got ranks {list(shape['ranks'])}, expected 1 to {limit} for number {k + 1}")


def shape_parameters(form: str, shape: Mapping[str, Any]) -> int:
    """Parameters of a weight in a form, without the bias; the shape must have passed :func:`check_shape`."""
    out, into, ranks = shape["out"], shape["in"], shape["ranks"]
    if form == "tucker":
        return math.prod(ranks) + sum(n * r for n, r in zip([*out, *into], ranks, strict=True))
    bonds = [1, *ranks, 1]
    return sum(o * i * bonds[k] * bonds[k + 1] for k, (o, i) in enumerate(zip(out, into, strict=True)))


def shape_macs(form: str, shape: Mapping[str, Any]) -> int:
    """Multiply-accumulates a row of a weight in a form, contracted as the modules do it."""
    out, into, ranks = list(shape["out"]), list(shape["in"]), list(shape["ranks"])
    if form == "tucker":
        thin_out, thin_in = ranks[: len(out)], ranks[len(out) :]
        core = math.prod(ranks)
        return core + _along_modes_macs(into, thin_in) + _along_modes_macs(thin_out, out)
    bonds = [1, *ranks, 1]
    return sum(math.prod(out[: k + 1]) * bonds[k] * bonds[k + 1] * math.prod(into[k:]) for k in range(len(out)))


def _along_modes_macs(before: Sequence[int], after: Sequence[int]) -> int:
    """Of taking each mode of a row from one size to another, the last mode first."""
    sizes, total = list(before), 0
    for k in reversed(range(len(sizes))):
        total += after[k] * math.prod(sizes)
        sizes[k] = after[k]
    return total


def _tucker_limits(shape: Mapping[str, Any]) -> list[int]:
    """A mode's rank is at most its size, and at most the product of the others, for no unfolding is wider."""
    modes, ranks = [*shape["out"], *shape["in"]], shape["ranks"]
    if len(ranks) != len(modes):
        return modes
    others = [math.prod(ranks[:k]) * math.prod(ranks[k + 1 :]) for k in range(len(ranks))]
    return [min(mode, other) for mode, other in zip(modes, others, strict=True)]


def _train_limits(shape: Mapping[str, Any]) -> list[int]:
    """A bond's rank is at most what the core on either side can carry: its pair's size times its other rank."""
    if len(shape["out"]) != len(shape["in"]):
        raise PlanError(
            f"tensor_train: got out {list(shape['out'])} and in {list(shape['in'])}, expected as many modes of each"
        )
    sizes = [o * i for o, i in zip(shape["out"], shape["in"], strict=True)]
    bonds = [1, *shape["ranks"], 1]
    if len(bonds) != len(sizes) + 1:
        return sizes[1:]
    return [min(bonds[k] * sizes[k], bonds[k + 2] * sizes[k + 1]) for k in range(len(sizes) - 1)]

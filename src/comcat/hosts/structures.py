"""How attention is written in other people's modules: the names of its layers, and how rows lie in a fused one.

**To add a structure, add its names here**: a line in ``FUSED``, ``PAIRS``, ``TRIPLES`` or ``OUT``. Names are where to
look. That what is found is attention, and which of the possible layouts a fused layer has, is proven by a trial (see
``symmetry``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..sites import Projection, is_pointwise

FUSED = ("qkv", "to_qkv", "qkv_proj", "query_key_value", "in_proj", "Wqkv", "c_attn", "qkv_layer")
"""One layer that makes queries, keys and values."""

PAIRS = (("qk", "v"), ("q", "kv"), ("to_q", "to_kv"), ("q_proj", "kv_proj"), ("query", "key_value"), ("wq", "wkv"))
"""One layer for queries, one for keys and values; or one for queries and keys, one for values."""

TRIPLES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
    ("W_q", "W_k", "W_v"), ("linear_q", "linear_k", "linear_v"), ("queries", "keys", "values"),
)  # fmt: skip
"""A layer each."""

OUT = (
    "proj", "out_proj", "o_proj", "output.dense", "projection", "projection_layer", "to_out", "to_out.0", "wo",
    "c_proj", "attn_out_proj", "merge", "out", "o", "out_lin", "dense", "linear_out", "output_proj", "wo.0",
    "output", "W_o",
)  # fmt: skip
"""The layer that reads the heads' outputs: in the module itself or beside what holds the projections."""

INNER = ("", "self", "attention", "attn", "self_attention", "attention.self", "attention.attention")
"""Where the projections may be within the module."""

HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "n_head", "nheads", "num_head", "nhead")
WIDTHS = ("head_dim", "attention_head_size", "dim_head", "head_size", "dim_per_head", "key_dim", "d_k", "d_head")


@dataclass(frozen=True)
class Structure:
    """One reading of a module as attention; paths are relative to it. ``holder`` has the projections."""

    holder: str
    q: Projection
    k: Projection
    v: Projection
    out: str
    heads: int

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.q.count // self.heads


def projections_of(holder: nn.Module | None) -> tuple[str, ...] | None:
    """The names of the layers that make queries, keys and values: one, two or three."""
    if holder is None:
        return None
    for names in (*((n,) for n in FUSED), *PAIRS, *TRIPLES):
        if all(is_layer(below(holder, n)) for n in names):
            return names
    return None


def resembles(module: nn.Module) -> bool:
    """Whether a module has the layers of an attention."""
    return next(places(module), None) is not None


def structures(module: nn.Module) -> Iterator[Structure]:
    """Every reading of a module as attention, the likeliest first."""
    for inner, names, out in places(module):
        holder = below(module, inner)
        width = rows_in(below(module, out))
        for heads in _numbers_of_heads(holder, module, width):
            for q, k, v in _layouts(holder, names, inner, width, heads):
                yield Structure(inner, q, k, v, out, heads)


def is_layer(module: Any) -> bool:
    """Whether a module is a linear layer, if only over positions."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def rows_in(layer: Any) -> int:
    """Channels that a layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def rows_out(layer: Any) -> int:
    """Channels that a layer puts out."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def below(module: Any, path: str) -> Any:
    """The module at a path below another (``""`` is itself), or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None) if not name.isdigit() else _child(module, name)
        if not isinstance(module, nn.Module):
            return None
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def places(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Path of what holds the projections, their names, and the path of the output layer."""
    for inner in INNER:
        holder = below(module, inner)
        names = projections_of(holder)
        if names is None:
            continue
        own = [f"{inner}.{o}" if inner else o for o in OUT]
        if inner and any(is_layer(below(module, o)) for o in own):
            return  # an attention of its own, below this module
        for out in own if not inner else OUT:
            layer = below(module, out)
            if is_layer(layer) and out not in names and rows_in(layer) == _width_of_values(holder, names, layer):
                yield inner, names, out
                return


def _width_of_values(holder: nn.Module, names: tuple[str, ...], out: nn.Module) -> int | None:
    """Channels of all heads' values, if the layers could be an attention with this output."""
    width, made = rows_in(out), [rows_out(below(holder, name)) for name in names]
    if len(names) == 3:
        return width if width in (made[0], made[2]) else None  # grouped queries have fewer keys and values
    if len(names) == 2:
        return width if made[1] in (width, 2 * width) else None
    return width if made[0] > width else None  # other rows may lie in the same layer


def _numbers_of_heads(holder: nn.Module, module: nn.Module, width: int) -> list[int]:
    """Numbers of heads by what the modules say, or all that are possible, few first."""
    for owner in (holder, module, getattr(holder, "config", None)):
        for name in HEADS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                return [heads] if width % heads == 0 else []
    for name in WIDTHS:
        one = getattr(holder, name, None)
        if isinstance(one, int) and one > 0 and width % one == 0:
            return [width // one]
    return [h for h in (1, 2, 3, 4, 6, 8, 12, 16) if width % h == 0 and h < width]


def _layouts(
    holder: nn.Module, names: tuple[str, ...], inner: str, width: int, heads: int
) -> Iterator[tuple[Projection, Projection, Projection]]:
    """How the rows of queries, keys and values may lie in their layers."""
    paths = [f"{inner}.{n}" if inner else n for n in names]
    if len(names) == 3:
        q, k, v = (Projection(path, 0, rows_out(below(holder, n))) for path, n in zip(paths, names, strict=True))
        yield q, k, v
        return
    if names == ("qk", "v"):
        yield Projection(paths[0], 0, width), Projection(paths[0], width, 2 * width), Projection(paths[1], 0, width)
        return
    fused, share = below(holder, names[-1]), 3 if len(names) == 1 else 2
    one = width // heads
    total = rows_out(fused)
    apart = [f"{inner}.{x}_bias" if inner else f"{x}_bias" for x in "qkv"]
    own_biases = share == 3 and getattr(holder, "q_bias", None) is not None
    for start in dict.fromkeys((0, total - share * width)) if total >= share * width else ():
        found = [
            Projection(paths[-1], start + i * width, start + (i + 1) * width, apart[i] if own_biases else None)
            for i in range(share)
        ]
        if share == 3:
            yield found[0], found[1], found[2]
        else:
            yield Projection(paths[0], 0, rows_out(below(holder, names[0]))), found[0], found[1]
    if total == share * width and heads > 1 and not own_biases:
        step = share * one
        found = [Projection(paths[-1], i * one, (i + 1) * one, heads=heads, step=step) for i in range(share)]
        first = [] if share == 3 else [Projection(paths[0], 0, rows_out(below(holder, names[0])))]
        q, k, v = (*first, *found)
        yield q, k, v

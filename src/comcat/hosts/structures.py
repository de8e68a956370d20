"""How attention is written in other people's modules: the names of its layers, and how rows lie in a fused one.

**To add a structure, add its names here**: a line in ``FUSED``, ``PAIRS``, ``TRIPLES`` or ``OUT``. Names are where to
look. That what is found is attention, and which of the possible layouts a fused layer has, is proven by a trial (see
``symmetry``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..sites import Projection, dense_in, is_pointwise

FUSED = (
    "qkv", "to_qkv", "qkv_proj", "query_key_value", "in_proj", "Wqkv", "c_attn", "qkv_layer", "pwise",
    "queries_keys_values", "qkv.conv", "qkv_proj.convolution", "qkvs.0",
)  # fmt: skip
"""One layer that makes queries, keys and values; ``qkvs.0`` is that of the first head, where each has its own."""

EACH_HEAD = ("qkvs.0",)
PAIRS = (
    ("qk", "v"), ("q", "kv"), ("to_q", "to_kv"), ("q_proj", "kv_proj"), ("query", "key_value"), ("wq", "wkv"),
    ("q.ln", "kv"), ("queries", "keys_values"), ("attn", "v"), ("attention_weights", "value_proj"),
    ("to_query", "to_key"),
)  # fmt: skip
"""One layer for queries, one for keys and values; or one for queries and keys (or for weights), one for values.

As many keys as the output layer reads are values as well.
"""

WEIGHTS = ("attn", "attention_weights")
"""A layer that makes the weights of attention by itself, so that VO is the only product."""

GIVEN = (("k_proj", "v_proj"),)
"""A layer for keys and one for values, where queries are given: VO is the only product."""

TRIPLES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
    ("W_q", "W_k", "W_v"), ("q.proj", "k", "v"), ("query.proj", "key.proj", "value.proj"),
    ("projection_query", "projection_key", "projection_value"), ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
    ("linear_q", "linear_k", "linear_v"), ("queries", "keys", "values"), ("q", "k", "v_gate"),
    ("q_content_proj", "k_content_proj", "v_proj"),
)  # fmt: skip
"""A layer each; that of the values may put out as many gates behind them."""

OUT = (
    "proj", "out_proj", "o_proj", "output.dense", "projection", "projection_layer", "to_out", "to_out.0", "wo",
    "c_proj", "attn_out_proj", "merge", "out", "o", "out_lin", "dense", "linear_out", "output_proj", "wo.0",
    "output", "W_o", "output.proj", "upsampling", "conv3_1x1",
)  # fmt: skip
"""The layer that reads the heads' outputs: in the module itself or beside what holds the projections."""

INNER = ("", "self", "attention", "attn", "self_attention", "attention.self", "attention.attention", "self_attn")
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
    for names in (*((n,) for n in FUSED), *PAIRS, *TRIPLES, *GIVEN):
        if all(is_layer(below(holder, n)) or is_strided(below(holder, n)) for n in names):
            return names
    return None


def resembles(module: nn.Module) -> bool:
    """Whether a module has the layers of an attention."""
    return next(places(module), None) is not None


def structures(module: nn.Module) -> Iterator[Structure]:
    """Every reading of a module as attention, the likeliest first."""
    for inner, names, out in places(module):
        holder = below(module, inner)
        width = _width_of_values(holder, names, below(module, out))
        if width is None:
            continue
        partly = width != rows_in(below(module, out))
        for heads in [1] if names == EACH_HEAD else _numbers_of_heads(holder, module, width):
            for q, k, v in _layouts(holder, names, inner, width, heads, partly):
                yield Structure(inner, q, k, v, out, heads)


def is_layer(module: Any) -> bool:
    """Whether a module is a linear layer, if only over positions, or one with its batch norm."""
    return dense_in(module) is not None


def is_strided(module: Any) -> bool:
    """Whether a module is a linear layer over every second position, or fewer: such a one is read and never changed."""
    return type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1 and module.stride != (1, 1)


def rows_in(layer: Any) -> int:
    """Channels that a layer reads."""
    layer = dense_in(layer) or layer
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def rows_out(layer: Any) -> int:
    """Channels that a layer puts out."""
    layer = dense_in(layer) or layer
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _reads_channels(module: nn.Module) -> bool:
    transposed = isinstance(module, nn.ConvTranspose2d) and module.groups == 1
    return transposed or isinstance(module, nn.Linear) or is_pointwise(module)


def reader_in(module: Any, path: str) -> str | None:
    """The path of the only layer over channels that is at a path or below it, a transposed convolution at the worst.

    An activation or a norm may be beside it.
    """
    found = below(module, path)
    layers = [] if found is None else [n for n, m in found.named_modules() if _reads_channels(m)]
    return ".".join(filter(None, (path, layers[0]))) if len(layers) == 1 else None


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
        around = inner.rpartition(".")[0]
        if inner and any(reader_in(module, o) for o in own):
            return  # an attention of its own, below this module
        if around and next(places(below(module, around)), None) is not None:
            return
        for name in own if not inner else OUT:
            out = reader_in(module, name)
            if out is None or name in names:
                continue
            layer = below(module, out)
            if _width_of_values(holder, names, layer) is not None:
                yield inner, names, out
                return


def _width_of_values(holder: nn.Module, names: tuple[str, ...], out: nn.Module) -> int | None:
    """Channels of all heads' values, if the layers could be an attention with this output."""
    width, made = rows_in(out), [rows_out(below(holder, name)) for name in names]
    if len(names) == 3:
        return width if width in (made[0], made[2], made[2] / 2) else None  # grouped queries: fewer keys and values
    if len(names) == 2:
        return width if made[1] in (width, 2 * width, made[0] + width) else None
    if names == EACH_HEAD:
        return width // len(list(below(holder, "qkvs").children()))
    read = rows_in(below(holder, names[0]))
    part_of_it = read < width and (made[0] == 3 * read or (read < made[0] <= width and (made[0] - read) % 2 == 0))
    if part_of_it:  # values are as wide as what they are made from, and the output layer reads more besides
        return read
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
    holder: nn.Module, names: tuple[str, ...], inner: str, width: int, heads: int, partly: bool
) -> Iterator[tuple[Projection, Projection, Projection]]:
    """How the rows of queries, keys and values may lie in their layers."""
    paths = [f"{inner}.{n}" if inner else n for n in names]
    made = [rows_out(below(holder, n)) for n in names]
    if len(names) == 3:
        made[2] = width if made[2] == 2 * width else made[2]  # gates lie behind the values
        q, k, v = (Projection(path, 0, rows) for path, rows in zip(paths, made, strict=True))
        yield q, k, v
    elif names[0] in WEIGHTS or names in GIVEN:
        keys = Projection(paths[0], 0, made[0])
        yield keys, keys, Projection(paths[1], 0, width)
    elif names == ("qk", "v"):
        half = made[0] // 2
        yield Projection(paths[0], 0, half), Projection(paths[0], half, 2 * half), Projection(paths[1], 0, width)
    elif len(names) == 2 and made == [width, width]:
        keys = Projection(paths[1], 0, width)  # which are the values as well
        yield Projection(paths[0], 0, width), keys, keys
    elif len(names) == 2:
        for k, v in _side_by_side(paths[1], made[1], (made[1] - width, width), heads):
            yield Projection(paths[0], 0, made[0]), k, v
    else:
        apart = [f"{inner}.{x}_bias" if inner else f"{x}_bias" for x in "qkv"]
        biases = apart if getattr(holder, "q_bias", None) is not None else None
        given = made[0] == 2 * width and not partly
        for k, v in _side_by_side(paths[0], made[0], (width, width), heads) if given else ():
            yield k, k, v  # queries are given to it: VO alone is a product of its own
        narrow = (made[0] - width) // 2  # queries and keys may be narrower than values, or wider
        for sizes in dict.fromkeys((*(() if partly else [(width,) * 3]), (narrow, narrow, width))):
            for q, k, v in _side_by_side(paths[0], made[0], sizes, heads, biases):
                yield q, k, v


def _side_by_side(
    path: str, rows: int, sizes: Sequence[int], heads: int, biases: Sequence[str] | None = None
) -> Iterator[list[Projection]]:
    """Projections of some sizes in a layer: one after the other from its start or to its end, or head by head."""
    total = sum(sizes)
    if rows < total or min(sizes) < heads or any(size % heads for size in sizes):
        return
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    for start in dict.fromkeys((0, rows - total)):
        yield [
            Projection(path, start + at, start + at + size, None if biases is None else biases[i])
            for i, (at, size) in enumerate(zip(first, sizes, strict=True))
        ]
    if rows == total and heads > 1 and biases is None:
        yield [
            Projection(path, at // heads, (at + size) // heads, heads=heads, step=total // heads)
            for at, size in zip(first, sizes, strict=True)
        ]

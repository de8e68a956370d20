"""How an attention that comcat has never seen is called on random tokens: by the names in its signature.

**To add an argument, add a line to** ``ARGUMENTS``: what its name looks like, and what may be given for it. An
attention has a product where it has one in every call that works, so what is optional is given and left out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import Attention
from .biased import own_bias
from .structures import below, rows_in

LAYOUTS = ("tokens", "strip", "grid", "one more", "flat", "map")
"""How tokens may lie: (batch, tokens, channels), a grid of one row, a grid, one more token, no batch, a map."""

ROTARY = re.compile("rot|rope|freqs|^position_embeddings$")
"""Optional arguments that may stand between W_Q and W_K; where none can be given, nothing is proven of QK."""


@dataclass(frozen=True)
class Reads:
    """What an attention reads: channels of queries' and of keys' inputs, and tokens on a grid.

    ``width`` is a head's, ``patch`` the pixels of a token's side, where a module asks for the size of the picture.
    ``levels`` are the maps of other tokens that it reads from, with seven tokens in all.
    """

    queries: int
    keys: int
    width: int
    height: int
    across: int
    patch: int = 1
    levels: int = 1

    @property
    def tokens(self) -> int:
        return self.height * self.across

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Height and width of every level."""
        return [*[(1, 1)] * (self.levels - 1), (1, 8 - self.levels)]

    def rows(self, channels: int, seed: int, count: int | None = None) -> Tensor:
        """Random tokens, (2, tokens, channels), the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, count or self.tokens, channels, generator=generator, dtype=torch.float64)


def _rotary(r: Reads) -> list[Any]:
    """Angles that differ by token and turn no channel of V into another's place."""
    angle = torch.linspace(0, 3, r.tokens * r.width, dtype=torch.float64).view(r.tokens, r.width)
    both = (angle.cos(), angle.sin())
    return [both, tuple(t[None] for t in both), torch.cat(both, -1), angle[:, : r.width // 2], r.rows(r.queries, 7)]


def _points(r: Reads) -> list[Any]:
    """Where queries look on every level: places within (0, 1), alone and with the size of a box."""
    at = r.rows(2 * r.levels, 6).sigmoid().unflatten(-1, (r.levels, 2))
    return [at, torch.cat((at, at / 4), -1)]


ARGUMENTS: tuple[tuple[str, Callable[[Reads], list[Any]]], ...] = (
    ("reference_points", _points),
    ("spatial_shapes_list", lambda r: [r.maps]),
    ("spatial_shapes", lambda r: [torch.tensor(r.maps)]),
    ("level_start_index", lambda r: [torch.arange(r.levels)]),
    ("^h$|^height$|^q_h$", lambda r: [r.height]),
    ("^w$|^width$|^q_w$", lambda r: [r.across]),
    ("cu_seqlens|cu_window", lambda r: [torch.tensor([0, r.tokens], dtype=torch.int32)]),
    ("grid_thw|grid_hw", lambda r: [torch.tensor([[1, r.height, r.across]])]),
    ("max_seqlen", lambda r: [r.tokens]),
    ("size|shape|resolution", lambda r: [
        (r.height, r.across), [r.height, r.across], (r.height * r.patch, r.across * r.patch)]),
    ("mask|bias|past|cache", lambda r: [None]),
    ("^output_|^use_|^is_|^return_", lambda r: [False]),
    ("^cos$", lambda r: [_rotary(r)[0][0]]),
    ("^sin$", lambda r: [_rotary(r)[0][1]]),
    ("_cos$", lambda r: [_rotary(r)[0][0][None]]),
    ("_sin$", lambda r: [_rotary(r)[0][1][None]]),
    ("rot|rope|freqs|^position_embeddings$|^pos_emb", _rotary),
    ("pos|object_queries", lambda r: [r.rows(r.queries, 5), r.rows(r.keys, 5), r.rows(r.keys, 5, 7)]),
    ("encoder|key|value|context|memory|^kv$|^y$|cross|source|current",
        lambda r: [r.rows(r.keys, 3, 7), r.rows(r.keys, 3)]),
    ("query|^q$|^x_q$|latent|q_global", lambda r: [r.rows(r.queries, 4)]),
)  # fmt: skip


def reads_of(module: nn.Module, a: Attention) -> Iterator[Reads]:
    """What a module may read, the likeliest first."""
    q, k = (p.weight(module).shape[1] for p in (a.q, a.k))
    holder = below(module, a.q.path.rpartition(".")[0])
    patch = getattr(getattr(holder, "config", None), "patch_size", None)
    patch = patch if isinstance(patch, int) else 1
    levels = getattr(holder, "n_levels", getattr(holder, "num_levels", 1))
    levels = levels if isinstance(levels, int) and 0 < levels < 8 else 1
    first = next(rows_in(m) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    pairs = [(q, k), (k, k)]  # the latter where a module makes the queries itself
    pairs += [(n, n) for n in (a.out_features, first)]  # projections may read a part of it, or what is made of it
    for height, across in dict.fromkeys(_grids(module, a)):
        for queries, keys in dict.fromkeys(pairs):
            yield Reads(queries, keys, a.width, height, across, patch, levels)


def _grids(module: nn.Module, a: Attention) -> Iterator[tuple[int, int]]:
    holder = below(module, a.q.path.rpartition(".")[0])
    for owner in (module, holder):
        bias = getattr(owner, "relative_position_bias", None)
        area = getattr(bias, "window_area", None)
        index = getattr(owner, "relative_position_index", None)
        if isinstance(index, Tensor) and index.ndim == 2:
            area = index.shape[0]
        if isinstance(area, int):
            yield 1, area
        for name in ("window_size", "resolution", "input_resolution", "feat_size", "grid_size", "patches_resolution"):
            size = getattr(owner, name, None)
            size = (size, size) if isinstance(size, int) else size
            if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
                yield size[0], size[1]
    with torch.no_grad():
        bias = own_bias(module)
    if bias is not None:
        yield 1, bias.shape[-1]
    for child in holder.children():
        height, across = getattr(child, "height", None), getattr(child, "width", None)
        if isinstance(height, int) and isinstance(across, int) and 0 < height * across < 10**4:
            yield height, across
    tables = [t for t in (*holder.parameters(), *holder.buffers()) if t.ndim >= 2 and t.shape[-1] == t.shape[-2] > 1]
    yield from ((1, t.shape[-1]) for t in tables[:2])
    yield from ((1, 5), (4, 4), (7, 7), (16, 16), (2, 2))


Call = Callable[[nn.Module], Tensor]


class Uncallable(Exception):
    """No call with tokens works."""


def calls_of(module: nn.Module, reads: Sequence[Reads]) -> tuple[list[Call], bool]:
    """Ways to call a module that work, and whether one is missing that could stand between W_Q and W_K.

    Args:
        module: in evaluation mode, float64, on the CPU. reads: what it may read, tried in this order.

    Raises:
        Uncallable: where no call works.
    """
    names = inspect.signature(module.forward).parameters
    plain = [p for p in names.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)]
    required = [p.name for p in plain[1:] if p.default is p.empty]
    optional = [p.name for p in plain[1:] if p.default is not p.empty]
    for r in reads:
        for layout in LAYOUTS:
            for given in _choices(required, r):
                call = _call(r, layout, given)
                if _works(call, module):
                    return _with_optional(module, r, layout, given, optional, call)
        first = next(_choices(required, r))
        for name in optional:  # one that says it is optional and cannot do without
            for layout in LAYOUTS:
                for value in _values(name, r):
                    given = {**first, name: value}
                    if value is not None and _works(call := _call(r, layout, given), module):
                        return _with_optional(module, r, layout, given, optional, call)
        given = {name: value for name in (*required, *optional) for value in _values(name, r)[:1]}
        given = {n: v for n, v in given.items() if n in required or (v is not None and not ROTARY.search(n))}
        if _works(call := _call(r, "tokens", given), module):  # where one optional argument wants another
            return _with_optional(module, r, "tokens", given, optional, call)
    raise Uncallable


def _with_optional(
    module: nn.Module, r: Reads, layout: str, given: Mapping[str, Any], optional: Sequence[str], call: Call
) -> tuple[list[Call], bool]:
    found, missing = [call], False
    for name in optional:
        if name in given or "mask" in name:
            continue
        values = [v for v in _values(name, r) if isinstance(v, (Tensor, tuple))]
        more = [_call(r, layout, {**given, name: value}) for value in values]
        working = next((c for c in more if _works(c, module)), None)
        if working is not None:
            found.append(working)
        elif ROTARY.search(name):
            missing = True
    return found, missing


def _values(name: str, r: Reads) -> list[Any]:
    return next((make(r) for pattern, make in ARGUMENTS if re.search(pattern, name.lower())), [None])


def _choices(names: Sequence[str], r: Reads) -> Iterator[dict[str, Any]]:
    """Values for all required arguments: the first of each, then the others of each in turn."""
    values = {name: _values(name, r) for name in names}
    first = {name: found[0] for name, found in values.items()}
    yield first
    yield from ({**first, name: v} for name, found in values.items() for v in found[1:])


def _call(r: Reads, layout: str, given: Mapping[str, Any]) -> Call:
    def call(module: nn.Module) -> Tensor:
        x = r.rows(r.queries, 0, r.tokens + 1 if layout == "one more" else None)
        if layout == "strip":
            x = x[:, None]  # (batch, 1, tokens, channels)
        elif layout == "grid":
            x = x.unflatten(1, (r.height, r.across))
        elif layout == "flat":
            x = x[0]
        elif layout == "map":
            x = x.mT.unflatten(-1, (r.height, r.across))
        y = module(x, **given)
        while isinstance(y, (tuple, list)):
            y = y[0]
        if not isinstance(y, Tensor):
            raise TypeError("no tensor comes out")
        return y.movedim(1, -1) if layout == "map" and y.ndim == 4 else y

    return call


def _works(call: Call, module: nn.Module) -> bool:
    try:
        with torch.no_grad():
            return bool(call(module).isfinite().all())
    except Exception:  # whatever a stranger's forward makes of these arguments
        return False

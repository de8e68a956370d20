"""Which linear layers form a feed-forward whose hidden units can be chosen: found by structure, proven by a trial.

One module holds a layer a → h and a layer h → b, or two layers a → h and one h → b (gated; the two of a gate may be one
packed layer a → 2h). A layer is linear, or a 1×1 convolution; batch norms and convolutions of each channel alone may
stand in between. That they are a feed-forward is proven in a copy with random weights: with fewer units, in another
order, the module must give what the whole one gives when the other units are not read. A norm, a softmax or anything
else that lets units see each other breaks this, and so does a forward that reckons with the old width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import HiddenSite, Projection, Refusal, part
from .calls import Reads, Uncallable, calls_of
from .narrowing import acts_on_each, narrowed, per_unit
from .structures import rows_in, rows_out
from .symmetry import TOLERANCE, random_copy


@dataclass(frozen=True)
class _Pair:
    """Layers that fit together by their sizes: one up, two of a gate, or one packed; paths within the module that
    holds them.
    """

    ups: tuple[Projection, ...]
    down: str
    between: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        return (*dict.fromkeys(up.path for up in self.ups), self.down)


def find_feedforwards(
    model: nn.Module, linears: Mapping[str, nn.Module], shared: frozenset[str], structure: Any
) -> Iterator[HiddenSite | Refusal]:
    """The hidden sites among some linear layers, and pairs of layers that look like one but are none, with the reason.

    Args:
        linears: by path, those that may change, 1×1 convolutions among them.
        shared: paths of those that several parts of the model use.
        structure: a function of a module, equal for modules that need to be proven only once.
    """
    proven: dict[tuple, str | None] = {}
    for holder, paths in _companies(linears).items():
        module = part(model, holder)
        for pair in _pairs(holder, {path: linears[path] for path in paths}):
            if not holder and not _is_all(model, pair):
                continue
            name = f"{holder or pair.down}:units"
            pair = replace(pair, between=_between_layers(module, pair))
            key = (structure(module), pair)
            if key not in proven:
                proven[key] = _objection(module, pair)
            if proven[key] is not None and _is_another_thing(module, pair):
                continue
            moved = _moved(pair, holder)
            if tied := next((path for path in moved.layers if path in shared), None):
                yield Refusal(name, f"{tied} is shared with another part of the model")
            elif reason := proven[key]:
                yield Refusal(name, reason)
            else:
                yield _site(model, name, holder, moved)


def _between_layers(module: nn.Module, pair: _Pair) -> tuple[str, ...]:
    """Paths of what acts on each hidden unit alone, and stands between the layers in the order of their definition."""
    hidden = rows_in(part(module, pair.down))
    paths = [path for path, _ in module.named_modules()]
    first, last = paths.index(pair.ups[0].path), paths.index(pair.down)
    return tuple(path for path in paths[first + 1 : last] if acts_on_each(part(module, path), hidden))


def _is_another_thing(module: nn.Module, pair: _Pair) -> bool:
    """Whether layers that fit by their sizes are those of an attention, of a convolutional network, of a list, or
    around other layers.
    """
    name = type(module).__name__.lower()
    if "attention" in name or "attn" in name or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return True
    if any(isinstance(m, nn.Linear) for m in _inside(module, pair)):
        return True
    words = ("mlp", "ffn", "feedforward", "feed_forward", "glu")
    return isinstance(part(module, pair.down), nn.Conv2d) and not any(word in name for word in words)


def _inside(module: nn.Module, pair: _Pair) -> list[nn.Module]:
    """Modules that are defined after a pair's first layer and before its last, and are no part of it."""
    named = dict(module.named_modules())
    paths = list(named)
    first, last = sorted((paths.index(pair.ups[0].path), paths.index(pair.down)))
    return [named[path] for path in paths[first + 1 : last] if path not in pair.layers]


def _companies(linears: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Linear layers by the closest module around each that holds another one, which may be the model itself."""
    holders: dict[str, int] = {}
    for path in linears:
        for holder in _around(path):
            holders[holder] = holders.get(holder, 0) + 1
    together: dict[str, list[str]] = {}
    for path in linears:
        holder = next((h for h in _around(path) if holders[h] > 1), None)
        if holder is not None:
            together.setdefault(holder, []).append(path)
    return together


def _around(path: str) -> Iterator[str]:
    """The modules around a path, the closest first and the model itself last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_all(model: nn.Module, pair: _Pair) -> bool:
    """Whether a model is hardly more than a feed-forward; of any other, layers of different parts have nothing in
    common.
    """
    own = sum(p.numel() for path in pair.layers for p in part(model, path).parameters())
    return 2 * own > sum(p.numel() for p in model.parameters())


def _pairs(holder: str, linears: Mapping[str, nn.Module]) -> Iterator[_Pair]:
    """Pairs that fit by their sizes, each layer in one at most. Up to three layers may stand in any order."""
    names = [path.removeprefix(f"{holder}.") if holder else path for path in linears]
    by_name = dict(zip(names, linears.values(), strict=True))
    orders = [names]
    if len(names) in (2, 3):  # the one that reads the others may stand first
        orders = [[n for n in names if n != down] + [down] for down in reversed(names)]
    for order in orders:
        at, found = 0, False
        while at < len(order):
            pair = next((p for count in (3, 2) if (p := _fit(by_name, order[at : at + count], count))), None)
            if pair is not None:
                yield pair
                found = True
            at += 1 if pair is None else len(pair.layers)
        if found:
            return


def _fit(linears: Mapping[str, nn.Module], names: Sequence[str], count: int) -> _Pair | None:
    if len(names) != count:
        return None
    *ups, down = (linears[name] for name in names)
    if len({isinstance(layer, nn.Conv2d) for layer in (*ups, down)}) > 1:
        return None
    hidden = rows_in(down)
    if len(ups) == 2 and all(rows_out(up) == hidden and rows_in(up) == rows_in(ups[0]) for up in ups):
        return _Pair(tuple(Projection(name, 0, hidden) for name in names[:2]), names[2])
    if len(ups) == 1 and rows_out(ups[0]) == hidden:
        return _Pair((Projection(names[0], 0, hidden),), names[1])
    if len(ups) == 1 and rows_out(ups[0]) == 2 * hidden:
        return _Pair((Projection(names[0], 0, hidden), Projection(names[0], hidden, 2 * hidden)), names[1])
    return None


def _moved(pair: _Pair, holder: str) -> _Pair:
    prefix = f"{holder}." if holder else ""
    ups = tuple(replace(up, path=prefix + up.path) for up in pair.ups)
    return _Pair(ups, prefix + pair.down, tuple(prefix + path for path in pair.between))


def _site(model: nn.Module, name: str, holder: str, pair: _Pair) -> HiddenSite:
    down = part(model, pair.down)
    biased = sum(part(model, up.path).bias is not None for up in pair.ups)
    extra = [per_unit(part(model, path)) for path in pair.between]
    own = biased + sum(parameters for parameters, _ in extra)
    biases = rows_in(down) * own + (0 if down.bias is None else rows_out(down))
    return HiddenSite(
        name,
        holder,
        full=rows_in(down),
        in_features=rows_in(part(model, pair.ups[0].path)),
        out_features=rows_out(down),
        ups=pair.ups,
        down=pair.down,
        biases=biases,
        bias_per_unit=own,
        between=pair.between,
        taps=sum(taps for _, taps in extra),
    )


def _objection(module: nn.Module, pair: _Pair) -> str | None:
    """Why the layers are no feed-forward whose units can be chosen, or None where the trial proves that they are."""
    generator = torch.Generator().manual_seed(0)
    copied = random_copy(module, generator)
    down, first = part(copied, pair.down), part(copied, pair.ups[0].path)
    hidden = rows_in(down)
    if hidden < 2:
        return "it has a single hidden unit"
    kept = torch.randperm(hidden, generator=generator)[: max(1, hidden // 2)]
    with torch.no_grad():
        call = _call(copied, pair, rows_in(first))
        if call is None:
            return "comcat does not know how to call the module that holds its layers"
        whole = call(copied)
        others = torch.ones(hidden, dtype=torch.bool)
        others[kept] = False
        small = narrowed(copied, pair.ups, pair.down, kept, pair.between)
        down.weight[:, others] = 0
        unread = call(copied)
        if torch.equal(whole, unread):
            return "its output does not depend on its hidden units"
        for path, layer in small.items():
            owner, _, name = path.rpartition(".")
            setattr(copied.get_submodule(owner), name, layer)
        try:
            fewer = call(copied)
        except Exception:
            return _between(module, pair) or "its forward reckons with the number of its hidden units"
    if fewer.shape == unread.shape and (fewer - unread).abs().max() <= TOLERANCE * (1 + unread.abs().max()):
        return None
    return _between(module, pair) or "its hidden units depend on each other"


def _between(module: nn.Module, pair: _Pair) -> str | None:
    """A norm over the hidden units, by the shape of its weight."""
    hidden = rows_in(part(module, pair.down))
    for name, inner in module.named_modules():
        weight = getattr(inner, "weight", None)
        if name in pair.between or isinstance(inner, nn.Linear):
            continue
        if isinstance(weight, Tensor) and weight.shape == (hidden,):
            return f"a norm ({name}) sits between its layers"
    return None


def _call(copied: nn.Module, pair: _Pair, channels: int) -> Callable[[nn.Module], Tensor] | None:
    """A way to call the module that works: on tokens, a grid, a map, or its two halves one after the other."""
    x = torch.randn(2, 4, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    try:
        sizes = [channels, *_narrower_norms(copied, channels)]
        return calls_of(copied, [Reads(c, c, c, h, w) for c in sizes for h, w in ((1, 4), (4, 4))])[0][0]
    except Uncallable:
        pass
    try:
        _tensor(_halves(copied, pair, x))
    except Exception:  # whatever a stranger's forward makes of tokens
        return None
    return lambda module: _tensor(_halves(module, pair, x))


def _narrower_norms(module: nn.Module, channels: int) -> list[int]:
    """Channels of norms that a layer's input is several of: neighbours may be joined before it (Qwen3-VL's merger)."""
    held = [getattr(m, "weight", None) for m in module.modules()]
    weights = [w for w in held if isinstance(w, Tensor)]
    return list(dict.fromkeys(len(w) for w in weights if w.ndim == 1 and len(w) < channels and channels % len(w) == 0))


def _tensor(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor):
        raise TypeError("no tensor comes out")
    return output


def _halves(module: nn.Module, pair: _Pair, x: Tensor) -> Any:
    """Where the block that holds both does more than the feed-forward: the child with the ups, then the one with the
    down.
    """
    first, last = (name.partition(".")[0] for name in (pair.ups[0].path, pair.down))
    if first == last or "." not in pair.ups[0].path:
        raise ValueError("the layers have no modules of their own")
    hidden = module.get_submodule(first)(x)
    reader = module.get_submodule(last)
    try:
        return reader(hidden)
    except TypeError:  # it adds the block's residual as well
        return reader(hidden, torch.zeros_like(x))

"""Where the sites are in other people's models. One file a library; each recognises attention by its structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ModelError
from ..sites import (
    Attention,
    HiddenSite,
    Host,
    LinearSite,
    ProductSite,
    Projection,
    Refusal,
    Site,
    Sites,
    block_of,
    dense_in,
    is_pointwise,
    is_within,
    layer_and_norm,
    part,
)
from ..wrappers import bare
from .attention import AttentionHost
from .blocks import check_blocks
from .classes import classes_of
from .feedforward import find_feedforwards
from .multihead import MultiheadHost
from .ordinary import check_ordinary, not_replaceable
from .reasons import NO_PAIR, is_no_pair
from .structures import rows_in, rows_out
from .symmetry import structure

__all__ = ["HOSTS", "check_blocks", "find_sites", "host_of"]

HOSTS: tuple[Host, ...] = (MultiheadHost(), AttentionHost())


def host_of(attention: Attention) -> Host:
    """The host that recognised an attention module."""
    return next(h for h in HOSTS if h.name == attention.host)


def find_sites(model: nn.Module) -> Sites:
    """Every site of a model, and what looks like one but cannot shrink, with the reason.

    Names are paths: ``blocks.3.attn:qk``, ``blocks.3.attn:vo``, ``blocks.3.mlp.fc1``, ``head``, and
    ``blocks.3.mlp:units`` for the hidden units of a feed-forward, whose two layers are sites of their own as well. The
    model is not changed.

    Raises:
        ModelError: if the model has neither attention nor linear layers, or is itself nothing but one of these; and
            where weights are not to be read (offloaded, quantised, pruned, adapters of PEFT), with the way out.
    """
    model = bare(model)
    check_ordinary(model)
    finder = _Finder(model)
    for path, module in model.named_modules():
        finder.look_at(path, module)
    finder.look_at_feedforwards()
    finder.refuse_what_was_not_seen()
    if not finder.found and not finder.refused:
        raise ModelError(f"{type(model).__name__} holds no attention and no linear layer to compress")
    return Sites(_in_order(model, finder.found), tuple(finder.refused))


_ATTENTION = re.compile("attention|attn|(?-i:MHSA|MSA|MHA|SHSA|SHMA|MLA)", re.IGNORECASE)
"""How classes call themselves attention."""


class _Finder:
    """What was found in a model so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, Site] = {}
        self.refused: list[Refusal] = []
        self.closed: list[str] = []  # paths whose insides are spoken for
        self.attentions: dict[str, tuple[int, ...]] = {}  # attention whose other layers may shrink, and its channels
        self.known: dict[tuple, tuple[str, Attention | Refusal]] = {}
        self.uses, self.classes = _uses(model), classes_of(model)
        self.linears: dict[str, nn.Module] = {}

    def look_at(self, path: str, module: nn.Module) -> None:
        if any(c in ("", path) or path.startswith(f"{c}.") for c in self.closed):
            return
        if getattr(module, "comcat_module", False):
            self.closed.append(path)
            self.refuse(path, "already compressed")
            return
        anatomy = None if self.attention_around(path) else _recognise(self.model, path, module, self.known)
        if path == "" and (isinstance(anatomy, Attention) or isinstance(module, nn.Linear)):
            raise ModelError(
                f"got a bare {type(module).__name__}, expected a model that holds it: "
                "a replacement needs a place to be put"
            )
        if isinstance(anatomy, Refusal):
            self.refused.append(anatomy)
            if anatomy.closes:
                self.closed.append(path)
            else:
                self.attentions[path] = ()
        elif anatomy is not None:
            self.take_attention(anatomy)
        elif isinstance(module, nn.Linear) or is_pointwise(module):
            self.take_linear(path, module)
        elif callable(getattr(module, "get_bias", None)):
            self.closed.append(path)
            if next(module.children(), None) is not None:
                self.refuse(path, "computes a position bias: no tokens of a picture flow through it")

    def refuse(self, name: str, reason: str) -> None:
        self.refused.append(Refusal(name, reason))

    def attention_around(self, path: str) -> str | None:
        """The path of the attention that a module lies in, if any."""
        return next((a for a in self.attentions if a and path.startswith(f"{a}.")), None)

    def take_attention(self, anatomy: Attention) -> None:
        parts = (anatomy.q.path, anatomy.k.path, anatomy.v.path, anatomy.out)
        if anatomy.mount in ("whole", "crossed"):
            self.closed.append(anatomy.path)
        else:
            alone = anatomy.vo_reason is not None and anatomy.mount == "padded"  # QK: what reads values stays open
            self.closed += parts[:2] if alone else parts
            self.attentions[anatomy.path] = (anatomy.in_features, anatomy.out_features)
        if shared := [p for p in parts if any(_shared(m, self.uses) for m in self.model.get_submodule(p).modules())]:
            self.refuse(anatomy.path, f"{shared[0]} is shared with another part of the model")
            return
        for site, reason in _attention_sites(self.model, anatomy):
            if reason is None:
                self.found[site.name] = site
            else:
                self.refuse(site.name, reason)

    def take_linear(self, path: str, module: Any) -> None:
        around = self.attention_around(path)
        channels = () if around is None else self.attentions[around]
        if channels and rows_in(module) not in channels and rows_out(module) not in channels:
            return  # it computes a position bias, or another part of the attention: no tokens flow through it
        if (reason := not_replaceable(module)) is not None:
            self.closed.append(path)
            self.refuse(path, reason)
        elif type(module) in (nn.Linear, nn.Conv2d):
            site = _linear_site(path, module, self.classes)
            if around is None or path.rpartition(".")[0] != around:
                self.linears[path] = module
            if _shared(module, self.uses):
                self.refuse(path, "shared between several parts of the model")
            elif site.break_even < 1:
                self.refuse(path, "so small that factors always cost more")
            else:
                self.found[path] = site

    def look_at_feedforwards(self) -> None:
        tied = frozenset(path for path, module in self.linears.items() if _shared(module, self.uses))
        for hidden in find_feedforwards(self.model, self.linears, tied, structure):
            if isinstance(hidden, Refusal):
                self.refused.append(hidden)
            else:
                self.found[hidden.name] = hidden

    def refuse_what_was_not_seen(self) -> None:
        """List what calls itself attention, has weights, and is neither a site nor refused."""
        spoken = [r.name.partition(":")[0] for r in self.refused]
        spoken += [s.path for s in self.found.values() if isinstance(s, ProductSite)]
        for path, module in self.model.named_modules():
            name = type(module).__name__
            if path and _ATTENTION.search(name) and next(module.parameters(), None) is not None:
                if not any(is_within(path, s) or is_within(s, path) for s in spoken):
                    none = is_no_pair([m for m in module.modules() if dense_in(m) is m or _mixes_channels(m)])
                    self.refuse(path, NO_PAIR if none else f"attention of no known shape: {name}")
                    spoken.append(path)


def _mixes_channels(module: nn.Module) -> bool:
    """Whether it is a convolution over neighbours that could make queries, keys and values."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _in_order(model: nn.Module, found: dict[str, Site]) -> dict[str, Site]:
    """Sites in the order of the model's modules, hidden units right before the layers that make and read them."""
    place = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}

    def key(site: Site) -> tuple[int, bool]:
        first = min(place[path] for path in site.modules) if isinstance(site, HiddenSite) else place[site.path]
        return first, not isinstance(site, HiddenSite)

    return {site.name: site for site in sorted(found.values(), key=key)}


def _recognise(
    model: nn.Module, path: str, module: nn.Module, known: dict[tuple, tuple[str, Attention | Refusal]]
) -> Attention | Refusal | None:
    if next(module.children(), None) is None:
        return None
    for host in HOSTS:
        if host.resembles(module):
            for name, child in module.named_modules():
                if isinstance(child, nn.Linear) and (reason := not_replaceable(child)) is not None:
                    return Refusal(path, f"{name}: {reason}", closes=True)
            key = structure(module)
            if key not in known:
                known[key] = path, host.recognise(model, path, module)
            first, anatomy = known[key]
            return _moved(anatomy, first, path)
    return None


def _moved(anatomy: Attention | Refusal, old: str, new: str) -> Attention | Refusal:
    """The anatomy of a module at ``old``, told of its twin at ``new``."""
    if old == new:
        return anatomy
    if isinstance(anatomy, Refusal):
        return replace(anatomy, name=new + anatomy.name.removeprefix(old))

    def move(path: str) -> str:
        return new + path.removeprefix(old)

    q, k, v = (
        replace(p, path=move(p.path), bias=p.bias and move(p.bias), seen=p.seen and move(p.seen))
        for p in (anatomy.q, anatomy.k, anatomy.v)
    )
    return replace(anatomy, path=move(anatomy.path), q=q, k=k, v=v, out=move(anatomy.out))


def _uses(model: nn.Module) -> Counter[int | str]:
    """How often each module and each parameter stands in the model: tied weights count as shared."""
    counts: Counter[int | str] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        counts.update([id(module), *(_place(p) for p in module._parameters.values() if p is not None)])
    return counts


def _place(parameter: nn.Parameter) -> int | str:
    """Where a parameter's values are: two parameters may share memory without being one object."""
    address = parameter.data_ptr()
    return f"{parameter.device}:{address}" if address else id(parameter)


def _shared(module: nn.Module, uses: Counter[int | str]) -> bool:
    return any(uses[use] > 1 for use in (id(module), *map(_place, module.parameters(recurse=False))))


def _attention_sites(model: nn.Module, a: Attention) -> Iterator[tuple[ProductSite, str | None]]:
    """The QK and the VO site of an attention, each with the reason why it cannot shrink, if it cannot."""
    q_bias, k_bias, v_bias = (p.count * _constants(model, p) for p in (a.q, a.k, a.v))
    if a.normed and a.v.path == a.q.path:  # one layer: what takes its place has no norm's scale for the values either
        k_bias, v_bias = k_bias + a.v.count, v_bias - a.v.count
    if a.k.bias is not None:
        k_bias = 0  # BEiT's key bias is a constant zero, no parameter
    extra = a.heads * a.width if a.keeps_key_bias and model.get_submodule(a.path).bias_k is not None else 0
    out_bias = 0 if model.get_submodule(a.out).bias is None else a.out_features
    # a fused projection whose values alone become thin keeps its bias, theirs (then zero) with it
    padded = a.mount == "padded"
    stays = padded and a.v.path in (a.q.path, a.k.path) and a.v.bias is None
    keeps = v_bias > 0 and (stays or not a.folds_value_bias)
    # a fused projection of ours has one bias for queries, keys (zeros) and values
    fused = a.mount == "whole" and q_bias + v_bias > 0
    qk_reason = a.qk_reason and (
        a.qk_reason if a.vo_reason else f"{a.qk_reason}; its vo and linear sites can still shrink"
    )
    keys = k_bias > 0 and (a.keeps_key_bias or (padded and a.k.path in (a.q.path, a.v.path)))
    per_qk = 2 if fused else int(q_bias > 0) + int(keys) + int(extra > 0)
    per_vo = int(fused or keeps) + int(extra > 0)
    q_in, k_in, v_in = (p.weight(model).shape[1] for p in (a.q, a.k, a.v))
    common = {"path": a.path, "heads": a.heads, "attention": a}
    qk = {
        "full_rank": a.width,
        "in_features": q_in,
        "out_features": k_in,
        "biases": q_bias + k_bias + extra,
        "bias_per_rank": per_qk,
    }
    vo = {
        "full_rank": a.value_width,
        "in_features": v_in,
        "out_features": a.out_features,
        "biases": v_bias + out_bias + extra,
        "bias_per_rank": per_vo,
    }
    yield ProductSite(f"{a.path}:qk", "qk", **common, **qk), qk_reason  # type: ignore[arg-type]
    yield ProductSite(f"{a.path}:vo", "vo", **common, **vo), a.vo_reason  # type: ignore[arg-type]


def _constants(model: nn.Module, p: Projection) -> int:
    """How many parameters a row has besides its weights: a bias, and two of a batch norm."""
    normed = layer_and_norm(part(model, p.path))
    if normed is not None:
        return 2 + int(normed[0].bias is not None)
    return int(p.bias_or_none(model) is not None)


def _linear_site(path: str, module: Any, classes: frozenset[int]) -> LinearSite:
    m, n = rows_in(module), rows_out(module)
    classifies, over_maps = n in classes and block_of(path) == path, is_pointwise(module)
    biases = 0 if module.bias is None else n
    return LinearSite(path, "linear", path, min(m, n), m, n, biases=biases, classifies=classifies, over_maps=over_maps)

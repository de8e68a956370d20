"""Attention of any library, recognised by the structure of its layers and proven by a trial.

What takes its place is, in this order: a low-rank attention behind the module's own signature, where the module
computes plain attention (with a position bias, see ``biased``); narrower projections under the module's own forward,
where that reads the width of a head from an attribute; or projections padded with zeros to the width that the forward
reckons with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedSite
from ..sites import Attention, Projection, Refusal, Replacement, Undo, layer_and_norm, part
from .between import between_qk, between_vo, not_carried
from .biased import BY_SIGNATURE, own_bias, stand_in
from .calls import Call, Uncallable, calls_of, reads_of
from .mounting import all_of, drop_parameter, exchange, set_attribute
from .reasons import (
    QUERIES_GIVEN,
    WEIGHTS_MADE,
    foreign_dropout,
    is_no_softmax,
    no_reading,
    qk_reason,
    unequal,
    vo_reason,
)
from .structures import WEIGHTS, WIDTHS, Structure, below, resembles, rows_in, rows_out, structures
from .symmetry import (
    TOLERANCE,
    NotItsOwn,
    Symmetry,
    Trial,
    attention_dropout,
    checks_types,
    is_plain,
    is_read_rightly,
    probe,
    random_copy,
    read_past,
)

# The signatures of a forward that comcat can stand in for.
_WHOLE = {
    ("x",),
    ("x", "attn_mask"),
    ("x", "attn_mask", "is_causal"),
    ("x", "shared_rel_pos_bias"),
    ("x", "mask"),
    ("x", "shared_rel_pos"),
}


class AttentionHost:
    """See :class:`comcat.sites.Host`."""

    name = "attention"

    def resembles(self, module: nn.Module) -> bool:
        return resembles(module)

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        readings = list(structures(module))
        if not readings:
            return Refusal(path, no_reading(module))
        undo = self.observe(module)
        try:
            found = _proven(module, readings)
            if isinstance(found, str):
                return Refusal(path, f"attention of no known shape: {found}")
            local, symmetry, calls, copied, unsure = found
            past = read_past(copied, local, calls)
            typed = past is None and checks_types(copied, local, calls)
            no_product = not symmetry.qk or unsure
            whole = not no_product and not foreign_dropout(module) and _can_stand_in(module, local)
            widths = _width_attributes(copied, local, calls)
        finally:
            undo()
        no_qk = _no_qk(module, copied, local, calls) if no_product or local.q == local.k else None
        no_qk = no_qk or not_carried(module, local.q, local.k)
        no_vo = not_carried(module, local.v) if symmetry.vo else vo_reason(module, local.out, symmetry)
        if no_vo is None and not symmetry.vo:
            no_vo = between_vo(copied, local, calls)
        if no_qk is None and local.q.bias is not None and not whole:
            no_qk = (
                "a QK product exists, but its query bias stands apart under a forward that comcat cannot stand in for"
            )
        dropout = attention_dropout(below(module, local.q.path.rpartition(".")[0]))
        mount = "whole" if whole and no_qk is None else "parts" if widths and no_qk is None else "padded"
        if mount == "padded" and no_vo is None and dropout > 0 and local.v.bias is not None:
            no_vo = "attention dropout forbids to fold the value bias, which stands apart from its projection"
        if no_qk is not None and no_vo is not None:
            in_part = rows_in(part(module, local.out)) != local.v.count
            if (local.width != local.value_width and not in_part) or local.q == local.k:  # was only tried
                return Refusal(path, f"attention of no known shape: {no_reading(module)}")
            if not symmetry.vo and is_no_softmax(copied, local):
                no_qk = "it is no softmax over keys (attention across channels, linear attention, or queries added)"
            return Refusal(path, f"attention of no known shape: {no_qk}; {no_vo}")
        if mount != "whole" and past is not None:  # the forward stays, and would put thin weights together again
            return Refusal(path, f"its forward computes with the weights of {past} and does not call the layer", True)
        if mount != "whole" and typed:
            return Refusal(path, "its forward checks the classes of its layers, so none can be exchanged", True)
        return replace(
            _below(local, path),
            mount=mount,
            widths=widths,
            qk_reason=no_qk,
            vo_reason=no_vo,
            folds_value_bias=symmetry.vo and symmetry.rows_sum_to_one and dropout == 0,
        )

    def observe(self, module: nn.Module) -> Undo:
        if getattr(module, "qkv_bias_separate", None) is False and getattr(module, "q_bias", None) is not None:
            return set_attribute(module, "qkv_bias_separate", True)
        return lambda: None

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        module = model.get_submodule(attention.path)
        if replacement.whole is not None:
            whole = replacement.whole
            qkv, proj = _parameters(model, attention)
            if (ours := BY_SIGNATURE.get(attention.signature)) is None:
                return exchange(model, attention.path, whole, {"qkv": qkv, "proj": proj})
            return exchange(model, attention.path, stand_in(ours, module, whole), {"core.qkv": qkv, "core.proj": proj})
        if replacement.width is not None and attention.mount != "parts":
            raise UnsupportedSite(f"{attention.path}: heads of another width need the whole module exchanged")
        undos = [self.observe(module)]
        undos += [exchange(model, p, m) for p, m in (replacement.parts or {}).items()]
        if replacement.width is not None:
            holder: Any = model.get_submodule(attention.q.path.rpartition(".")[0])
            for name in attention.widths:
                undos.append(set_attribute(holder, name, getattr(holder, name) // attention.width * replacement.width))
        if replacement.without_value_bias and attention.v.bias is not None:
            undos.append(drop_parameter(module, attention.v.bias.rpartition(".")[2]))
        return all_of(undos)


def _no_qk(module: nn.Module, copied: nn.Module, local: Attention, calls: Sequence[Call]) -> str:
    """Why there is no QK product."""
    if local.q == local.k:
        return WEIGHTS_MADE if local.q.path.rpartition(".")[2] in WEIGHTS else QUERIES_GIVEN
    holder = below(module, local.q.path.rpartition(".")[0])
    parameters = tuple(inspect.signature(module.forward).parameters)
    return qk_reason(holder, parameters) or between_qk(copied, local, calls)


def _parameters(model: nn.Module, attention: Attention) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the projections of q, k and v, biases that stand apart included, and of the output's."""
    projections = (attention.q, attention.k, attention.v)
    found = [p for projection in projections for p in model.get_submodule(projection.path).parameters()]
    apart = [p.bias_or_none(model) for p in projections if p.bias is not None]
    found += [b for b in apart if isinstance(b, nn.Parameter)]  # BEiT's key bias is a buffer
    return found, list(model.get_submodule(attention.out).parameters())


_Proven = tuple[Attention, Symmetry, list[Call], nn.Module, bool]


def _proven(module: nn.Module, readings: Sequence[Structure]) -> _Proven | str:
    """The reading under which a module has most products, or in words why none can be proven."""
    copied = random_copy(module, torch.Generator().manual_seed(0))
    best: _Proven | None = None
    why = None
    for reading in readings:
        local = _attention(module, reading)
        if isinstance(local, str):
            why = why or local
            continue
        tried = _tried(module, copied, local)
        if isinstance(tried, str):
            why = why or tried
            continue
        found, calls, unsure = tried
        if found.qk and found.vo:
            return local, found, calls, copied, unsure
        if best is None or found.qk + found.vo > best[1].qk + best[1].vo:
            best = local, found, calls, copied, unsure
    return why or "nothing is known of it" if best is None else best


def _tried(module: nn.Module, copied: nn.Module, local: Attention) -> tuple[Symmetry, list[Call], bool] | str:
    """What a trial shows, on the first grid of tokens that shows anything: with a single key no query matters."""
    parameters = ", ".join(inspect.signature(module.forward).parameters)
    why = f"comcat does not know how to call {type(module).__name__}({parameters})"
    for reads in reads_of(module, local):
        try:
            if not is_read_rightly(copied, local):
                return "what stands behind its projections is more than a batch norm"
            calls, unsure = calls_of(copied, [reads])
            return probe(copied, local, calls), calls, unsure
        except Uncallable:
            continue
        except NotItsOwn:
            why = "a copy of it does not compute with its own weights"
    return why


def _attention(module: nn.Module, s: Structure) -> Attention | str:
    """A reading as an anatomy with paths within the module, or why it is none."""
    holder, out = below(module, s.holder), part(module, s.out)
    if s.k.count != s.q.count or any(p.count % s.heads for p in (s.q, s.v)):
        return unequal(s.q.count, s.k.count, s.v.count)
    if rows_in(out) < s.v.count:
        return f"its output projection reads {rows_in(out)} channels, expected {s.v.count}"
    parameters = tuple(inspect.signature(module.forward).parameters)
    scale = getattr(holder, "scale", getattr(holder, "scaling", None))
    return Attention(
        path="",
        host=AttentionHost.name,
        mount="padded",
        signature=parameters[-1] if len(parameters) > 1 else "x",
        heads=s.heads,
        width=s.width,
        in_features=s.q.weight(module).shape[1],
        out_features=rows_out(out),
        scale=float(scale) if isinstance(scale, (int, float)) else s.width**-0.5,
        q=s.q,
        k=s.k,
        v=s.v,
        out=s.out,
        normed=any(layer_and_norm(part(module, p.path)) for p in (s.q, s.k, s.v)),
    )


def _below(a: Attention, path: str) -> Attention:
    """The anatomy with paths from the model's root."""
    prefix = f"{path}." if path else ""

    def moved(p: Projection) -> Projection:
        return replace(p, path=prefix + p.path, bias=None if p.bias is None else prefix + p.bias)

    return replace(a, path=path, q=moved(a.q), k=moved(a.k), v=moved(a.v), out=prefix + a.out)


def _can_stand_in(module: nn.Module, a: Attention) -> bool:
    """Whether low-rank attention behind the module's own signature computes what the module computes."""
    parameters = tuple(inspect.signature(module.forward).parameters)
    names = {p.path for p in (a.q, a.k, a.v)}
    known = a.out == "proj" and names in ({"qkv"}, {"q_proj", "k_proj", "v_proj"}) and a.q.heads == 1
    layers = [part(module, path) for path in (*names, a.out)]
    if not known or parameters not in _WHOLE or not all(isinstance(layer, nn.Linear) for layer in layers):
        return False
    if a.v.stop != part(module, a.v.path).out_features:
        return False
    if len({p.weight(module).shape[1] for p in (a.q, a.k, a.v)}) > 1:
        return False
    bias = own_bias if a.signature in BY_SIGNATURE else None
    copied = random_copy(module, torch.Generator().manual_seed(0))
    for reads in reads_of(module, a):
        x = reads.rows(a.in_features, 0)
        if is_plain(copied, a, x, bias, _trials(module, parameters, a.heads, reads.tokens)):
            return True
    return False


def _width_attributes(copied: nn.Module, a: Attention, calls: Sequence[Call]) -> tuple[str, ...]:
    """The attributes from which a forward reads the width of a head but not its scale; () if there are none.

    With them, heads with one more channel, of zeros, change nothing.
    """
    holder = below(copied, a.q.path.rpartition(".")[0])
    layers = [part(copied, path) for path in dict.fromkeys((a.q.path, a.k.path, a.v.path, a.out))]
    if (
        len(layers) < 4
        or not rows_in(layers[-1]) == a.v.count == a.q.count
        or not all(isinstance(layer, nn.Linear) for layer in layers)
    ):
        return ()
    numbers = {n: v for n, v in vars(holder).items() if isinstance(v, int) and not isinstance(v, bool)}
    one = tuple(n for n in WIDTHS if numbers.get(n) == a.width)
    words = ("head", "inner", "all_")
    all_heads = tuple(
        n for n, v in numbers.items() if v == a.heads * a.width and any(w in n for w in words) and n not in one
    )
    for names in dict.fromkeys((one[:1], one, one + all_heads)):
        if names and _widens(copied, a, calls, names):
            return names
    return ()


@torch.no_grad()
def _widens(module: nn.Module, a: Attention, calls: Sequence[Call], names: Sequence[str]) -> bool:
    generator = torch.Generator().manual_seed(0)
    copied = random_copy(module, generator)
    before = [call(copied) for call in calls]
    for p in (a.q, a.k, a.v):
        linear = part(copied, p.path)
        for name, value in linear.named_parameters():
            heads = value.unflatten(0, (a.heads, a.width))
            wider = F.pad(heads, (0, 0) * (value.ndim - 1) + (0, 1))  # (heads, width + 1, in) or (heads, width + 1)
            setattr(linear, name, nn.Parameter(wider.flatten(0, 1)))
        linear.out_features += a.heads
    out = part(copied, a.out)
    out.weight = nn.Parameter(F.pad(out.weight.unflatten(1, (a.heads, a.width)), (0, 1)).flatten(1))
    out.in_features += a.heads
    holder = part(copied, a.q.path.rpartition(".")[0])
    for name in names:
        setattr(holder, name, getattr(holder, name) // a.width * (a.width + 1))
    try:
        after = [call(copied) for call in calls]
    except Exception:  # a forward that reckons with the old width
        return False
    return all(
        y.shape == e.shape and bool((y - e).abs().max() <= TOLERANCE * (1 + e.abs().max()))
        for y, e in zip(after, before, strict=True)
    )


def _trials(module: nn.Module, parameters: tuple[str, ...], heads: int, tokens: int) -> list[Trial]:
    """The arguments that callers may pass besides the tokens, on a batch of two, and what they should mean."""
    trials = [Trial({}, None)]
    if parameters == ("x",):
        return trials  # so many logits would take most of the time that finding sites takes
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    if "attn_mask" in parameters:
        keep = (logits[:, :1] > 0) | torch.eye(tokens, dtype=torch.bool)  # every query sees itself
        trials += [Trial({"attn_mask": mask}, mask) for mask in (keep, logits[:, :1])]
    if "is_causal" in parameters:
        trials.append(Trial({"is_causal": True}, torch.ones(tokens, tokens, dtype=torch.bool).tril()))
    if "mask" in parameters:  # two windows of one picture
        trials.append(Trial({"mask": logits[:, 0]}, logits[:, :1]))
    if "shared_rel_pos_bias" in parameters:
        trials.append(Trial({"shared_rel_pos_bias": logits[:1]}, logits[:1]))
    if "shared_rel_pos" in parameters:  # the module's own comes first
        trials.append(
            Trial({"shared_rel_pos": logits[:1]}, logits[:1] if getattr(module, "rel_pos", None) is None else None)
        )
    return trials

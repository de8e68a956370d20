"""timm's attention, and any other module with a fused ``qkv`` (or q/k/v projections) and a ``proj``.

A recognised module gives way to the low-rank attention as a whole. Where the host adds a position bias to the logits
(BEiT, Swin, relative-position ViT), the module itself stays around it (see ``biased``). Where no QK product exists, the
host's forward stays and only V and O become thin.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSite
from ..sites import Attention, Projection, Refusal, Replacement, Undo
from .biased import BY_SIGNATURE, own_bias, stand_in
from .mounting import all_of, drop_parameter, exchange, set_attribute
from .symmetry import Trial, attention_dropout, norm_and_gate, probe, read_past, trial_failed

# The signatures of a forward that comcat can stand in for.
_WHOLE = {
    ("x",),
    ("x", "attn_mask"),
    ("x", "attn_mask", "is_causal"),
    ("x", "shared_rel_pos_bias"),
    ("x", "mask"),
    ("x", "shared_rel_pos"),
}


class TimmHost:
    """See :class:`comcat.sites.Host`."""

    name = "timm"

    def resembles(self, module: nn.Module) -> bool:
        return (
            _projections(module, "") is not None
            and isinstance(getattr(module, "proj", None), nn.Linear)
            and _heads(module) is not None
        )

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        out, heads, projections = getattr(module, "proj", None), _heads(module), _projections(module, path)
        if projections is None or not isinstance(out, nn.Linear) or heads is None:
            return Refusal(path, "attention of no known shape: no qkv and proj")
        q, k, v = projections
        in_features, attention_width = q.weight(model).shape[1], q.stop - q.start
        if k.stop - k.start != attention_width or v.stop - v.start != attention_width or attention_width % heads:
            return Refusal(path, "queries, keys and values differ in width (grouped or multi-query attention)")
        if out.in_features != attention_width:
            return Refusal(path, f"its output projection reads {out.in_features} channels, expected {attention_width}")
        parameters = tuple(inspect.signature(module.forward).parameters)
        width = attention_width // heads
        scale = getattr(module, "scale", width**-0.5)
        local = Attention(
            path="",
            host=self.name,
            mount="whole",
            signature=parameters[-1] if len(parameters) > 1 else "x",
            heads=heads,
            width=width,
            in_features=in_features,
            out_features=out.out_features,
            scale=float(scale) if isinstance(scale, (int, float)) else width**-0.5,
            q=_relative(q, path),
            k=_relative(k, path),
            v=_relative(v, path),
            out="proj",
        )
        undo = self.observe(module)
        try:
            tokens, bias = _probe_tokens(module), own_bias if local.signature in BY_SIGNATURE else None
            found = probe(self, module, local, tokens, bias, _trials(module, parameters, heads, tokens))
            past = read_past(self, module, local, tokens)
        except Exception as error:
            return Refusal(path, f"attention of no known shape: {trial_failed(error)}")
        finally:
            undo()
        norm, gate = norm_and_gate(module)
        qk_reason = None if found.qk else _qk_reason(module, parameters)
        vo_reason = None if found.vo else _vo_reason(norm, gate)
        if found.qk and "rope" in parameters:
            qk_reason = _qk_reason(module, parameters)
        if qk_reason is None and not (found.plain and parameters in _WHOLE):
            qk_reason = f"a QK product exists, but comcat cannot stand in for its forward({', '.join(parameters)})"
        if qk_reason is None and (name := _foreign_dropout(module)):
            qk_reason = f"a QK product exists, but comcat does not know what its dropout {name!r} acts on"
        dropout = attention_dropout(module)
        if qk_reason is not None and vo_reason is None and dropout > 0 and v.bias is not None:
            vo_reason = "attention dropout forbids to fold the value bias, which stands apart from its projection"
        if qk_reason is not None and vo_reason is not None:
            return Refusal(path, f"attention of no known shape: {qk_reason}; {vo_reason}")
        if qk_reason is not None and past is not None:  # the forward stays, and would put thin weights together again
            return Refusal(path, f"its forward computes with the weights of {past} and does not call the layer")
        return Attention(
            path=path,
            host=self.name,
            mount="padded" if qk_reason else "whole",
            signature=local.signature,
            heads=heads,
            width=width,
            in_features=in_features,
            out_features=out.out_features,
            scale=local.scale,
            q=q,
            k=k,
            v=v,
            out=f"{path}.proj" if path else "proj",
            qk_reason=qk_reason,
            vo_reason=vo_reason,
            folds_value_bias=found.vo and found.rows_sum_to_one and dropout == 0,
        )

    def probe(self, module: nn.Module, attention: Attention, x: Tensor, *, grid: bool = True) -> Tensor:
        try:
            y = module(x)
        except (RuntimeError, ValueError):
            if not grid:
                raise
            y = module(x[:, None])  # (batch, 1, tokens, channels)
        y = y[0] if isinstance(y, tuple) else y
        return y.reshape(*x.shape[:-1], -1)

    def observe(self, module: nn.Module) -> Undo:
        if getattr(module, "qkv_bias_separate", None) is False and getattr(module, "q_bias", None) is not None:
            return set_attribute(module, "qkv_bias_separate", True)
        return lambda: None

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        if replacement.whole is not None:
            module, whole = model.get_submodule(attention.path), replacement.whole
            qkv, proj = _parameters(model, attention)
            if (ours := BY_SIGNATURE.get(attention.signature)) is None:
                return exchange(model, attention.path, whole, {"qkv": qkv, "proj": proj})
            return exchange(model, attention.path, stand_in(ours, module, whole), {"core.qkv": qkv, "core.proj": proj})
        if replacement.width is not None:
            raise UnsupportedSite(f"{attention.path}: heads of another width need the whole module exchanged")
        module = model.get_submodule(attention.path)
        undos = [self.observe(module)]
        undos += [exchange(model, p, m) for p, m in (replacement.parts or {}).items()]
        if replacement.without_value_bias and attention.v.bias is not None:
            undos.append(drop_parameter(module, attention.v.bias.rpartition(".")[2]))
        return all_of(undos)


def _parameters(model: nn.Module, attention: Attention) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the projections of q, k and v, biases that stand apart included, and of the output's."""
    projections = (attention.q, attention.k, attention.v)
    found = [p for projection in projections for p in model.get_submodule(projection.path).parameters()]
    apart = [p.bias_or_none(model) for p in projections if p.bias is not None]
    found += [b for b in apart if isinstance(b, nn.Parameter)]  # BEiT's key bias is a buffer
    return found, list(model.get_submodule(attention.out).parameters())


def _projections(module: nn.Module, path: str) -> tuple[Projection, Projection, Projection] | None:
    prefix = f"{path}." if path else ""
    qkv = getattr(module, "qkv", None)
    if isinstance(qkv, nn.Linear) and qkv.out_features % 3 == 0:
        n = qkv.out_features // 3
        apart = getattr(module, "q_bias", None) is not None
        q, k, v = (
            Projection(f"{prefix}qkv", i * n, (i + 1) * n, f"{prefix}{x}_bias" if apart else None)
            for i, x in enumerate("qkv")
        )
        return q, k, v
    found: list[Any] = [getattr(module, f"{letter}_proj", None) for letter in "qkv"]
    if not all(isinstance(m, nn.Linear) for m in found):
        return None
    q, k, v = (Projection(f"{prefix}{x}_proj", 0, m.out_features) for x, m in zip("qkv", found, strict=True))
    return q, k, v


def _heads(module: nn.Module) -> int | None:
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def _relative(projection: Projection, path: str) -> Projection:
    def cut(name: str | None) -> str | None:
        return name.removeprefix(f"{path}.") if name is not None and path else name

    return Projection(str(cut(projection.path)), projection.start, projection.stop, cut(projection.bias))


def _trials(module: nn.Module, parameters: tuple[str, ...], heads: int, tokens: int) -> list[Trial]:
    """The arguments that callers may pass besides the tokens, on a batch of two, and what they should mean."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    trials = [Trial({}, None)]
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


def _probe_tokens(module: nn.Module) -> int:
    index = getattr(module, "relative_position_index", None)
    if isinstance(index, Tensor) and index.ndim == 2:
        return index.shape[0]
    with torch.no_grad():
        bias = own_bias(module)
    return 5 if bias is None else bias.shape[-1]


def _foreign_dropout(module: nn.Module) -> str | None:
    """A dropout in use besides ``attn_drop`` and ``proj_drop``, which the low-rank attention takes over."""
    modules = {
        n: m.p
        for n, m in module.named_children()
        if isinstance(getattr(m, "p", None), float) and "drop" in type(m).__name__.lower()
    }
    numbers = {n: getattr(module, n, 0.0) for n in ("attention_dropout", "dropout")}
    found = {n: p for n, p in {**numbers, **modules}.items() if isinstance(p, float) and p > 0}
    return next((n for n in found if n not in ("attn_drop", "proj_drop")), None)


def _qk_reason(module: nn.Module, parameters: tuple[str, ...]) -> str:
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(module, name, nn.Identity()), (nn.Identity, type(None))):
            return f"{name} sits between W_Q and W_K"
    if "rope" in parameters or getattr(module, "rope", None) is not None or "position_embeddings" in parameters:
        return "rotary position embeddings sit between W_Q and W_K"
    if getattr(module, "logit_scale", None) is not None:
        return "cosine attention normalises q and k"
    if getattr(module, "rel_pos_h", None) is not None:
        return "relative positions are computed from q"
    return "its output depends on more of W_Q and W_K than their product"


def _vo_reason(norm: nn.Module | None, gate: nn.Module | None) -> str:
    if norm is not None:
        return "a norm sits between W_V and W_O"
    if gate is not None:
        return "a gate sits between W_V and W_O"
    return "its output depends on more of W_V and W_O than their product"

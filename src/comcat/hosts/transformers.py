"""transformers' attention: separate q, k, v and output projections around an exchangeable attention function.

The library's own forward is its seam: it reads ``head_dim`` and ``scaling`` from the module, honours ``_attn_implementation`` and records attention
maps by class. So the module stays, and only its projections (and ``head_dim``) are exchanged.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..sites import Attention, Projection, Refusal, Replacement, Undo
from .anatomy import probe
from .mounting import all_of, exchange, set_attribute
from .timm import _first_line, _heads, _qk_reason, _relative

_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_OUT = ("o_proj", "out_proj", "output.dense")


class TransformersHost:
    """See :class:`comcat.sites.Host`."""

    name = "transformers"

    def resembles(self, module: nn.Module) -> bool:
        return _inner(module) is not None and _out(module) is not None

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        inner, out = _inner(module), _out(module)
        holder = _get(module, inner) if inner else module
        heads = _heads(holder) if holder is not None else None
        if inner is None or out is None or holder is None or heads is None:
            return Refusal(path, "attention of no known shape: no q, k, v and output projections or no number of heads")
        names = next(ns for ns in _NAMES if _find(module, inner, (ns,)))
        linears = [_get(holder, n) for n in names]
        attention_width = linears[0].out_features
        if any(m.out_features != attention_width for m in linears) or attention_width % heads:
            return Refusal(path, "queries, keys and values differ in width (grouped or multi-query attention)")
        if any(m.in_features != linears[0].in_features for m in linears):
            return Refusal(path, "queries and keys come from inputs of different width (cross attention)")
        prefix = f"{path}." if path else ""
        mid = f"{inner}." if inner else ""
        q, k, v = (Projection(f"{prefix}{mid}{n}", 0, attention_width) for n in names)
        width = attention_width // heads
        scale = getattr(holder, "scaling", getattr(holder, "scale", width**-0.5))
        out_linear = _get(module, out)
        parameters = tuple(inspect.signature(holder.forward).parameters)
        local = Attention(
            path="", host=self.name, mount="parts", signature=parameters[0], heads=heads, width=width, in_features=linears[0].in_features,
            out_features=out_linear.out_features, scale=float(scale), q=_relative(q, path), k=_relative(k, path), v=_relative(v, path), out=out,
        )  # fmt: skip
        try:
            found = probe(self, module, local, _probe_tokens(module, holder))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return Refusal(path, f"attention of no known shape: its forward cannot be called on tokens alone ({type(error).__name__}: {_first_line(error)})")
        qk_reason = None if found.qk else _qk_reason(holder, parameters)
        vo_reason = None if found.vo else "its output depends on more of W_V and W_O than their product"
        if qk_reason is None and not isinstance(getattr(holder, "head_dim", None), int):
            qk_reason = "a QK product exists, but its forward does not read the width of a head from head_dim"
        if qk_reason is not None and vo_reason is not None:
            return Refusal(path, f"attention of no known shape: {qk_reason}; {vo_reason}")
        dropout = next((d for d in (getattr(holder, n, None) for n in ("attention_dropout", "dropout")) if isinstance(d, float)), 0.0)
        dropout = getattr(getattr(holder, "dropout", None), "p", dropout)
        return Attention(
            path=path, host=self.name, mount="values" if qk_reason else "parts", signature=local.signature, heads=heads, width=width,
            in_features=local.in_features, out_features=local.out_features, scale=local.scale, q=q, k=k, v=v, out=f"{prefix}{out}",
            qk_reason=qk_reason, vo_reason=vo_reason, folds_value_bias=found.vo and found.rows_sum_to_one and dropout == 0,
        )  # fmt: skip

    def probe(self, module: nn.Module, attention: Attention, x: Tensor, *, grid: bool = True) -> Tensor:
        keywords = {}
        if "position_embeddings" in inspect.signature(module.forward).parameters:
            # angles differ by token and turn no channel into another's place in V: enough to tell that QK is bound to them
            angle = torch.linspace(0, 3, x.shape[1] * attention.width, dtype=x.dtype).view(x.shape[1], attention.width)
            keywords["position_embeddings"] = (angle.cos(), angle.sin())
        y = module(x, **keywords)
        return y[0] if isinstance(y, tuple) else y

    def observe(self, module: nn.Module) -> Undo:
        return lambda: None

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        undos = [exchange(model, p, m) for p, m in (replacement.parts or {}).items()]
        if replacement.width is not None:
            undos.append(set_attribute(model.get_submodule(attention.path), "head_dim", replacement.width))
        return all_of(undos)


def _inner(module: nn.Module) -> str | None:
    return next((n for n in ("", "self", "attention") if _find(module, n, _NAMES)), None)


def _out(module: nn.Module) -> str | None:
    return next((o for o in _OUT if isinstance(_get(module, o), nn.Linear)), None)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            return None
    return module


def _find(module: nn.Module, inner: str, names: tuple[tuple[str, ...], ...]) -> bool:
    holder = _get(module, inner) if inner else module
    return holder is not None and any(all(isinstance(_get(holder, n), nn.Linear) for n in ns) for ns in names)


def _probe_tokens(module: nn.Module, holder: nn.Module) -> int:
    for owner in (module, holder):
        bias = getattr(owner, "relative_position_bias", None)
        if isinstance(getattr(bias, "window_area", None), int):
            return bias.window_area  # type: ignore[union-attr,return-value]
        index = getattr(owner, "relative_position_index", None)
        if isinstance(index, Tensor):
            return index.shape[0]
    return 5

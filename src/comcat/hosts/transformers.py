"""transformers' attention: separate q, k, v and output projections around an exchangeable attention function.

The library's own forward is its seam: it reads ``head_dim`` and ``scaling`` from the module, honours
``_attn_implementation`` and records attention maps by class. So the module stays, and only its projections (and
``head_dim``) are exchanged.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites import Attention, Projection, Refusal, Replacement, Undo, part
from .mounting import all_of, exchange, set_attribute
from .symmetry import TOLERANCE, attention_dropout, probe, random_copy, read_past, trial_failed
from .timm import _heads, _qk_reason, _relative

_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_OUT = ("o_proj", "out_proj", "output.dense")


class TransformersHost:
    """See :class:`comcat.sites.Host`."""

    name = "transformers"

    def resembles(self, module: nn.Module) -> bool:
        inner, out = _inner(module), _out(module)
        names = None if inner is None else _names(_get(module, inner))
        if inner is None or out is None or names is None:
            return False
        # the block around an attention may have an "output.dense" as well: its MLP's
        return _get(module, out).in_features == _get(_get(module, inner), names[2]).out_features

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        inner, out = _inner(module), _out(module)
        holder = None if inner is None else _get(module, inner)
        names = None if holder is None else _names(holder)
        heads = None if holder is None else _heads(holder)
        if inner is None or out is None or holder is None or names is None or heads is None:
            return Refusal(path, "attention of no known shape: no q, k, v and output projections or no number of heads")
        linears = [part(holder, n) for n in names]
        attention_width: int = linears[0].out_features
        if any(m.out_features != attention_width for m in linears) or attention_width % heads:
            return Refusal(path, "queries, keys and values differ in width (grouped or multi-query attention)")
        if any(m.in_features != linears[0].in_features for m in linears):
            return Refusal(path, "queries and keys come from inputs of different width (cross attention)")
        prefix = f"{path}." if path else ""
        mid = f"{inner}." if inner else ""
        q, k, v = (Projection(f"{prefix}{mid}{n}", 0, attention_width) for n in names)
        width = attention_width // heads
        scale = getattr(holder, "scaling", getattr(holder, "scale", width**-0.5))
        out_linear = part(module, out)
        parameters = tuple(inspect.signature(holder.forward).parameters)
        local = Attention(
            path="",
            host=self.name,
            mount="parts",
            signature=parameters[0],
            heads=heads,
            width=width,
            in_features=linears[0].in_features,
            out_features=out_linear.out_features,
            scale=scale if isinstance(scale, float) else width**-0.5,
            q=_relative(q, path),
            k=_relative(k, path),
            v=_relative(v, path),
            out=out,
        )
        tokens = _probe_tokens(module, holder)
        try:
            found = probe(self, module, local, tokens)
            widens = found.qk and _widens(self, module, local, tokens)
            past = read_past(self, module, local, tokens)
        except Exception as error:
            return Refusal(path, f"attention of no known shape: {trial_failed(error)}")
        qk_reason = None if found.qk else _qk_reason(holder, parameters)
        vo_reason = None if found.vo else "its output depends on more of W_V and W_O than their product"
        if qk_reason is None and not widens:
            qk_reason = "a QK product exists, but its forward does not read the width of a head from head_dim"
        if qk_reason is not None and vo_reason is not None:
            return Refusal(path, f"attention of no known shape: {qk_reason}; {vo_reason}")
        if past is not None:  # thin weights would be put together again
            return Refusal(path, f"its forward computes with the weights of {past} and does not call the layer")
        return Attention(
            path=path,
            host=self.name,
            mount="padded" if qk_reason else "parts",
            signature=local.signature,
            heads=heads,
            width=width,
            in_features=local.in_features,
            out_features=local.out_features,
            scale=local.scale,
            q=q,
            k=k,
            v=v,
            out=f"{prefix}{out}",
            qk_reason=qk_reason,
            vo_reason=vo_reason,
            folds_value_bias=found.vo and found.rows_sum_to_one and attention_dropout(holder) == 0,
        )

    def probe(self, module: nn.Module, attention: Attention, x: Tensor, *, grid: bool = True) -> Tensor:
        keywords = {}
        if "position_embeddings" in inspect.signature(module.forward).parameters:
            # angles differ by token and turn no channel into another's place in V: enough to tell that QK is bound to
            # them
            angle = torch.linspace(0, 3, x.shape[1] * attention.width, dtype=x.dtype).view(x.shape[1], attention.width)
            keywords["position_embeddings"] = (angle.cos(), angle.sin())
        y = module(x, **keywords)
        return y[0] if isinstance(y, tuple) else y

    def observe(self, module: nn.Module) -> Undo:
        return lambda: None

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        undos = [exchange(model, p, m) for p, m in (replacement.parts or {}).items()]
        if replacement.width is not None:
            holder = model.get_submodule(attention.q.path.rpartition(".")[0])
            undos.append(set_attribute(holder, "head_dim", replacement.width))
        return all_of(undos)


def _widens(host: TransformersHost, module: nn.Module, attention: Attention, tokens: int) -> bool:
    """Whether the forward reads the width of a head from ``head_dim``, and its scale from elsewhere.

    If it does, heads with one more channel, of zeros, change nothing.
    """
    holder = attention.q.path.rpartition(".")[0]
    if not isinstance(getattr(module.get_submodule(holder), "head_dim", None), int):
        return False
    generator = torch.Generator().manual_seed(0)
    copied = random_copy(module, generator)
    x = torch.randn(2, tokens, attention.in_features, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = host.probe(copied, attention, x)
        for p in (attention.q, attention.k, attention.v):
            linear = part(copied, p.path)
            for name, value in linear.named_parameters():
                heads = value.unflatten(0, (attention.heads, attention.width))
                wider = F.pad(heads, (0, 0) * (value.ndim - 1) + (0, 1))  # (heads, width + 1, in) or (heads, width + 1)
                setattr(linear, name, nn.Parameter(wider.flatten(0, 1)))
            linear.out_features += attention.heads
        out = part(copied, attention.out)
        out.weight = nn.Parameter(F.pad(out.weight.unflatten(1, (attention.heads, attention.width)), (0, 1)).flatten(1))
        out.in_features += attention.heads
        part(copied, holder).head_dim = attention.width + 1
        try:
            after = host.probe(copied, attention, x)
        except Exception:  # a forward that reckons with the old width
            return False
    return after.shape == before.shape and bool((after - before).abs().max() <= TOLERANCE * (1 + before.abs().max()))


def _inner(module: nn.Module) -> str | None:
    return next(
        (n for n in ("", "self", "attention") if (holder := _get(module, n)) is not None and _names(holder)), None
    )


def _names(holder: nn.Module) -> tuple[str, str, str] | None:
    return next((ns for ns in _NAMES if all(isinstance(_get(holder, n), nn.Linear) for n in ns)), None)


def _out(module: nn.Module) -> str | None:
    return next((o for o in _OUT if isinstance(_get(module, o), nn.Linear)), None)


def _get(module: nn.Module, path: str) -> Any:
    """The module at a path below another (``""`` is itself), or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            return None
    return module


def _probe_tokens(module: nn.Module, holder: nn.Module) -> int:
    for owner in (module, holder):
        bias = getattr(owner, "relative_position_bias", None)
        if isinstance(getattr(bias, "window_area", None), int):
            return bias.window_area  # type: ignore[union-attr,return-value]
        index = getattr(owner, "relative_position_index", None)
        if isinstance(index, Tensor):
            return index.shape[0]
    return 5

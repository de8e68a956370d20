"""Checkpoints that plain transformers loads, with no code of ours.

Several classes of transformers read a head's width from their config (``head_dim``). A plan that brings QK and VO of
all attention layers to one rank r makes heads of width r, so such a class holds the weights as they are, but for its
scale: it divides logits by √r where ours multiplies them by the original scale s = 1/√k. So ``W_Q`` and ``b_Q`` are
multiplied by s √r: ``s q kᵀ = (s √r q) kᵀ / √r``. Key biases drop out of softmax and value biases were folded into the
output's, so both are zero.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import StoreError, listed
from ..hosts import find_sites
from ..models import Origin
from ..models.failures import first_line, required
from ..plan import Plan
from ..record import Record
from ..sites import Attention, ProductSite, Sites
from .processor import processor_config
from .rebuilding import unlike
from .translation import translated

TOLERANCE = 1e-4  # of outputs in float32, relative to the largest


def write_stock(model: nn.Module, origin: Origin, record: Record, sites: Sites, folder: Path) -> dict[str, Any]:
    """Write config, weights and, where it is known, the image processor of a stock checkpoint; return what it is.

    sites: of the model before compression. Raises StoreError where the plan or the architecture does not allow it; the
    message says why.
    """
    required("transformers")
    rank, attentions = uniform_rank(record.plan, sites)
    thin = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if origin.library == "timm":
        stock, state, paths = translated(thin, record.class_names, rank)
    else:
        stock, state, paths = (
            _narrowed(thin, origin, rank),
            dict(thin.state_dict()),
            {a.path: a.path for a in attentions},
        )
    theirs = {s.path: s.attention for s in find_sites(stock).values() if isinstance(s, ProductSite)}
    for attention in attentions:
        their = theirs.get(paths[attention.path])
        if their is None or their.width != rank:
            raise StoreError(
                f"no stock export: {type(stock).__name__} does not read the width of its heads from config.head_dim; "
                "ViT, DeiT, DINOv2 and BEiT do"
            )
        _exchange_attention(state, thin, attention, stock, their, rank)
    if found := unlike(state, stock.state_dict()):
        raise StoreError(f"no stock export: {type(stock).__name__} does not hold what the model has: {listed(found)}")
    stock.load_state_dict(state)
    _compare(thin, stock)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    cast: Any = stock.to(dtype)
    cast.save_pretrained(folder, max_shard_size="1TB")
    processor = origin.preprocessor or (
        processor_config(Preprocess.from_dict(record.preprocess)) if record.preprocess else None
    )
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    return {
        "library": "transformers",
        "class": type(stock).__name__,
        "head_dim": rank,
        "image_processor": bool(processor),
    }


def uniform_rank(plan: Plan, sites: Sites) -> tuple[int, list[Attention]]:
    """The one rank of QK and VO in all attention layers, and these layers. Raises StoreError: which site breaks it."""
    if other := next((n for n in plan.sites if sites[n].kind == "linear"), None):
        raise StoreError(
            f"no stock export: {other} is a linear layer at low rank, which takes two layers; "
            "compress with only=('qk', 'vo')"
        )
    products = {n: s for n, s in sites.items() if isinstance(s, ProductSite)}
    if not products or not plan.sites:
        raise StoreError("no stock export: the plan shrinks no attention")
    rank = next(iter(plan.sites.values())).keep
    attentions: dict[str, Attention] = {}
    for name, site in products.items():
        entry = plan.sites.get(name)
        if entry is None:
            raise StoreError(
                f"no stock export: {name} stays at its full rank {site.full_rank}; every QK and VO must have one rank"
            )
        if entry.form != "product":
            raise StoreError(f"no stock export: {name} has the form {entry.form!r}, expected 'product'")
        if entry.keep != rank:
            first = next(iter(plan.sites))
            raise StoreError(
                f"no stock export: {name} has rank {entry.keep}, but {first} has {rank}; every QK and VO must have "
                "one rank: compress with ranks='equal'"
            )
        attentions[site.path] = site.attention
    for path in attentions:
        for kind in ("qk", "vo"):
            if f"{path}:{kind}" not in products:
                reason = next((r.reason for r in sites.refused if r.name == f"{path}:{kind}"), "it cannot shrink")
                raise StoreError(f"no stock export: {path}:{kind} keeps its width: {reason}")
    return rank, list(attentions.values())


def _narrowed(model: nn.Module, origin: Origin, rank: int) -> nn.Module:
    """A model of the same class whose heads have width ``rank``, with random weights."""
    config: Any = copy.deepcopy(model.config)
    config.head_dim = rank
    constructor = origin.arguments.get("constructor", {})
    try:
        with torch.random.fork_rng(devices=[]):
            return type(model)(config, **constructor).eval()
    except Exception as error:  # classes that do not know head_dim fail in ways of their own
        raise StoreError(
            f"no stock export: {type(model).__name__} cannot be built with head_dim {rank}: {first_line(error)}"
        ) from error


def _exchange_attention(
    state: dict[str, Tensor], thin: nn.Module, a: Attention, stock: nn.Module, their: Attention, rank: int
) -> None:
    """Put the weights of a low-rank attention into ``state`` under the names that ``stock`` has for them."""
    paths = {"q": their.q.path, "k": their.k.path, "v": their.v.path, "o": their.out}
    for letter, (weight, bias) in _parts(thin, a).items():
        factor = a.scale * math.sqrt(rank) if letter == "q" else 1.0
        name = paths[letter]
        expected: Tensor | None = getattr(stock.get_submodule(name), "bias", None)
        state[f"{name}.weight"] = (weight.detach().double() * factor).to(weight.dtype)
        if expected is not None:
            state[f"{name}.bias"] = (
                torch.zeros_like(expected) if bias is None else (bias.detach().double() * factor).to(bias.dtype)
            )
        elif bias is not None and bias.any():
            raise StoreError(
                f"no stock export: {a.path} needs a bias on its {letter} projection, "
                f"which {type(stock).__name__} lacks there"
            )
        else:
            state.pop(f"{name}.bias", None)


def _parts(thin: nn.Module, a: Attention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of the q, k, v and output projections of a low-rank attention whose two ranks are equal."""
    if a.mount == "whole":
        module: Any = thin.get_submodule(a.path)
        weights, bias = module.qkv.weight.split(module.widths), module.qkv.bias
        biases = (None, None, None) if bias is None else bias.split(module.widths)
        parts = dict(zip("qkv", zip(weights, biases, strict=True), strict=True))
        return {**parts, "o": (module.proj.weight, module.proj.bias)}
    linears: dict[str, Any] = {
        letter: thin.get_submodule(path)
        for letter, path in (("q", a.q.path), ("k", a.k.path), ("v", a.v.path), ("o", a.out))
    }
    return {letter: (linear.weight, linear.bias) for letter, linear in linears.items()}


def _compare(thin: nn.Module, stock: nn.Module) -> None:
    """Refuse a translation that does not compute the same, whatever the reason."""
    config: Any = stock.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, config.num_channels, height, width, generator=generator)
    with torch.inference_mode():
        ours, theirs = (_tensor(m(pictures)) for m in (thin, stock))
    error, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not error <= TOLERANCE * max(largest, 1e-6):
        raise StoreError(
            f"no stock export: {type(stock).__name__} gives other outputs than the model, "
            f"by {error:.3g} where the largest is {largest:.3g}"
        )


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits

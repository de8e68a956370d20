"""Checkpoints that plain transformers or timm loads, with no code of ours.

A config says one width of heads and one of feed-forwards for all layers. Several classes of transformers read a
head's width from their config (``head_dim``). A plan that brings QK and VO of all attention layers to one rank r
makes heads of width r, so such a class holds the weights as they are, but for its scale: it divides logits by √r
where ours multiplies them by the original scale s = 1/√k. So ``W_Q`` and ``b_Q`` are multiplied by s √r: ``s q kᵀ =
(s √r q) kᵀ / √r``. Key biases drop out of softmax and value biases were folded into the output's, so both are zero.
Fewer hidden units are plain narrower layers: ``intermediate_size`` or ``mlp_ratio`` says so.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import StoreError, listed
from ..files import write_tensors
from ..hosts import find_sites
from ..models import Origin, preprocess_of
from ..models.failures import required
from ..record import Record
from ..sites import Attention, ProductSite, Sites
from .narrower import narrower_timm, narrower_transformers
from .processor import processor_config
from .rebuilding import unlike
from .translation import translated
from .uniform import Shape, shape_of

TOLERANCE = 1e-4  # of outputs in float32, relative to the largest


def write_stock(
    model: nn.Module, origin: Origin, record: Record, sites: Sites, folder: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write config, weights and, where it is known, how pictures are prepared of a stock checkpoint; return what it is.

    Args:
        sites: of the model before compression. dtype: of the weights; None for the model's own.

    Raises StoreError where the plan or the architecture does not allow it; the message says why.
    """
    shape = shape_of(record.plan, sites)
    thin = copy.deepcopy(model).to("cpu", torch.float32).eval()
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    write = _write_timm if origin.library == "timm" and shape.rank is None else _write_transformers
    said = write(thin, origin, record, shape, folder, own if dtype is None else dtype)
    return {"head_dim": shape.rank, "hidden_units": next(iter(shape.units.values()), None), **said}


def _write_transformers(
    thin: nn.Module, origin: Origin, record: Record, shape: Shape, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    required("transformers")
    if origin.library == "timm":
        assert shape.rank is not None
        stock, state, paths = translated(thin, record.class_names, shape.rank)
    else:
        stock, state = narrower_transformers(thin, origin, shape), dict(thin.state_dict())
        paths = {a.path: a.path for a in shape.attentions}
    _exchange_all(state, thin, shape, stock, paths)
    _without_new_biases(state, stock, shape)
    config: Any = stock.config
    size = config.image_size
    pictures = _pictures(config.num_channels, (size, size) if isinstance(size, int) else size)
    cast: Any = _filled(stock, state, thin, pictures, dtype)
    cast.save_pretrained(folder, max_shard_size="1TB")
    processor = origin.preprocessor or (
        processor_config(Preprocess.from_dict(record.preprocess)) if record.preprocess else None
    )
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    return {"library": "transformers", "class": type(stock).__name__, "image_processor": bool(processor)}


def _write_timm(
    thin: nn.Module, origin: Origin, record: Record, shape: Shape, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """A folder as timm's ``local-dir:`` opens it. Heads keep their width there, which no argument of timm says."""
    stock, narrow = narrower_timm(thin, origin, shape)
    state = dict(thin.state_dict())
    _without_new_biases(state, stock, shape)
    prepared = Preprocess.from_dict(record.preprocess) if record.preprocess else preprocess_of(thin)
    _filled(stock, state, thin, _pictures(prepared.channels, prepared.size), dtype)
    write_tensors(folder / "model.safetensors", stock.state_dict())
    classes = narrow.arguments.get("num_classes", getattr(thin, "num_classes", None))
    arguments = {name: value for name, value in narrow.arguments.items() if name != "num_classes"}
    config = {"architecture": narrow.name, "num_classes": classes, "model_args": arguments}
    config["pretrained_cfg"] = {**narrow.pretrained_cfg, "num_classes": classes}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {"library": "timm", "class": type(stock).__name__, "mlp_ratio": narrow.arguments["mlp_ratio"]}


def _filled(
    stock: nn.Module, state: dict[str, Tensor], thin: nn.Module, pictures: Tensor, dtype: torch.dtype
) -> nn.Module:
    """The stock model with the weights in a type; refused where it does not hold them, or computes something else."""
    if found := unlike(state, stock.state_dict()):
        raise StoreError(f"no stock export: {type(stock).__name__} does not hold what the model has: {listed(found)}")
    stock.load_state_dict(state)
    _compare(thin, stock, pictures)
    return stock.to(dtype)


def _without_new_biases(state: dict[str, Tensor], stock: nn.Module, shape: Shape) -> None:
    """Leave out biases that refitting has created where the class has none, if they are zero; else refuse."""
    for site in shape.feedforwards.values():
        name = f"{site.down}.bias"
        if name in state and getattr(stock.get_submodule(site.down), "bias", None) is None:
            if state[name].any():
                raise StoreError(
                    f"no stock export: refitting {site.name} has created a bias of {site.down}, "
                    f"where {type(stock).__name__} has none"
                )
            del state[name]


def _exchange_all(
    state: dict[str, Tensor], thin: nn.Module, shape: Shape, stock: nn.Module, paths: Mapping[str, str]
) -> None:
    """Put the weights of all low-rank attention into ``state`` under the names that ``stock`` has for them."""
    theirs = {s.path: s.attention for s in find_sites(stock).values() if isinstance(s, ProductSite)}
    for attention in shape.attentions:
        their = theirs.get(paths[attention.path])
        if their is None or their.width != shape.rank:
            raise StoreError(
                f"no stock export: {type(stock).__name__} does not read the width of its heads from config.head_dim; "
                "ViT, DeiT, DINOv2 and BEiT do"
            )
        _exchange_attention(state, thin, attention, stock, their, their.width)


def _pictures(channels: int, size: Sequence[int]) -> Tensor:
    height, width = size
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


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


def _compare(thin: nn.Module, stock: nn.Module, pictures: Tensor) -> None:
    """Refuse a translation that does not compute the same, whatever the reason."""
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

"""timm's ViT and DeiT as the models of transformers that compute the same.

timm's ``VisionTransformer`` cannot be built with narrower heads, transformers' can.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StoreError
from ..modules.lowrank import LowRankAttention

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}


def translated(
    model: Any, class_names: tuple[str, ...] | None, rank: int
) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """A transformers model of random weights for a compressed ViT or DeiT of timm, with heads of width ``rank``.

    Returns it, the state that it shares with ``model`` under its own names (all but the attention's), and the path of
    each attention by that in ``model``. Raises StoreError for an architecture that transformers' ViT and DeiT cannot
    be; the message says what differs.
    """
    import transformers

    reason = next(_differences(model), None)
    if reason is not None:
        raise StoreError(
            f"no stock export: this {type(model).__name__} of timm is no plain ViT or DeiT of transformers: {reason}"
        )
    distilled = type(model).__name__ == "VisionTransformerDistilled"
    base = "deit" if distilled else "vit"
    cls: Any = (
        transformers.DeiTForImageClassificationWithTeacher if distilled else transformers.ViTForImageClassification
    )
    config: Any = cls.config_class(**_config(model, rank), **_labels(model, class_names))
    config.head_dim = rank
    with torch.random.fork_rng(devices=[]):
        stock = cls(config).eval()
    names = dict(_names(model, base, distilled))
    state = model.state_dict()
    renamed = {new: state[old] for old, new in names.items() if old in state}
    if f"{base}.embeddings.patch_embeddings.projection.bias" not in renamed:  # a convolution without bias
        renamed[f"{base}.embeddings.patch_embeddings.projection.bias"] = torch.zeros(model.embed_dim)
    paths = {f"blocks.{i}.attn": f"{base}.layers.{i}.attention" for i in range(len(model.blocks))}
    return stock, renamed, paths


def _differences(model: Any) -> Iterator[str]:
    """What sets a timm model apart from transformers' ViT and DeiT."""
    kind = type(model).__name__
    if kind not in ("VisionTransformer", "VisionTransformerDistilled"):
        yield "expected timm's VisionTransformer or VisionTransformerDistilled"
        return
    prefix = 2 if kind == "VisionTransformerDistilled" else 1
    if model.patch_embed.img_size is None:
        yield "it takes pictures of any size"
    if model.cls_token is None or model.num_prefix_tokens != prefix:
        yield f"it has {model.num_prefix_tokens} class and register tokens, expected {prefix}"
    if model.pos_embed is None or model.pos_embed.shape[1] != model.patch_embed.num_patches + prefix:
        yield "its position embedding does not cover all tokens"
    if model.global_pool != "token":
        yield f"it pools by {model.global_pool!r}, expected 'token'"
    for path in ("norm_pre", "fc_norm", "patch_embed.norm", "attn_pool"):
        module = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if not isinstance(module, nn.Identity | None):
            yield f"it has a {path}"
    for name in ("head", "head_dist")[:prefix]:
        if not isinstance(getattr(model, name), nn.Linear):
            yield f"its {name} is no linear layer"
    norms = [model.norm]
    for i, block in enumerate(model.blocks):
        norms += [block.norm1, block.norm2]
        yield from (f"blocks.{i}.{text}" for text in _block_differences(block, model.blocks[0]))
    if (
        any(type(n) is not nn.LayerNorm and type(n).__name__ != "LayerNorm" for n in norms)
        or len({n.eps for n in norms}) != 1
    ):
        yield "its norms are not LayerNorm with one epsilon"


def _block_differences(block: Any, first: Any) -> Iterator[str]:
    if type(block).__name__ != "Block":
        yield f"is a {type(block).__name__}, expected a Block"
        return
    attention = block.attn
    if not isinstance(attention, LowRankAttention) or attention.norm is not None or attention.gate is not None:
        yield f"attn is a {type(attention).__name__}, expected a low-rank attention without norm or gate"
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), nn.Identity):
            yield f"{name} scales the layer's output"
    mlp = block.mlp
    layers = [getattr(mlp, name, None) for name in ("fc1", "fc2")]
    if type(mlp).__name__ != "Mlp" or not all(
        isinstance(layer, nn.Linear) and layer.bias is not None for layer in layers
    ):
        yield f"mlp is a {type(mlp).__name__} with more or less than two linear layers"
    elif not isinstance(mlp.norm, nn.Identity):
        yield "mlp has a norm"
    elif type(mlp.act).__name__ not in _ACTIVATIONS or getattr(mlp.act, "approximate", "none") != "none":
        yield f"mlp has the activation {mlp.act}, expected one of {', '.join(_ACTIVATIONS)}"
    elif mlp.fc1.out_features != first.mlp.fc1.out_features or type(mlp.act) is not type(first.mlp.act):
        yield "mlp differs from that of the first block"


def _config(model: Any, rank: int) -> dict[str, Any]:
    block = model.blocks[0]
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": _ACTIVATIONS[type(block.mlp.act).__name__],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": block.attn.attention_dropout,
        "layer_norm_eps": model.norm.eps,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _labels(model: Any, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    count = model.head.out_features
    if class_names is None or len(class_names) != count:
        return {"num_labels": count}
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def _names(model: Any, base: str, distilled: bool) -> Iterator[tuple[str, str]]:
    """Names in timm's state dict, and what they are called in that of transformers."""
    embeddings = f"{base}.embeddings"
    yield from (("cls_token", f"{embeddings}.cls_token"), ("pos_embed", f"{embeddings}.position_embeddings"))
    pairs = [("patch_embed.proj", f"{embeddings}.patch_embeddings.projection"), ("norm", f"{base}.layernorm")]
    pairs.append(("head", "cls_classifier" if distilled else "classifier"))
    if distilled:
        yield "dist_token", f"{embeddings}.distillation_token"
        pairs.append(("head_dist", "distillation_classifier"))
    for i in range(len(model.blocks)):
        names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        pairs += [(f"blocks.{i}.{old}", f"{base}.layers.{i}.{new}") for old, new in names.items()]
    for old, new in pairs:
        yield from ((f"{old}.{part}", f"{new}.{part}") for part in ("weight", "bias"))

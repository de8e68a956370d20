"""Parameters, bytes on disk and multiply-accumulates: the same number on every machine."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ModelError
from ..wrappers import bare
from .running import call, checked, eagerly, evaluating, unwrap


def _distinct(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each stretch of memory once, under its first name; tensors without memory (meta, empty) by identity."""
    seen = set()
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name!r} has no shape yet; run one forward before measuring the model")
        pointer = tensor.data_ptr() if tensor.device.type != "meta" else 0
        key = (tensor.device, pointer, tensor.dtype, tensor.shape, tensor.stride()) if pointer else id(tensor)
        if key not in seen:
            seen.add(key)
            yield name, tensor


def count_parameters(model: nn.Module) -> int:
    """The number of weights, biases and other parameters; those that several modules share count once.

    Raises ModelError where a lazy parameter has no shape yet.
    """
    return sum(parameter.numel() for _, parameter in _distinct(bare(model).named_parameters()))


# What safetensors calls the types, in the order that it ranks them in (the largest type comes first in a file).
# fmt: off
_SAFETENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32",
    "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
}
# fmt: on


def size_on_disk(model: nn.Module, *, dtype: torch.dtype | None = None) -> int:
    """Bytes of the model's state dict as a safetensors file without metadata: header and data, shared tensors once.

    With ``dtype``, floating-point tensors of wider types count as that one. Nothing is written, so weights on any
    device, ``meta`` included, are measured alike. Raises ModelError for a type that safetensors cannot hold or a lazy
    parameter without a shape.
    """
    ranks = {kind: rank for rank, kind in enumerate(_SAFETENSORS)}
    state = model.state_dict(keep_vars=True)  # the tensors themselves, so that shared ones are recognised on meta too
    rows = []
    for name, tensor in _distinct((n, t) for n, t in state.items() if isinstance(t, Tensor)):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ranks:
            raise ModelError(f"{name!r} is of type {kind}, which safetensors cannot hold")
        size = tensor.element_size()
        if dtype is not None and tensor.is_floating_point() and dtype.itemsize < size:
            kind, size = str(dtype).removeprefix("torch."), dtype.itemsize
        rows.append((-ranks[kind], name, kind, tensor, size))
    header, end = {}, 0
    for _, name, kind, tensor, size in sorted(rows, key=lambda row: row[:2]):
        start, end = end, end + tensor.numel() * size
        header[name] = {"dtype": _SAFETENSORS[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / 8) * 8 + end


def count_macs(model: nn.Module, example: Tensor | tuple | list | Mapping) -> int:
    """Multiply-accumulates of one forward of one picture, the first of ``example``.

    ``example`` is pictures (batch, channels, height, width), or a tuple of positional or a mapping of keyword arguments
    with the batch first. Convolutions, linear layers, matrix products and attention count; elementwise work, softmax
    and normalisation do not (the papers' convention, who call MACs FLOPs). Attention counts in full, N² scores a head,
    whatever its mask and whichever kernel would run it. A compiled model counts as what was compiled.

    Raises DataError for an example without pictures, ModelError where the model fails on it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    bare(model)  # raises for what is no module
    one = tree_map_only(Tensor, lambda tensor: tensor[:1] if tensor.dim() else tensor, checked(example))
    # torch's counter knows products of matrices, not those with a vector.
    vectors = {
        torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
        torch.ops.aten.addmv: lambda base, matrix, vector, **_: 2 * math.prod(matrix),
        torch.ops.aten.dot: lambda left, right, **_: 2 * math.prod(left),
    }
    counter = FlopCounterMode(display=False, custom_mapping=vectors)
    # nn.MultiheadAttention's fast path is one operation that the counter cannot see into.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), eagerly(model), counter:
            call(unwrap(model), one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2

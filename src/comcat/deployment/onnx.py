"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ExportError, StoreError
from .graph import Traced, plain_attention
from .packages import chain, need, quiet, reason, version_of
from .settings import ExportSettings

INPUT = "images"
_MOST_BYTES = 2**31 - 2**20
"""A little less than a protocol buffer can hold."""

_LACKING = ("NOT_IMPLEMENTED", "Could not find an implementation", "is not a registered", "guarantees* support")
"""How ONNX Runtime says that it lacks an operator, or a version of them all."""


class Onnx:
    """See :class:`comcat.deployment.formats.Format`."""

    name, suffix, runtime = "onnx", ".onnx", "onnxruntime"

    def check(self, settings: ExportSettings) -> None:
        need("an export to onnx", "onnx", "onnxscript", "onnxruntime")

    def write(self, traced: Traced, path: Path, settings: ExportSettings, about: Mapping[str, Any]) -> None:
        import onnx

        graph = traced.graph
        if (size := _bytes(graph)) > _MOST_BYTES:
            raise ExportError(
                f"the model has {size / 2**30:.1f} GiB of weights, and a file of ONNX holds at most 2: "
                "export to torch, or in float16"
            )
        model = _tidied(_converted(traced, settings))
        _drop_unused_outputs(model)
        _name_sizes(model, graph.takes_pixels)
        for key, value in about.items():
            model.metadata_props.add(key=f"comcat.{key}", value=json.dumps(value, ensure_ascii=False))
        onnx.save(model, path)

    def quantise(
        self, traced: Traced, plain: Path, path: Path, settings: ExportSettings, calibration: list[np.ndarray]
    ) -> None:
        import onnx
        from onnxruntime import quantization as q

        options: dict[str, Any] = {
            "op_types_to_quantize": ["MatMul", "Gemm"],
            "per_channel": True,
            "weight_type": q.QuantType.QInt8,
            "extra_options": {"MatMulConstBOnly": True},  # products with weights, not those of attention
        }
        with quiet():
            if settings.calibrates:
                reader: Any = _Reader(calibration)
                # unsigned: the runtime carries a rounding on past reshapes, and knows none but unsigned numbers there
                options |= {"quant_format": q.QuantFormat.QDQ, "activation_type": q.QuantType.QUInt8}
                q.quantize_static(str(plain), str(path), reader, **options)
            else:
                q.quantize_dynamic(str(plain), str(path), **options)
        model = onnx.load(path)
        _store_convolutions(model)
        onnx.save(model, path)

    def open(self, path: Path, threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        need("an ONNX file", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        # Threads that wait by spinning take the time of what runs next, as of the model that this one is compared with.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _not_loaded(path, error) from error
        loaded: Any = session  # which may also give sequences and sparse tensors, as no model here does
        names = [output.name for output in session.get_outputs()]
        source = session.get_inputs()[0].name
        return lambda images: dict(zip(names, loaded.run(None, {source: images}), strict=True))

    def described(self, path: Path) -> dict[str, Any]:
        """What the file's own metadata say of preprocessing and classes."""
        need("an ONNX file", "onnxruntime")
        import onnxruntime

        try:
            found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta()
        except Exception as error:
            raise _not_loaded(path, error) from error
        entries = found.custom_metadata_map.items()
        return {k.removeprefix("comcat."): json.loads(v) for k, v in entries if k.startswith("comcat.")}


class _Reader:
    """Pictures for the calibration, one batch after another, as ONNX Runtime asks for them."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {INPUT: images}

    def __iter__(self) -> Any:
        return iter(self.get_next, None)


def _bytes(graph: torch.nn.Module) -> int:
    held = {t.data_ptr(): t for t in [*graph.parameters(), *graph.buffers()]}
    return sum(t.numel() * t.element_size() for t in held.values())


def _converted(traced: Traced, settings: ExportSettings) -> Any:
    """The graph in operators of ONNX. Raises ExportError for an operation that has none."""
    from torch.onnx.errors import OnnxExporterError

    try:
        with plain_attention(), quiet():
            converted = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                opset_version=settings.opset,
                input_names=[INPUT],
                output_names=list(traced.graph.names),
                verbose=False,
            )
    except (OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise _not_converted(error, type(traced.graph.model).__name__, settings.opset) from error
    assert converted is not None
    return converted.model_proto


def _tidied(model: Any) -> Any:
    """The graph without what was written down of its tracing. What follows from weights alone, as a positional
    embedding at the pictures' size, is reckoned now where that makes the file smaller.
    """
    from onnxscript import ir, optimizer

    for told in (*model.graph.node, *model.graph.value_info, *(n for f in model.functions for n in f.node)):
        del told.metadata_props[:]
        told.doc_string = ""
    folded = ir.from_proto(model)
    optimizer.fold_constants(folded, input_size_limit=_MOST_BYTES, output_size_limit=_MOST_BYTES)
    optimizer.remove_unused_nodes(folded)
    smaller = ir.to_proto(folded)
    return smaller if smaller.ByteSize() < model.ByteSize() else model


def _not_converted(error: Exception, label: str, opset: int) -> ExportError:
    for cause in chain(error):
        _, found, after = str(cause).partition("No ONNX function found for ")
        if found:
            operator = after.partition(". Failure")[0].split("'")
            name = operator[1] if len(operator) > 1 else operator[0]
            return ExportError(f"{label} uses {name}, for which ONNX has no operator in opset {opset}")
    return ExportError(f"{label} cannot be written as ONNX: {reason(chain(error)[-1])}")


def _store_convolutions(model: Any) -> None:
    """Keep the weights of convolutions in int8, one scale an output channel. They are computed with in float."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)
        held = weights.get(node.input[1]) if axis is not None else None
        grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
        if held is None or (axis and grouped) or (values := numpy_helper.to_array(held)).dtype != np.float32:
            continue
        others = tuple(i for i in range(values.ndim) if i != axis)
        scale = np.maximum(np.abs(values).max(others), 1e-12) / 127  # (output channels,)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        name = held.name
        held.CopyFrom(numpy_helper.from_array(np.rint(values / scale.reshape(shape)).astype(np.int8), name))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}_scale"], [f"{name}_float"], axis=axis))
        node.input[1] = f"{name}_float"
        del weights[name]  # one that two share would be read as it was
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _drop_unused_outputs(model: Any) -> None:
    """Attention has three outputs that nobody reads here, and TensorRT takes it with one alone."""
    read = {name for node in model.graph.node for name in node.input} | {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "Attention":
            while len(node.output) > 1 and node.output[-1] not in read:
                del node.output[-1]


def _name_sizes(model: Any, pixels: bool) -> None:
    """Sizes that vary are called batch, height and width, not by the number of torch's symbol."""
    words = ("batch", "height", "width", "channels") if pixels else ("batch", "channels", "height", "width")
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    names = {size.dim_param: word for size, word in zip(sizes, words, strict=True) if size.dim_param}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]


def _not_loaded(path: Path, error: Exception) -> ExportError | StoreError:
    text, runtime = str(error), version_of("onnxruntime")
    if any(words in text for words in _LACKING):
        said = reason(error).rpartition("failed:")[2]
        return ExportError(f"{runtime} lacks an operator of {path.name}: {said}; an older opset may do (--opset 20)")
    return StoreError(f"{path} cannot be loaded by {runtime}: {reason(error)}")

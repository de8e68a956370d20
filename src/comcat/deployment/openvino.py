"""Folders of OpenVINO, converted from ONNX."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, StoreError
from .graph import Traced
from .onnx import Onnx
from .packages import need, quiet, reason, version_of
from .settings import ExportSettings

MODEL = "openvino_model.xml"
_NO_OPERATION = ("Constant", "Parameter", "Result", "Convert")


class OpenVino:
    """See :class:`comcat.deployment.formats.Format`."""

    name, suffix, runtime = "openvino", "", "openvino"

    def check(self, settings: ExportSettings) -> None:
        need("an export to openvino", "onnx", "onnxscript", "openvino")
        if settings.quantises:
            need("int8 with to='openvino'", "nncf")

    def write(self, traced: Traced, path: Path, settings: ExportSettings, about: Mapping[str, Any]) -> None:
        path.mkdir()
        source = path / "model.onnx"
        Onnx().write(traced, source, settings, about)
        import openvino

        try:
            with quiet():
                model = openvino.convert_model(source)
        except Exception as error:
            label = type(traced.graph.model).__name__
            raise ExportError(f"{version_of('openvino')} cannot convert {label}: {reason(error)}") from error
        openvino.save_model(model, path / MODEL, compress_to_fp16=settings.precision == "float16")
        del model
        source.unlink()

    def quantise(
        self, traced: Traced, plain: Path, path: Path, settings: ExportSettings, calibration: list[np.ndarray]
    ) -> None:
        with quiet(), redirect_stdout(io.StringIO()):  # it draws bars
            import nncf
            import openvino

            model = runtime().read_model(plain / MODEL)
            others = [op.get_friendly_name() for op in model.get_ordered_ops() if not _is_product_with_weights(op)]
            quantised = nncf.quantize(
                model,
                nncf.Dataset(calibration),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
                ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            )
            path.mkdir()
            openvino.save_model(quantised, path / MODEL, compress_to_fp16=False)

    def open(self, path: Path, threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        need("a folder of OpenVINO", "openvino")
        # Where the processor can, OpenVINO would compute in bfloat16 unasked.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        try:
            model = runtime().compile_model(str(path / MODEL), "CPU", options)
        except Exception as error:
            raise StoreError(f"{path} cannot be loaded by {version_of('openvino')}: {reason(error)}") from error
        names = [output.get_any_name() for output in model.outputs]

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            said = model(images)
            return {name: np.array(said[i]) for i, name in enumerate(names)}

        return run

    def described(self, path: Path) -> dict[str, Any]:
        return {}


@cache
def runtime() -> Any:
    """The one OpenVINO runtime of this process, with its plugin for CPUs loaded.

    On processors with AMX that plugin gives the main thread a stack for signals, and takes it away when it goes. Of
    several that do not go in the reverse of their order, one leaves a stack that is no longer there: the next Ctrl-C
    would end the process.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return core


def _is_product_with_weights(op: Any) -> bool:
    """Whether an operation is a matrix product whose second factor is a constant."""
    if op.get_type_name() in _NO_OPERATION:
        return True  # nothing to leave out
    if op.get_type_name() != "MatMul":
        return False
    factor = op.input_value(1).get_node()
    while factor.get_type_name() in ("Convert", "Transpose", "Reshape"):
        factor = factor.input_value(0).get_node()
    return factor.get_type_name() == "Constant"

"""torch.export's programs (.pt2), run by PyTorch without the code of the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ExportError, StoreError
from .graph import Traced, trace
from .packages import need, quiet, reason
from .settings import ExportSettings

_ABOUT = "comcat.json"


class Program:
    """See :class:`comcat.deployment.formats.Format`."""

    name, suffix, runtime = "torch", ".pt2", "torch"

    def check(self, settings: ExportSettings) -> None:
        if settings.quantises:
            need("int8 with to='torch'", "torchao")

    def write(self, traced: Traced, path: Path, settings: ExportSettings, about: Mapping[str, Any]) -> None:
        with quiet():
            torch.export.save(traced.program, path, extra_files={_ABOUT: json.dumps(dict(about))})

    def quantise(
        self, traced: Traced, plain: Path, path: Path, settings: ExportSettings, calibration: list[np.ndarray]
    ) -> None:
        graph = copy.deepcopy(traced.graph)
        with quiet():
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(graph.model, Int8DynamicActivationInt8WeightConfig())
        self.write(trace(graph, traced.example, settings), path, settings, self.described(plain))

    def open(self, path: Path, threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        program, about = _loaded(path)
        module = program.module()
        names = about.get("outputs") or [f"output_{i}" for i in range(len(program.graph_signature.user_outputs))]

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                said = module(torch.from_numpy(images))
            return {name: tensor.numpy() for name, tensor in zip(names, said, strict=True)}

        return run

    def described(self, path: Path) -> dict[str, Any]:
        return _loaded(path)[1]


def _loaded(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """A program, and what was written with it."""
    about = {_ABOUT: ""}
    try:
        with quiet():
            if find_spec("torchao"):  # int8 weights are of a class of its
                import torchao  # noqa: F401
            program = torch.export.load(path, extra_files=about)
    except Exception as error:
        if "torchao" in str(error) and not find_spec("torchao"):
            raise ExportError(f"{path} is in int8 and needs torchao: pip install 'comcat[torchao]'") from error
        raise StoreError(f"{path} cannot be loaded by torch {torch.__version__}: {reason(error)}") from error
    return program, json.loads(about[_ABOUT] or "{}")

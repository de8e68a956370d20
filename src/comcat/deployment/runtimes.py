"""Exported files as modules: they run in their runtime, and are measured like any model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import DataError, StoreError
from ..files import home_path, parsed
from .formats import Format, Run, format_of
from .packages import reason, version_of

DESCRIPTION = "export.json"
"""The name of the description in an exported folder; beside ``small.onnx`` it is ``small.onnx.json``."""


class RuntimeModel(nn.Module):
    """An exported file in its runtime.

    ``forward`` takes pictures (batch, channels, height, width) float32, or pixels (batch, height, width, channels)
    uint8 where the graph normalises them, and gives one tensor, or several by name. Everything is on the CPU.

    Attributes:
        path, runtime: the file, and what runs it (``"onnxruntime 1.32.0"``). description: what was written beside it.
        num_classes: of a classifier; 0 for others.
    """

    def __init__(self, run: Run, path: Path, runtime: str, description: dict[str, Any]) -> None:
        super().__init__()
        self._run, self.path, self.runtime, self.description = run, path, runtime, description
        described = [output for output in description.get("outputs", ()) if isinstance(output, dict)]
        outputs = {output["name"]: output["shape"] for output in described}
        self.num_classes = int(outputs["logits"][-1]) if "logits" in outputs else 0

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        said = self.outputs(images)
        return next(iter(said.values())) if len(said) == 1 else said

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs by name."""
        try:
            said = self._run(images.detach().cpu().numpy())
        except Exception as error:
            expected = self.description.get("input", {}).get("shape")
            wanted = f", expected {expected}" if expected else ""
            raise DataError(
                f"{self.path.name} cannot run on pictures {tuple(images.shape)} {images.dtype}{wanted}: {reason(error)}"
            ) from error
        return {name: torch.as_tensor(value) for name, value in said.items()}

    @property
    def preprocess(self) -> Preprocess | None:
        """How pictures become its input, as the description says."""
        values = self.description.get("preprocess")
        return Preprocess.from_dict(values) if values else None

    def extra_repr(self) -> str:
        return f"{self.path}, {self.runtime}"


def open_exported(path: str | os.PathLike[str], *, threads: int | None = None) -> RuntimeModel:
    """An exported file or folder as a module, in the runtime of its format. ``threads`` are by default torch's.

    Raises StoreError if there is no such file or it is damaged, ExportError if the runtime is missing or lacks an
    operator of it.
    """
    place = home_path(path)
    form = format_of(place)
    if form is None or not place.exists():
        raise StoreError(f"{str(path)!r} is no exported file: expected a .onnx or .pt2 file or a folder of OpenVINO")
    return opened(form, place, read_description(place, form), threads)


def opened(form: Format, place: Path, description: dict[str, Any], threads: int | None) -> RuntimeModel:
    """What is at ``place``, loaded by the runtime of its format."""
    run = form.open(place, torch.get_num_threads() if threads is None else threads)
    return RuntimeModel(run, place, version_of(form.runtime), description)


def description_path(place: Path, form: Format) -> Path:
    return place.with_name(f"{place.name}.json") if form.suffix else place / DESCRIPTION


def read_description(place: Path, form: Format) -> dict[str, Any]:
    """What was written beside an export, or where that is lost, in it."""
    path = description_path(place, form)
    if not path.is_file():
        return form.described(place)
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    return found if isinstance(found, dict) and "preprocess" in found else form.described(place)

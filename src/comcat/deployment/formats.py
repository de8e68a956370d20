"""The formats there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ExportError
from .graph import Traced
from .onnx import Onnx
from .openvino import MODEL, OpenVino
from .program import Program
from .settings import ExportSettings

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Pictures to outputs by name."""


class Format(Protocol):
    """What a format knows of writing and running.

    Attributes:
        name: as ``to`` names it. suffix: of its files; empty if it is a folder. runtime: the library that runs it.
    """

    name: str
    suffix: str
    runtime: str

    def check(self, settings: ExportSettings) -> None:
        """Raise ExportError unless what the export needs is installed."""
        ...

    def write(
        self,
        traced: Traced,
        path: Path,
        settings: ExportSettings,
        about: Mapping[str, Any],
    ) -> None:
        """Write a traced graph to ``path``, with what ``about`` says if the format has room for it."""
        ...

    def quantise(
        self, traced: Traced, plain: Path, path: Path, settings: ExportSettings, calibration: list[np.ndarray]
    ) -> None:
        """Write to ``path`` what is at ``plain`` with matrix products in int8."""
        ...

    def open(self, path: Path, threads: int) -> Run:
        """Load what is at ``path``. Raises ExportError for an operator that it lacks, StoreError for damage."""
        ...

    def described(self, path: Path) -> dict[str, Any]:
        """What is written inside of preprocessing and classes, if there is room for it."""
        ...


FORMATS: dict[str, Format] = {form.name: form for form in (Onnx(), Program(), OpenVino())}


def format_of(path: Path) -> Format | None:
    """The format of an exported file or folder, by its name and what is in it; None for anything else."""
    if path.is_dir():
        return FORMATS["openvino"] if (path / MODEL).is_file() else None
    return next((form for form in FORMATS.values() if form.suffix and form.suffix == path.suffix), None)


def check_name(path: Path, form: Format) -> None:
    """Raise ExportError for an output whose name says another format."""
    if form.suffix and path.suffix != form.suffix:
        raise ExportError(f"got out={str(path)!r}, expected a name that ends in {form.suffix} for to={form.name!r}")
    if not form.suffix and path.suffix in {f.suffix for f in FORMATS.values() if f.suffix}:
        raise ExportError(f"got out={str(path)!r}, expected the name of a folder for to={form.name!r}")

"""The libraries of other runtimes: whether they are there, and what they say when they fail."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ..errors import ExportError

EXTRAS = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "openvino",
    "torchao": "torchao",
}
"""Library → the extra of comcat that brings it."""


def need(what: str, *libraries: str) -> None:
    """Raise ExportError unless the libraries are installed; it names the extra. Nothing is imported."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        extra = EXTRAS[missing[-1]]
        raise ExportError(f"{what} needs {' and '.join(missing)}: pip install 'comcat[{extra}]'")


def version_of(library: str) -> str:
    """A library's name with its version, for messages and files."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def reason(error: BaseException, most: int = 300) -> str:
    """What another library said, in one line: the first lines of its message that say anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3]) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}…"


def chain(error: BaseException) -> list[BaseException]:
    """An error with those that it came from."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk of their passes and of deprecations, some on the root logger: none of it is for users."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""Whether something can be written to a place, asked before the work that leads to it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import StoreError


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise StoreError unless files can be written into a folder, or the folder can be made. Leaves nothing behind."""
    nearest = Path(folder)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StoreError(f"nothing can be written to {str(folder)!r}: {error.strerror or error}") from error

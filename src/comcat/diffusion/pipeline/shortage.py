"""A device that runs out of memory, told in terms of what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import MemoryShortage

_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@contextmanager
def shortage_explained(doing: str, advice: list[str]) -> Iterator[None]:
    """Raises MemoryShortage in place of the device's own error; the message lists what would need less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _explained(doing, advice, error) from error
    except RuntimeError as error:  # what the CPU's and other devices' allocators raise
        if not any(words in str(error).lower() for words in _SAID):
            raise
        raise _explained(doing, advice, error) from error


def _explained(doing: str, advice: list[str], error: BaseException) -> MemoryShortage:
    reason = " ".join(str(error).split())[:160]
    return MemoryShortage(f"out of memory while {doing} ({reason}); what needs less: {'; '.join(advice)}")

"""What fails while a pipeline draws, told: memory in terms of what would fit, all else in terms of what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import ComcatError, MemoryShortage, ModelError, counted

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


@contextmanager
def failures_told(pipe: Any, steps: int | None, side: int | None) -> Iterator[None]:
    """Raises ModelError in place of whatever a pipeline itself raises, such as for a size or steps not made for it;
    None is what the pipeline does by default.
    """
    try:
        yield
    except (ComcatError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        taken = "its own number of steps" if steps is None else counted(steps, "step")
        raise ModelError(
            f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} cannot generate in {taken} at "
            f"{'its own size' if side is None else f'{side} pixels'}: {type(error).__name__}: {error}"
        ) from error

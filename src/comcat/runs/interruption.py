"""Ctrl-C during a long run: the step that is under way ends first, so that what it did can be kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

TWICE = 1.0
"""Seconds after which a second Ctrl-C counts. A terminal and a launcher both pass one on, so one arrives twice."""


class Interruption:
    """Notes Ctrl-C (SIGINT) while the block lasts. A second one raises KeyboardInterrupt at once.

    Outside the main thread, and where somebody else handles the signal, nothing changes.

    Args:
        active: whether to note it at all. notice: what to write to the standard error stream when it comes.
    """

    def __init__(self, *, active: bool, notice: str = "") -> None:
        self.active, self.notice = active, notice
        self._since: float | None = None
        self._before: Any = None

    @property
    def asked(self) -> bool:
        """Whether Ctrl-C came."""
        return self._since is not None

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        if self.active and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if self.notice:
                os.write(2, f"\n{self.notice}\n".encode())  # print is not safe in a handler
        elif time.monotonic() - self._since > TWICE:
            raise KeyboardInterrupt

"""Work done on pictures as they are read: by threads ahead of the reader, and in random order by a buffer."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from ..errors import DataError
from .decoding import decode
from .sources import Entry

T = TypeVar("T")

_SHUFFLE_BYTES = 64 * 2**20


def default_workers() -> int:
    """Threads that decode pictures when nobody says how many."""
    return min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What :func:`attempt` makes of a picture that cannot be read."""

    reason: str


def attempt(entry: Entry, work: Callable[[Image.Image], T]) -> T | Unreadable:
    """``work`` done on an entry's picture; it is unreadable if it cannot be decoded, or ``work`` raises DataError."""
    try:
        image = decode(entry.content)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        return Unreadable(f"{type(error).__name__}: {error}")
    try:
        return work(image)
    except DataError as error:
        return Unreadable(str(error))


def ahead(entries: Iterator[Entry], work: Callable[[Entry], T], workers: int) -> Iterator[tuple[Entry, T]]:
    """Each entry with the result of ``work``, in order; with several workers, a few entries ahead in threads."""
    if workers <= 1:
        yield from ((entry, work(entry)) for entry in entries)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Entry, Future[T]]] = deque()
    try:
        for entry in entries:
            waiting.append((entry, pool.submit(work, entry)))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def shuffle_buffer(entries: Iterator[Entry], seed: int) -> Iterator[Entry]:
    """The entries in a random order, as far as a buffer of ``_SHUFFLE_BYTES`` of encoded pictures reaches."""
    choose = random.Random(seed)
    buffer: list[Entry] = []
    held = 0
    for entry in entries:
        buffer.append(entry)
        held += _size(entry)
        while held > _SHUFFLE_BYTES and len(buffer) > 1:
            position = choose.randrange(len(buffer))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            out = buffer.pop()
            held -= _size(out)
            yield out
    choose.shuffle(buffer)
    yield from buffer


def _size(entry: Entry) -> int:
    return (len(entry.content) if isinstance(entry.content, bytes) else 0) + 512  # the rest of the entry, roughly

"""Which pictures belong to a sample, a side of a split or a process: chosen by their hashed keys alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SplitSide:
    """One side of a split: whether a key belongs to it."""

    salt: str
    fraction: float
    held_out: bool

    def __call__(self, key: str) -> bool:
        return (key_hash(self.salt + key) < self.fraction * 2**64) == self.held_out


@dataclass(frozen=True, slots=True)
class Share:
    """One of several equal shares by hashed key: whether a key belongs to it."""

    process: int
    processes: int

    def __call__(self, key: str) -> bool:
        return key_hash(f"share/{key}") % self.processes == self.process


def key_hash(text: str) -> int:
    """A number below 2**64 that depends on the text alone; names that are no UTF-8 have one too."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")

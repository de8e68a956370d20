"""What fewer tokens were measured to lose, kept in a folder, so that a run that was stopped measures only the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...files import parsed, write_json
from ...plan import SitePlan
from ...runs.state import fingerprint, take_in
from ...statistics.examples import Example

FILE = "divergences.json"


class Measurements:
    """Losses (nats a picture) by the entries of a plan that they were measured of.

    They hold for one model and the pictures that it was shown: of others the file is not read, and is written anew.

    Args:
        folder: where they are kept; None: nowhere.
    """

    def __init__(self, folder: Path | None, model: nn.Module, shown: Sequence[Example]) -> None:
        self.path = None if folder is None else folder / FILE
        self.of = "" if folder is None else f"{fingerprint(model)} {_fingerprint(shown)}"
        self.losses: dict[str, float] = {} if self.path is None else _read(self.path, self.of)

    def loss(self, entries: Mapping[str, SitePlan]) -> float | None:
        """What was measured of these entries, if it was."""
        return self.losses.get(_key(entries))

    def keep(self, entries: Mapping[str, SitePlan], loss: float) -> None:
        """Keep what was measured. Raises StoreError where the file cannot be written."""
        if self.path is None:
            return
        self.losses[_key(entries)] = loss
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"of": self.of, "losses": self.losses})


def _read(path: Path, of: str) -> dict[str, float]:
    try:
        said: Any = parsed(path.read_bytes())
        losses = said["losses"] if said["of"] == of else {}
        return {str(key): float(loss) for key, loss in losses.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # nothing that can be used: it is measured again


def _key(entries: Mapping[str, SitePlan]) -> str:
    said = {name: (e.form, e.keep, e.full, dict(e.details)) for name, e in entries.items()}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def _fingerprint(shown: Sequence[Example]) -> str:
    """Stands for pictures and what goes with them."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in tree_leaves([(example.images, dict(example.others or {})) for example in shown]):
        if isinstance(leaf, Tensor):
            take_in(digest, leaf)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()

"""Checkpoints of a run: folders that are written whole or not at all, the last few kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import StoreError
from ..files import parsed, read_tensors, whole_folder, write_json, write_tensors

_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint. ``state`` is what was given to :meth:`Checkpoints.save`."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under a name. Raises StoreError if they are missing or damaged."""
        return read_tensors(self.path / f"{name}.safetensors")

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, by the names that they were saved under. Raises StoreError if a file is damaged."""
        return {path.stem: read_tensors(path) for path in sorted(self.path.glob("*.safetensors"))}


def is_kept_under(folder: Path) -> bool:
    """Whether there is a whole checkpoint in a folder or its sub-folders, of whatever stage of a run."""
    return any(_NAME.fullmatch(state.parent.name) for state in folder.rglob(_STATE))


class Checkpoints:
    """The checkpoints in a folder, one sub-folder ``step-00000100`` each; only one process of a run writes.

    A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a kill or a full disk at
    any moment leaves the earlier ones whole.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write ``NAME.safetensors`` for each group of tensors, and ``state`` as JSON; forget all but the last few.

        Raises:
            StoreError: if it cannot be written, for example because the disk is full. Earlier checkpoints are
                unchanged.
        """
        target = self.folder / f"step-{step:08d}"
        try:
            self._clear_leftovers()
            with whole_folder(target) as new:
                for name, group in tensors.items():
                    write_tensors(new / f"{name}.safetensors", group)
                write_json(new / _STATE, dict(state))
        except (OSError, StoreError) as error:
            last = self.latest()
            kept = "there is no earlier one" if last is None else f"the last good one is {last.path}"
            raise StoreError(f"checkpoint {target} cannot be written: {error}; {kept}") from error
        for old in self._folders()[: -self.keep]:
            _forget(old)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none.

        Raises:
            StoreError: if its state cannot be read; the message says which to delete to go on from the one before.
        """
        folders = self._folders()
        if not folders:
            return None
        newest = folders[-1]
        try:
            state = parsed((newest / _STATE).read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise ValueError(f"{_STATE} holds no run's state")
        except (OSError, ValueError) as error:
            raise StoreError(f"{newest} is damaged ({error}); delete it to go on from the one before") from error
        return Checkpoint(newest, int(newest.name.removeprefix("step-")), state)

    def clear(self) -> None:
        """Forget all checkpoints, to begin anew."""
        for folder in reversed(self._folders()):  # killed half-way, the oldest are left, which a restart forgets again
            _forget(folder)
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))


def _forget(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, since a kill may come when only half of it is gone."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the settings of a checkpoint differ from those of this run, a phrase each: ``lr was 0.001, now 0.0001``."""
    names = sorted({*saved, *now})
    plain = json.loads(json.dumps(dict(now)))  # tuples come back from JSON as lists
    return [f"{n} was {saved.get(n)!r}, now {plain.get(n)!r}" for n in names if saved.get(n) != plain.get(n)]


def check_settings(checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Raises StoreError if a checkpoint was made with other settings; the message lists what differs."""
    made_with = checkpoint.state.get("settings")
    if not isinstance(made_with, dict):
        raise StoreError(
            f"{checkpoint.path} is damaged (it does not say its settings); delete it to go on from the one before"
        )
    if found := differences(made_with, now):
        raise StoreError(
            f"{checkpoint.path} was made with other settings: {'; '.join(found)}. "
            "Repeat the command as it was to go on, or begin anew with --restart"
        )

"""A saved model's folder: what it holds, what it says of itself, and when it may be replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import parsed, real_path, whole_folder

FORMAT = 1
WEIGHTS, PLAN, CONFIG, CARD, REPORT = "model.safetensors", "plan.json", "config.json", "README.md", "report.html"
FILES = (WEIGHTS, PLAN, CONFIG, CARD, REPORT)
RUN = frozenset({"checkpoints", "log.jsonl", "trackers"})
"""What training leaves in its folder before it saves a model there."""
STOCK_CONFIG = "comcat.json"  # of a stock export, whose config.json is the other library's


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_hash(config: Mapping[str, Any], name: str) -> str:
    """The hash of a config without its hash of itself, which it keeps under ``sha256`` and its own ``name``."""
    rest = {**config, "sha256": {k: v for k, v in config["sha256"].items() if k != name}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_config(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Write a config that knows the hashes of all files beside it, and its own."""
    hashes = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
    complete = {**config, "sha256": hashes}
    hashes[name] = own_hash(complete, name)
    (folder / name).write_text(json.dumps(complete, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def own_config(folder: Path) -> dict[str, Any] | None:
    """The config of a folder that comcat has written, stock exports included, or None for any other."""
    found = (_config_of(folder / name) for name in (STOCK_CONFIG, CONFIG))
    return next((config for config in found if config is not None), None)


def is_saved_model(folder: Path) -> bool:
    """Whether comcat has saved a model to a folder, stock exports excluded, which are the other library's."""
    return _config_of(folder / CONFIG) is not None


def _config_of(path: Path) -> dict[str, Any] | None:
    try:
        config = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "comcat_version" in config else None


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise StoreError if there is something at ``folder`` that must not be replaced."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file, expected a folder to save to")
    names = sorted(p.name for p in folder.iterdir())
    if set(names) <= RUN:
        return
    if own_config(folder) is None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise StoreError(f"{folder} was not written by comcat (it holds {shown}) and is not replaced; save to another")
    if not overwrite:
        raise StoreError(f"{folder} holds a saved model already; overwrite=True replaces it")


@contextmanager
def replacing(folder: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when the block ends without an error.

    Until then, and if anything fails or the process is killed, what was at ``folder`` stays whole. Files there that
    comcat did not write are carried over. Raises StoreError if ``folder`` is not ours to replace or cannot be written.
    """
    target = real_path(folder)
    with whole_folder(folder) as new:
        check_replaceable(target, overwrite)
        yield new
        _carry_over(target, new)


def _carry_over(target: Path, new: Path) -> None:
    """Give ``new`` what lies at ``target`` and is not comcat's: hard links, so that both stay whole."""
    if not target.is_dir():
        return
    ours = {CONFIG, STOCK_CONFIG, *(own_config(target) or {}).get("sha256", ())}
    for path in target.iterdir():
        if path.name in ours or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # some file systems have no hard links
        shutil.copy2(source, destination, follow_symlinks=False)

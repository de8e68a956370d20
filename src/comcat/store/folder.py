"""A folder written whole or not at all, and what such a folder says of itself."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import StoreError

FORMAT = 1
WEIGHTS, PLAN, CONFIG, CARD, REPORT = "model.safetensors", "plan.json", "config.json", "README.md", "report.html"
FILES = (WEIGHTS, PLAN, CONFIG, CARD, REPORT)
RUN = frozenset({"checkpoints", "log.jsonl", "trackers"})
"""What training leaves in its folder before it saves a model there."""
STOCK_CONFIG = "comcat.json"  # of a stock export, whose config.json is the other library's

_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}


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
    for name in (STOCK_CONFIG, CONFIG):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "comcat_version" in config:
            return config
    return None


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
    target = Path(os.path.realpath(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        check_replaceable(target, overwrite)
        new, lock = _new_sibling(target)
        try:
            yield new
            for path in new.iterdir():  # some libraries make files that nobody else can read
                path.chmod(stat.S_IMODE(new.stat().st_mode) & (0o777 if path.is_dir() else 0o666))
            _carry_over(target, new)
            _sync(new)
            _swap(new, target)
        finally:
            os.close(lock)
            shutil.rmtree(new, ignore_errors=True)  # after the swap: what stood at the target before
    except OSError as error:
        reason = "it is a mount point; save to a folder in it" if error.errno in (errno.EBUSY, errno.EXDEV) else error
        raise StoreError(f"cannot save to {folder}: {reason}; what was there is unchanged") from error


def surviving(folder: Path) -> Path:
    """``folder``, or what stood there before if a save was killed between two renames."""
    before = _before(Path(os.path.realpath(folder)))
    return before if not folder.exists() and before.is_dir() else folder


def _before(target: Path) -> Path:
    return target.with_name(f".{target.name}.comcat-before")


def _clean_up(target: Path) -> None:
    """Finish what killed saves to ``target`` left behind; a folder that is still being written to is locked."""
    before = _before(target)
    if before.is_dir():
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            os.rename(before, target)
    for leftover in target.parent.glob(f".{_escaped(target.name)}.comcat-*.tmp"):
        with suppress(OSError):
            lock = _lock(leftover, wait=False)
            try:
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _new_sibling(target: Path) -> tuple[Path, int]:
    """An empty folder beside ``target`` and the descriptor of its lock."""
    while True:
        new = target.with_name(f".{target.name}.comcat-{secrets.token_hex(6)}.tmp")
        new.mkdir()
        if target.is_dir():
            shutil.copymode(target, new)
        try:
            lock = _lock(new, wait=True)
        except FileNotFoundError:  # another save took it for a leftover before it was locked
            continue
        if new.is_dir():
            return new, lock
        os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int:
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait or error.errno not in (errno.EBADF, errno.ENOLCK, *_NO_EXCHANGE):
            os.close(descriptor)
            raise  # where folders cannot be locked, leftovers are left alone as well
    return descriptor


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


def _sync(folder: Path) -> None:
    """Make sure that all of a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` at ``target`` in one step; what stood there, if anything, is at ``new`` afterwards."""
    try:
        os.rename(new, target)  # nothing there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, target):  # two steps, and a name that readers know for the moment between
            before = _before(target)
            os.rename(target, before)
            try:
                os.rename(new, target)
            except OSError:
                os.rename(before, target)
                raise
            os.rename(before, new)
    _sync_entry(target.parent)


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system or its file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS are both 2
    calls: dict[str, Callable[..., int]] = {
        "renameat2": lambda f: f(here, names[0], here, names[1], exchange),
        "renamex_np": lambda f: f(*names, exchange),
    }
    for name, call in calls.items():
        function = getattr(libc, name, None)
        if function is None:
            continue
        if call(function) == 0:
            return True
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(b))
    return False

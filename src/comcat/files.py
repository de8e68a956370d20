"""Files and folders that are written whole or not at all.

What is new is written under a hidden name beside the old, brought to the disk, and then takes the old one's name in one
step. So whatever fails, a kill or a full disk included, what was there is unchanged. Errors of the system are raised as
StoreError.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

StrPath = str | os.PathLike[str]
_SHARED = "comcat_shared"
HASH = "sha256"
"""The key of a file's hash in its metadata."""
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
_LONGEST_NAME = 255  # bytes, of all usual file systems
NO_LOCKS = {errno.EBADF, errno.ENOLCK, *_NO_EXCHANGE}  # what a file system says that has no locks


def home_path(path: StrPath) -> Path:
    """A path with the home folder for ``~``, as far as that is known. Raises StoreError for what cannot be a path."""
    if not isinstance(path, str | os.PathLike):
        raise StoreError(f"got {path!r} ({type(path).__name__}), expected a path")
    if "\0" in (text := os.fsdecode(path)):
        raise StoreError(f"got {text!r}, which holds a NUL character: expected a path")
    if long := [name for name in text.split(os.sep) if len(os.fsencode(name)) > _LONGEST_NAME]:
        size = len(os.fsencode(long[0]))
        raise StoreError(f"got a name of {size} bytes in a path, {long[0][:20]!r}…: expected at most {_LONGEST_NAME}")
    return Path(os.path.expanduser(text))


def real_path(path: StrPath) -> Path:
    """A path from the root on, without links in it. Raises StoreError for what cannot be a path."""
    return Path(os.path.realpath(home_path(path)))


def check_writable(folder: StrPath) -> None:
    """Raise StoreError unless files can be written into a folder, or the folder can be made. Leaves nothing behind."""
    nearest = real_path(folder)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StoreError(f"nothing can be written to {str(folder)!r}: {error.strerror or error}") from error


@contextmanager
def whole_file(path: StrPath) -> Iterator[Path]:
    """A name to write a new file to, which takes the place of ``path`` when the block ends without an error.

    Folders above it are made. Raises StoreError where the system does not let it be written.
    """
    target = real_path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, expected the name of a file")
        new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.touch()
            mode = (target if target.exists() else new).stat().st_mode
            yield new
            new.chmod(stat.S_IMODE(mode))  # some libraries make files that nobody else can read
            _sync(new)
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}; what was there is unchanged") from error


def write_text(path: StrPath, text: str) -> None:
    """Write a text in UTF-8, with a question mark for what that cannot hold."""
    with whole_file(path) as new:
        new.write_bytes(text.encode("utf-8", errors="replace"))


def parsed(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds. Raises ValueError for what is none, and for lists in lists without end."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def write_json(path: StrPath, content: Any) -> None:
    """Write what JSON can hold."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors, such as a state dict, as safetensors. Tensors that are one in memory are written once.

    The metadata get a hash of all that is written, under ``sha256``. Raises StoreError for what safetensors cannot
    hold, and where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    written, shared = _apart(tensors)
    about = {"format": "pt"} if metadata is None else dict(metadata)
    about |= {_SHARED: json.dumps(shared)} if shared else {}
    with whole_file(path) as new:
        try:
            save_file(written, new, metadata={**about, HASH: _content_hash(written, about)})
            _order_metadata(new)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise StoreError(f"{path} cannot be written: {error}; what was there is unchanged") from error


def _order_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in the order of their names: the same content is the same file, byte for byte.

    The library writes them in an order that changes from run to run. Nothing moves, since the header keeps its length.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        old = file.read(length)
        header = json.loads(old)
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        new = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(new) == length:
            file.seek(8)
            file.write(new)


def read_tensors(path: StrPath) -> dict[str, Tensor]:
    """The tensors that :func:`write_tensors` wrote. Raises StoreError if the file is damaged."""
    tensors, metadata = read_tensors_and_metadata(path)
    try:
        shared = parsed(metadata.get(_SHARED, "{}"))
        return {**tensors, **{name: tensors[twin] for name, twin in shared.items()}}
    except (ValueError, KeyError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def read_tensors_and_metadata(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that a safetensors file holds, whoever wrote it. Raises StoreError if it is damaged or fails its hash."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read, it is damaged or no safetensors file: {error}") from error
    noted = metadata.get(HASH)
    if noted is not None and noted != _content_hash(tensors, {k: v for k, v in metadata.items() if k != HASH}):
        raise StoreError(f"{path} is damaged: its content is not what was written")
    return tensors, metadata


def _content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Stands for every name, shape, type and value, and for the metadata."""
    import torch

    whole = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors wants them, each with memory of its own, and the names of twins by the name written."""
    first, shared, storages = dict[tuple, str](), dict[str, str](), set[int]()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and (twin := first.setdefault(key, name)) != name:
            shared[name] = twin
            continue
        held = tensor.detach().to("cpu").contiguous()
        storage = held.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != held.numel() * held.element_size():
            held = held.clone()  # it was a view of something else
        storages.add(held.untyped_storage().data_ptr())
        apart[name] = held
    return apart, shared


def _check(name: str, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise StoreError(f"{name} cannot be saved: it is a {type(tensor).__name__}, expected a tensor")
    if tensor.is_meta:
        raise StoreError(f"{name} cannot be saved: it is on the meta device and has no values")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise StoreError(f"{name} cannot be saved: it is sparse or quantized, expected a dense tensor")


# ------------------------------------------------------------------------------------------------------------ folders


@contextmanager
def whole_folder(folder: StrPath) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when the block ends without an error.

    Until then, and if anything fails or the process is killed, what was at ``folder`` stays whole. Leftovers of killed
    writers are cleared away. Raises StoreError where the system does not let it be written.
    """
    target = real_path(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        new, lock = _new_sibling(target)
        try:
            yield new
            for path in new.iterdir():  # some libraries make files that nobody else can read
                path.chmod(stat.S_IMODE(new.stat().st_mode) & (0o777 if path.is_dir() else 0o666))
            for path in [*new.rglob("*"), new]:
                if not path.is_symlink():
                    _sync(path)
            _swap(new, target)
        except StoreError as error:
            raise StoreError(str(error).replace(str(new), str(folder))) from error
        finally:
            os.close(lock)
            shutil.rmtree(new, ignore_errors=True)  # after the swap: what stood at the target before
    except OSError as error:
        reason = "it is a mount point; save to a folder in it" if error.errno in (errno.EBUSY, errno.EXDEV) else error
        raise StoreError(f"cannot save to {folder}: {reason}; what was there is unchanged") from error


def surviving(folder: Path) -> Path:
    """``folder``, or what stood there before if a writer was killed between two renames."""
    before = _before(real_path(folder))
    return before if not folder.exists() and before.is_dir() else folder


def _before(target: Path) -> Path:
    return target.with_name(f".{target.name}.comcat-before")


def _clean_up(target: Path) -> None:
    """Finish what killed writers of ``target`` left behind; a folder that is still being written to is locked."""
    if (before := _before(target)).is_dir():
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            os.rename(before, target)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.comcat-*.tmp"):
        with suppress(OSError):
            lock = _lock(leftover, wait=False)
            try:
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _new_sibling(target: Path) -> tuple[Path, int]:
    """An empty folder beside ``target`` and the descriptor of its lock."""
    while True:
        new = target.with_name(f".{target.name}.comcat-{secrets.token_hex(6)}.tmp")
        new.mkdir()
        if target.is_dir():
            shutil.copymode(target, new)
        try:
            lock = _lock(new, wait=True)
        except FileNotFoundError:  # another writer took it for a leftover before it was locked
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
        if not wait or error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise  # where folders cannot be locked, leftovers are left alone as well
    return descriptor


def _sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk."""
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
    _sync(target.parent)


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
        if (function := getattr(libc, name, None)) is None:
            continue
        if call(function) == 0:
            return True
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(b))
    return False

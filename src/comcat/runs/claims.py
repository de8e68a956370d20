"""Places that one run at a time may write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import StoreError
from ..files import NO_LOCKS, real_path
from .processes import Processes


@contextmanager
def claimed(place: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a file or folder, whether it is there yet or not, to this run while the block lasts.

    The claim is a lock on a hidden file beside the place, so it ends with the process, however that ends. Where the
    file system has no locks, nothing is claimed.

    Raises:
        StoreError: at once, where another run has claimed the same place, or nothing can be written beside it.
    """
    target = real_path(place)
    if not target.name:
        raise StoreError(f"nothing can be written to {str(place)!r} itself, expected a folder in it")
    file = target.with_name(f".{target.name}.comcat-claim")
    missing = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file)
    except BlockingIOError:
        raise StoreError(
            f"another run is writing to {str(place)!r}; wait until it has ended, or name another place"
        ) from None
    except OSError as error:
        raise StoreError(f"nothing can be written to {str(place)!r}: {_reason(target, error)}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # before the lock goes: whoever opened it meanwhile sees that it is no longer there
        os.close(descriptor)
        for folder in missing:  # only those that are still empty go
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def claimed_by_main(place: str | os.PathLike[str] | None, processes: Processes) -> Iterator[None]:
    """:func:`claimed` for a run of several processes, all of which must call it: the main one claims for all of them.
    Without a place, nothing is.
    """
    with ExitStack() as stack:
        with processes.together():
            if place is not None and processes.main:
                stack.enter_context(claimed(place))
        yield


def _reason(target: Path, error: OSError) -> str:
    above = next((folder for folder in target.parents if folder.exists()), target)
    return f"{str(above)!r} is a file" if above.is_file() else error.strerror or str(error)


def _locked(file: Path) -> int:
    """The descriptor of a file that this process alone has locked. Raises BlockingIOError where another has."""
    import fcntl

    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)  # the run before has just ended and taken the file away

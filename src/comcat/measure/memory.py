"""The most memory that a forward needs at once, and memory that stays with the process."""

import ctypes
import platform
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .running import call, checked, eagerly, evaluating, tensors_in


class LiveBytes(TorchDispatchMode):
    """Follows every storage that the operations under it read or write, from its first sight to its release."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._watched: dict[int, weakref.ref] = {}
        for tensor in held:
            self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._watched:
            return

        def release(_: weakref.ref) -> None:
            del self._watched[key]
            self.live -= size

        self._watched[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result


def peak_memory(model: nn.Module, example: Tensor | tuple | list | Mapping) -> int:
    """The most bytes that a forward of ``example`` (the whole batch, evaluation mode, no gradients) needs at once.

    Weights, buffers and the example count as held throughout. On CUDA it is the allocator's ``max_memory_allocated``
    over a second forward, less what other models and data hold on the device; the allocator's peak statistic is reset.
    Elsewhere a ``TorchDispatchMode`` follows each tensor's storage from the operation that makes it to its release:
    the same number on every machine, though blind to scratch space inside a kernel and to what compiling saves. The
    process's resident size would not do: it counts the libraries and keeps pages that the allocator has freed.

    Raises DataError for an example without pictures, ModelError where the model fails on it.
    """
    tensors = tensors_in(example := checked(example))
    device = tensors[0].device
    held = [*model.parameters(), *model.buffers(), *tensors]
    with evaluating(model), torch.no_grad():
        if device.type != "cuda":
            with eagerly(model):
                call(model, example)  # tables that a model builds once are then held, not counted as they come
                with LiveBytes(held) as mode:
                    call(model, example)
            return mode.peak
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held if t.device == device)}
        call(model, example)  # tables, library handles and workspaces that come once and stay
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(model, example)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + sum(storages.values())


_MMAP_MAX, _TRIM_THRESHOLD, _MMAP_THRESHOLD = -4, -1, -3  # glibc's names of mallopt's parameters, malloc.h


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let the process keep what it frees, as it does under the allocators that services run with (jemalloc, tcmalloc).

    glibc gives large blocks back to the system at once, so that every layer's output is mapped page by page anew: that
    time is the same in a small model as in a large one. Does nothing under another C library,
    and little in another thread than the main one, whose blocks glibc always gives back.
    Afterwards what is free is given back, and blocks of up to 32 MiB (the most that glibc's own rule comes to) stay.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 2**16)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)

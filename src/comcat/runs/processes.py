"""The processes of a run, which accelerate or torchrun started: what they add up, and how they fail together."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ComcatError, SettingsError

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's words


class Processes:
    """This process among those of the run; all of them must call the same methods in the same order.

    What they tell each other here goes over the CPUs, so that nothing waits for an accelerator.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        """``cpu`` keeps to the CPU where there is an accelerator. Raises SettingsError without accelerate."""
        accelerate = require_accelerate()
        self.state: Any = accelerate.PartialState(cpu=cpu)
        if self.state.num_processes == 1 and (self.state.device.type == "cpu") != (cpu or not _accelerated()):
            accelerate.state.AcceleratorState._reset_state(True)  # an earlier run of this process was elsewhere
            self.state = accelerate.PartialState(cpu=cpu)
        self.count: int = self.state.num_processes
        self.index: int = self.state.process_index
        self.main: bool = self.index == 0
        self.device: torch.device = self.state.device
        alone = self.count == 1 or dist.get_backend() == "gloo"
        self._group: Any = None if alone else dist.new_group(backend="gloo")

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes."""
        if self.count == 1:
            return list(values)
        added = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(added, group=self._group)
        return added.tolist()

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place, by one reduction for all of them."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
        dist.all_reduce(flat)
        with torch.no_grad():
            for tensor, added in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(added.view_as(tensor))

    def share(self, value: Any) -> Any:
        """The main process's value, in all."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def agree(self, error: ComcatError | None = None) -> None:
        """Raise the error of the first process that has one in all of them, marked ``everywhere``."""
        if self.count == 1:
            if error is not None:
                raise error
        elif self.sums([error is not None])[0]:
            errors: list[Any] = [None] * self.count
            dist.all_gather_object(errors, error, group=self._group)
            first = next(e for e in errors if e is not None)
            first.everywhere = True
            raise first

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block whose errors, whichever process they are in, are raised in all at its end.

        It must not wait for other processes.
        """
        caught = None
        try:
            yield
        except ComcatError as error:
            if self.count == 1:
                raise
            caught = error
        self.agree(caught)

    def close(self) -> None:
        """Leave the others, at the very end."""
        if self.count > 1:
            self.state.destroy_process_group()


def _accelerated() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def require_accelerate() -> Any:
    """accelerate, imported now. Raises SettingsError if it is not installed."""
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise SettingsError(f"training needs the package: pip install 'comcat[train]' ({error})") from None


def open_accelerator(
    processes: Processes, precision: str = "fp32", trackers: Sequence[str] = (), folder: Path | None = None
) -> Any:
    """accelerate's Accelerator for these processes, spread as ``accelerate launch`` was told (DDP, FSDP2).

    Raises SettingsError for a precision or tracker that cannot be had here.
    """
    accelerate = require_accelerate()
    states = accelerate.state.AcceleratorState
    if states._shared_state and states().mixed_precision != _PRECISIONS[precision]:
        states._reset_state()  # an earlier run of this process had another; accelerate would refuse
    if precision == "fp16" and processes.device.type == "cpu":
        raise SettingsError("precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    if trackers and folder is None:
        raise SettingsError(f"trackers={', '.join(trackers)} need a folder to write to (out)")
    try:
        opened = accelerate.Accelerator(
            cpu=processes.device.type == "cpu",
            mixed_precision=_PRECISIONS[precision],
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
    except ValueError as error:
        raise SettingsError(f"accelerate cannot be set up so: {error}") from error
    lacking = set(trackers) - {str(getattr(kind, "value", kind)) for kind in opened.log_with}
    if lacking:
        raise SettingsError(f"tracker {sorted(lacking)[0]!r} is not installed")
    return opened

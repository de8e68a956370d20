"""Evaluation over all processes of a run: every picture counts once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..data import Pictures, Preprocess, batches
from ..errors import ComcatError, DataError
from ..measure import Evaluation, evaluate, model_output
from ..runs.processes import Processes


def evaluate_together(
    model: nn.Module,
    pictures: Pictures,
    preprocess: Preprocess,
    processes: Processes,
    *,
    batch_size: int,
    against: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Evaluation:
    """What :func:`comcat.measure.evaluate` says, with the pictures shared out among the processes; all must call it.

    Each process takes its own pictures (:meth:`Pictures.share <comcat.data.Pictures.share>`) and the sums are added up,
    so the result is that of one process up to the order of addition. The processes go forward in step, since the
    parameters of a sharded model are gathered in each forward: one that has run out of pictures keeps company with an
    empty one.

    Raises what ``evaluate`` raises, in all processes.
    """
    if processes.count == 1:
        return evaluate(model, batches(pictures, preprocess, batch_size=batch_size), against=against, dtype=dtype)
    share = pictures.share(processes.index, processes.count)
    blank = preprocess.blank()
    turns = _Turns(share, preprocess, batch_size, processes, model, blank)
    found, caught = None, None
    try:
        found = evaluate(model, turns, against=against, dtype=dtype)
    except ComcatError as error:
        if not (isinstance(error, DataError) and turns.given == 0 and turns.ended):  # it had none, which is fine
            caught = error
    if not turns.ended:
        turns.leave()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # it would wait for a backward, gathered
    processes.agree(caught)
    return _added(found, processes)


class _Turns:
    """The batches of one process, given out when all processes are there to go forward."""

    def __init__(
        self,
        share: Pictures,
        preprocess: Preprocess,
        batch_size: int,
        processes: Processes,
        model: nn.Module,
        blank: Tensor,
    ) -> None:
        self.share, self.preprocess, self.batch_size = share, preprocess, batch_size
        self.processes, self.model, self.blank = processes, model, blank
        self.given, self.ended = 0, False

    def __iter__(self) -> Iterator[Any]:
        own = iter(batches(self.share, self.preprocess, batch_size=self.batch_size)) if self._any() else iter(())
        while True:
            batch = next(own, None)
            going, failed = self.processes.sums([batch is not None, 0])
            if failed or not going:
                self.ended = True
                return
            if batch is None:
                home = next(self.model.parameters())
                model_output(self.model, self.blank.to(home.device, home.dtype))
                continue
            self.given += 1
            yield batch

    def _any(self) -> bool:
        """Whether the share holds a picture at all: few pictures may leave a process with none."""
        return next(iter(self.share.entries()), None) is not None

    def leave(self) -> None:
        """Tell the others, who wait for this process, that it has failed."""
        self.processes.sums([0, 1])
        self.ended = True


def _added(found: Evaluation | None, processes: Processes) -> Evaluation:
    """The evaluations of all processes as one."""
    names = [name for name in asdict(Evaluation(count=0)) if name != "count"]
    values = {} if found is None else asdict(found)
    count = float(values.get("count", 0))
    known = [values.get(name) is not None for name in names]
    weighted = [count * (values.get(name) or 0.0) for name in names]
    total, *rest = processes.sums([count, *known, *weighted])
    if not total:
        raise DataError("no pictures to evaluate on")
    sums = dict(zip(names, zip(rest[: len(names)], rest[len(names) :], strict=True), strict=True))
    return Evaluation(count=int(total), **{name: value / total for name, (has, value) in sums.items() if has})

"""The loop under every long run: steps, a bar, a watch on the loss, checkpoints, and going on after a stop.

A run says what a step does, and what a checkpoint must hold so that the run can go on. The loop does the rest:

    found = find_checkpoint(checkpoints, run.identity, processes, restart=restart)
    carry_out(run, processes, checkpoints=checkpoints, every=(500,), since=found, progress=True)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ComcatError, NumericsError, StoreError
from .checkpoints import Checkpoint, Checkpoints, check_settings
from .interruption import Interruption
from .processes import Processes
from .watching import LossWatch

FORMAT = 1
"""Of the checkpoints: what a run's state is called in ``state.json``. Checkpoints without a number are of format 1."""


NOTICE = "interrupted: this step ends and a checkpoint is kept; press Ctrl-C again to stop at once"


class Run(Protocol):
    """What a long run brings. All of its processes call every method, in the same order.

    Attributes:
        name: the word beside the bar. steps: how many there are in all.
        identity: plain data that a checkpoint must agree with for the run to go on from it.
    """

    name: str
    steps: int
    identity: Mapping[str, Any]

    def step(self, number: int, watch: LossWatch) -> Mapping[str, Any]:
        """Do step ``number``, counted from 0, and return what the bar shows.

        It shows its loss to ``watch`` before it changes anything. Whatever is random in it depends on ``number`` and
        the settings alone.
        """
        ...

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All tensors to go on with, in named groups; the first group holds the weights.

        The main process alone needs to have them.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """The rest of what is needed to go on, as JSON can hold it."""
        ...

    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take up what :meth:`tensors` and :meth:`state` gave after ``step`` steps.

        The main process alone is given tensors.
        """
        ...

    def after(self, done: int) -> None:
        """What else there is to do when so many steps are done and kept."""


def find_checkpoint(
    checkpoints: Checkpoints | None, identity: Mapping[str, Any], processes: Processes, *, restart: bool = False
) -> Checkpoint | None:
    """The checkpoint to go on from, the same one in all processes; None to begin anew. All processes must call it.

    Args:
        checkpoints: where to look; None finds nothing. restart: forget what is there.

    Raises:
        StoreError: for a checkpoint that is damaged, of another format, or of a run with another ``identity``.
    """
    found = None
    with processes.together():
        if checkpoints is not None and processes.main:
            if restart:
                checkpoints.clear()
            if (found := checkpoints.latest()) is not None:
                _check_format(found)
                check_settings(found, identity)
    return processes.share(found)


def _check_format(found: Checkpoint) -> None:
    number = found.state.get("format", 1)
    if number != FORMAT:
        raise StoreError(
            f"{found.path} is of format {number}, this version of comcat goes on from format {FORMAT}: "
            "go on with the version that wrote it, or begin anew with --restart"
        )


def carry_out(
    run: Run,
    processes: Processes,
    *,
    checkpoints: Checkpoints | None = None,
    every: Collection[int] = (),
    since: Checkpoint | None = None,
    progress: bool = False,
) -> None:
    """Do all steps of a run that are left. All processes must call it.

    With ``checkpoints``, Ctrl-C lets the step that is under way end and be kept, then raises KeyboardInterrupt, whose
    message names the checkpoint: the same call goes on from there.

    Args:
        checkpoints: where to keep the run: after the last step, and after each whose number is a multiple of one in
            ``every``.
        since: what :func:`find_checkpoint` found.
        progress: whether to show a bar, in the main process. Its estimate is the mean over this call's steps, all that
            is done between them included; steps of earlier calls do not count.

    Raises:
        NumericsError: for a loss that is no number or explodes, or weights that are no numbers when they are to be
            kept.
        StoreError: where a checkpoint cannot be written, or ``since`` does not hold what the run needs.
    """
    from tqdm.auto import tqdm

    watch, done = LossWatch(processes), 0
    if since is not None:
        done = since.step
        watch.last_good = _last_good(since.path)
        _restore(run, since, processes)
    shows = progress and processes.main
    bar = tqdm(total=run.steps, initial=done, desc=run.name, unit="step", smoothing=0, disable=not shows)
    interrupted = Interruption(active=checkpoints is not None, notice=NOTICE if shows else "")
    with bar, interrupted as interruption, torch.enable_grad():  # the caller may be in torch.no_grad()
        while done < run.steps:
            shown = run.step(done, watch)
            done += 1
            bar.set_postfix(shown, refresh=False)
            bar.update()
            stop = checkpoints is not None and bool(processes.sums([interruption.asked])[0])
            if checkpoints is not None and (stop or done == run.steps or any(done % n == 0 for n in every)):
                _keep(run, done, checkpoints, watch, processes)
            run.after(done)
            if stop:
                raise KeyboardInterrupt(f"after step {done} of {run.steps}; {watch.last_good}")


def _restore(run: Run, since: Checkpoint, processes: Processes) -> None:
    with processes.together():
        tensors = since.groups() if processes.main else {}
    try:
        run.restore(since.step, tensors, since.state)
    except (ComcatError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(
            f"{since.path} does not hold what this version of comcat goes on from ({reason}): "
            "go on with the version that wrote it, or begin anew with --restart"
        ) from error


def _keep(run: Run, done: int, checkpoints: Checkpoints, watch: LossWatch, processes: Processes) -> None:
    """Write a checkpoint, unless the weights hold NaN or infinity."""
    tensors, state = run.tensors(), run.state()
    with processes.together():
        if processes.main:
            for name, tensor in next(iter(tensors.values()), {}).items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise NumericsError(f"{name} holds NaN or infinity after step {done}; {watch.last_good}")
            path = checkpoints.save(done, tensors, {"format": FORMAT, "settings": dict(run.identity), **state})
            watch.last_good = _last_good(path)


def _last_good(path: object) -> str:
    return f"the last good checkpoint is {path}"

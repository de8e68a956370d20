"""Running a function in several processes at once, or in one that is killed or interrupted."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

# Forked, since they then need not import torch again. Nothing here has threads yet: tests compute in one.
_context = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns in each of ``count`` processes joined by gloo, as torchrun would start them.

    Raises AssertionError with the traceback of the first that fails, or if they take over two minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = _context.Queue()
    processes = [
        _context.Process(target=_run, args=(rank, count, port, results, work, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = pickle.loads(results.get(timeout=120))
            assert error is None, f"process {rank}:\n{error}"
            found[rank] = value
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(count)]


def _run(rank: int, count: int, port: int, results: Any, work: Callable[..., Any], arguments: tuple) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # what the tests before left
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        # Pickled here: torch would else pass tensors through memory that ends with this process.
        results.put(pickle.dumps((rank, work(*arguments), None)))
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def killed(when: Callable[[], bool], work: Callable[..., Any], *arguments: Any) -> None:
    """Run ``work`` in a process of its own, and kill it by SIGKILL as soon as ``when`` says so."""
    process = _context.Process(target=work, args=arguments)
    process.start()
    _wait(process, when)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def interrupted(when: Callable[[], bool], work: Callable[..., Any], *arguments: Any) -> str:
    """Run ``work`` in a process of its own and interrupt it, and all that it started, as Ctrl-C in a terminal does.

    Returns what the KeyboardInterrupt says that it ends with.
    """
    said = _context.Queue()
    process = _context.Process(target=_interruptible, args=(said, work, arguments))
    process.start()
    _wait(process, when)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 0, "it did not end by KeyboardInterrupt"
    return said.get(timeout=5)


def _interruptible(said: Any, work: Callable[..., Any], arguments: tuple) -> None:
    os.setpgrp()
    try:
        work(*arguments)
    except KeyboardInterrupt as interrupt:
        said.put(str(interrupt))
    else:
        raise AssertionError("it was not interrupted")


def _wait(process: Any, when: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not when():
        assert process.is_alive() and time.monotonic() < end, "it ended before it could be stopped"
        time.sleep(0.002)

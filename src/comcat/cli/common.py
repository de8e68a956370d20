"""What the verbs share: common options, loading, checks and timing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from ..errors import ComcatError, SettingsError

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every verb takes."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()
    """Fields of which any given on the command line replaces them all in a recipe."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    pretrained: bool = True
    """Load the model's published weights (--no-pretrained: random ones, to look at structure and speed)."""
    seed: int = 0
    """Seed of everything random: which pictures, sampled labels, random weights."""


def load(command: Common, spec: str) -> Any:
    import torch

    from ..store import load_model

    torch.manual_seed(command.seed)
    return load_model(
        spec, pretrained=command.pretrained, device=pick_device(command.device), dtype=getattr(torch, command.dtype)
    )


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "meta":
        raise SettingsError("got --device 'meta', which holds no values; expected auto, cpu, cuda, cuda:1 or mps")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"got --device {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    return name


def in_processes(device: str, body: Callable[[Any], int], folder: Path) -> int:
    """Run the body of a verb in each of the processes that a launcher started; only the main one says what went wrong.

    ``folder`` is where an interrupted run finds its checkpoints again.
    """
    from ..runs.checkpoints import is_kept_under
    from ..runs.processes import Processes

    processes = Processes(cpu=pick_device(device) == "cpu")
    try:
        return body(processes)
    except ComcatError as error:
        if getattr(error, "everywhere", False) and not processes.main:
            return 1
        raise
    except KeyboardInterrupt:
        if processes.main:
            kept = is_kept_under(folder)
            way = f"goes on from the last checkpoint in {folder}" if kept else "begins anew, for no checkpoint was kept"
            print(f"comcat: interrupted; the same command {way}", file=sys.stderr)
        return 130
    finally:
        processes.close()


def command_line() -> str:
    """What was typed, to be shown and repeated."""
    return "comcat " + shlex.join(sys.argv[1:])

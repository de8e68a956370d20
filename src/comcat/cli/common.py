"""What the verbs share: common options, loading, checks and timing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from ..errors import ComcatError, SettingsError
from ..files import check_writable

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


def at_least_one(option: str, value: int | None) -> None:
    """Raises SettingsError for an option's number below 1."""
    if value is not None and value < 1:
        raise SettingsError(f"got {option} {value}, expected at least 1")


class Loader:
    """Pictures to batches for one model's preprocessing."""

    def __init__(self, preprocess: Any, batch_size: int) -> None:
        self.preprocess, self.batch_size = preprocess, batch_size
        at_least_one("--batch-size", batch_size)

    def __call__(self, pictures: Any) -> Any:
        from ..data import batches

        return batches(pictures, self.preprocess, batch_size=self.batch_size)


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


def time_models(models: dict[str, Any], example: Any, command: Any) -> Any:
    import torch

    from ..measure import benchmark

    p = next(next(iter(models.values())).parameters())
    size = command.batch_size
    if len(example) != size:
        example = torch.randn(size, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return benchmark(
        models, example.to(p), repeats=getattr(command, "repeats", 10), compile=getattr(command, "compile", False)
    )


def check_out(out: Path, overwrite: bool) -> None:
    """Raises unless a model may be saved to a folder and can be; what a run that was stopped has left there is no hindrance."""
    from ..store.folder import RUN, check_replaceable

    if out.is_file():
        raise SettingsError(f"--out {str(out)!r} is a file, expected a folder to write to")
    check_writable(out)
    if out.is_dir() and not {p.name for p in out.iterdir()} <= RUN and not overwrite:
        raise SettingsError(
            f"--out {str(out)!r} is not empty; say --overwrite to replace an earlier result, or name another folder"
        )
    check_replaceable(out, overwrite=True)


def in_processes(device: str, body: Callable[[Any], int], folder: Path) -> int:
    """Run the body of a verb in each of the processes that a launcher started; only the main one says what went wrong.

    ``folder`` is where an interrupted run finds its checkpoints again.
    """
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
            print(
                f"comcat: interrupted; the same command goes on from the last checkpoint in {folder}", file=sys.stderr
            )
        return 130
    finally:
        processes.close()


def open_for(model: Any, spec: str, notes: list[str]) -> Any:
    """Pictures labelled as the model counts its classes; what there is to say about it joins the notes."""
    from ..models import in_classes_of

    pictures, note = in_classes_of(model, spec)
    if note is not None:
        notes.append(note)
    return pictures


def skip_notes(pictures: Any) -> list[str]:
    return (
        [f"{len(pictures.skipped)} unreadable pictures were skipped, the first: {pictures.skipped[0]}"]
        if pictures.skipped
        else []
    )


def command_line() -> str:
    """What was typed, to be shown and repeated."""
    return "comcat " + shlex.join(sys.argv[1:])


def plain_settings(command: Any) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(command).items() if v is not None}

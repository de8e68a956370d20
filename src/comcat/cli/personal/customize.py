"""``comcat customize``: teach a text-to-image pipeline a concept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...diffusion.learn.settings import CustomizeSettings
from ...errors import counted
from ...files import home_path
from ...settings import part_of
from ..common import Positional, in_processes
from .pipelines import PipelineCommand, open_pipeline


@dataclass(frozen=True, kw_only=True)
class Customize(PipelineCommand, CustomizeSettings):
    """Teach a text-to-image pipeline a concept from a few pictures: a small adapter on its attention."""

    model: Positional[str]
    """OWNER/NAME on the hub, or a folder that diffusers saved."""
    images: Path
    """Folder of 4 to 12 pictures of the concept, or one picture."""
    prompt: str
    """What they show, with the identifier: "a photo of V* dog"."""
    out: Path
    """File to save the adapter to, dog.safetensors; checkpoints, samples and report.html go to dog.run."""
    identifier: str = "V*"
    """The word that will call the concept."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    restart: bool = False
    """Begin anew instead of going on from the last checkpoint."""


def run(command: Customize) -> int:
    from ...diffusion.learn.run_folder import folder_of

    return in_processes(command.device, lambda processes: _run(command, processes), folder_of(command.out))


def _run(command: Customize, processes: Any) -> int:
    from ...data import open_pictures
    from ...diffusion.draw.prompts import prompts_given
    from ...diffusion.learn.customize import Customization
    from ...diffusion.learn.run_folder import check_out, folder_of

    settings = part_of(CustomizeSettings, command)
    with processes.together():
        # a pipeline may take minutes to open: what is wrong with these is told before
        prompts_given(command.prompt, command.identifier)
        open_pictures(command.images)
        check_out(home_path(command.out))
        pipe = open_pipeline(command, command.model, processes.device if processes.count > 1 else None)
        work = Customization(
            pipe, command.images, command.prompt, command.identifier, "default", settings, command.out, True
        )
    if processes.main:
        for note in (*work.notes, *work.facts):
            print(f"Note: {note}")
    adapter = work.run(command.restart)
    if processes.main and work.optimisation is not None:
        done = work.optimisation.progress
        print(
            f"\nLearned {command.identifier} in {counted(done.step, 'step')} ({done.seconds:.0f} s now), "
            f"{sum(p.numel() for p in adapter.parameters()):,} parameters."
        )
        size = command.out.stat().st_size / 1e6
        report = folder_of(command.out) / "report.html"
        print(f"Saved to {command.out} ({size:.2f} MB)" + (f"; report: {report.resolve()}" if report.exists() else ""))
    return 0

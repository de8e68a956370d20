"""What a training run leaves beside its adapter: sheets of samples and a report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..._version import __version__
from ...errors import SettingsError, StoreError, counted
from ...files import check_writable
from ..adapter.files import is_adapter
from ..draw.generate import generate
from ..draw.pages import Page, Sheet, write_page
from ..draw.pictures import grid, read_made, save_picture
from .optimisation import Progress
from .settings import CustomizeSettings


def check_out(out: Path) -> Path:
    """The file to save to. Raises SettingsError or StoreError if it cannot be one."""
    if out.suffix != ".safetensors":
        raise SettingsError(f"out: got {str(out)!r}, expected a file name that ends in .safetensors")
    if out.is_dir():
        raise SettingsError(f"out: {str(out)!r} is a folder, expected a file to write to")
    if out.exists() and not is_adapter(out):
        raise StoreError(f"out: {str(out)!r} is there already, and is no adapter of comcat's; name another file")
    check_writable(out.parent)
    return out


def folder_of(out: Path) -> Path:
    """The folder of the run that writes ``dog.safetensors``: ``dog.run`` beside it."""
    return out.with_suffix(".run")


def samples_in(folder: Path) -> Path:
    """Where a run keeps its sheets of samples."""
    return folder / "samples"


def class_in(folder: Path) -> Path:
    """Where a run keeps the pictures of the class that it made."""
    return folder / "class"


def forget_pictures(folder: Path) -> None:
    """Delete the pictures that a run made, to begin anew."""
    for made in (samples_in(folder), class_in(folder)):
        shutil.rmtree(made, ignore_errors=True)


class Samples:
    """Sheets of pictures of one prompt, always with the same seeds, as training goes on."""

    def __init__(self, pipe: Any, folder: Path, prompt: str, settings: CustomizeSettings) -> None:
        self.pipe, self.folder, self.prompt = pipe, samples_in(folder), prompt
        self.how = {
            "count": settings.sample_count,
            "seed": settings.seed,
            "steps": settings.sample_steps,
            "guidance": settings.sample_guidance,
        }

    def draw(self, step: int) -> Path:
        """Generate the sheet of a step."""
        pictures = [generated.image for generated in generate(self.pipe, self.prompt, **self.how)]
        path = self.folder / f"step-{step:08d}.png"
        save_picture(grid(pictures), path, {"prompt": self.prompt, "step": step, "seed": self.how["seed"]})
        return path

    def sheets(self) -> list[Sheet]:
        """What was drawn so far, earlier runs included."""
        found = []
        for path in sorted(self.folder.glob("step-*.png")):
            with Image.open(path) as sheet:
                picture = sheet.convert("RGB")
            prompt = (read_made(path) or {}).get("prompt", self.prompt)
            of = "" if prompt == self.prompt else f", of {prompt!r}"  # drawn before the run was asked for another
            found.append(Sheet(f"Step {int(path.stem.removeprefix('step-'))}{of}", [picture]))
        return found


def write_report(
    out: Path,
    settings: CustomizeSettings,
    progress: Progress,
    *,
    samples: Samples,
    examples: Sequence[Image.Image],
    identifier: str,
    about: Mapping[str, Any],
    notes: Sequence[str],
) -> Path:
    """Write the ``report.html`` of the run to ``out``: the concept, the samples, the loss, what it is ``about``."""
    losses = progress.losses
    curve = {
        "x": list(range(1, len(losses) + 1)),
        "y": running_mean(losses),
        "x_label": "step",
        "y_label": "loss, mean of the last 50",
    }
    page = Page(
        title=f"{identifier}, learned from {counted(len(examples), 'picture')}",
        sheets=[Sheet("What it learns from", list(examples[:12])), *samples.sheets()],
        curves=[curve] if losses and find_spec("matplotlib") else [],
        facts={"identifier": identifier, **about, "pictures": len(examples), **_facts(out, settings, progress)},
        notes=notes,
    )
    return write_page(page, folder_of(out) / "report.html")


def _facts(out: Path, settings: CustomizeSettings, progress: Progress) -> dict[str, Any]:
    """The settings of a run, how far it is or how large its file has become, and what it ran on."""
    facts: dict[str, Any] = {k: v for k, v in asdict(settings).items() if v is not None}
    if progress.step < settings.steps or not out.is_file():
        facts["so far"] = f"{progress.step} of {settings.steps} steps"
    else:
        facts["size of the adapter"] = f"{out.stat().st_size / 1e6:.2f} MB"
    facts["seconds in steps"] = f"{progress.seconds:.1f}"
    return facts | {"comcat": __version__, "torch": torch.__version__}


def running_mean(values: Sequence[float], window: int = 50) -> list[float]:
    """The mean of each value and those before it, ``window`` at most."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means

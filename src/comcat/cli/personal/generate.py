"""``comcat generate``: pictures from prompts, with adapters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from ...diffusion.draw.settings import GenerateSettings
from ...errors import SettingsError, counted
from ...files import check_writable, home_path
from ..common import Positional
from .pipelines import PipelineCommand, open_pipeline

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Generate(PipelineCommand, GenerateSettings):
    """Generate pictures from prompts. Pictures that are there already, made with the same settings, are kept."""

    model: Positional[str]
    """OWNER/NAME on the hub, or a folder that diffusers saved."""
    out: Path
    """Folder for the PNG files; each says in its metadata how it was made."""
    prompt: Repeated = ()
    """A prompt; may be repeated."""
    prompts: Path | None = None
    """Text file of prompts, one a line."""
    adapter: Repeated = ()
    """An adapter, FILE or FILE:SCALE; may be repeated."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    overwrite: bool = False
    """Replace pictures that were made in another way."""


def run(command: Generate) -> int:
    from ...diffusion import load
    from ...diffusion.adapter.files import read
    from ...diffusion.adapter.scale import check_scale
    from ...diffusion.draw.generate import generate_to
    from ...diffusion.draw.prompts import notes_before_drawing, notes_on_calls, read_prompts, texts

    prompts = [*command.prompt, *(read_prompts(command.prompts) if command.prompts is not None else [])]
    if not prompts:
        raise SettingsError("got no prompt; give --prompt TEXT or --prompts FILE")
    chosen = [parse_adapter(text) for text in command.adapter]
    texts(prompts, "prompt")
    check_writable(command.out)
    for path, scale in chosen:  # a pipeline may take minutes to open: what is wrong with these is told before
        read(path)
        check_scale(scale)
    pipe = open_pipeline(command, command.model)
    used: list[dict[str, Any]] = []
    for path, scale in chosen:
        name = free_name(path.stem, [a["name"] for a in used])
        adapter = load(pipe, path, name=name, scale=scale)
        used.append({"name": name, "scale": scale, "content": digest(path)})
        if (identifier := adapter.record.identifier) is not None:
            for note in notes_on_calls(pipe, prompts, identifier):
                print(f"Note on {path}: {note}")
    for note in notes_before_drawing(pipe, [*prompts, *([command.negative] if command.negative else [])]):
        print(f"Note: {note}")
    settings = {f.name: getattr(command, f.name) for f in fields(GenerateSettings)}
    about = {"model": command.model, "dtype": command.dtype, "adapters": used}
    written = generate_to(
        command.out, pipe, prompts, about=about, overwrite=command.overwrite, progress=True, **settings
    )
    new = len(written.paths) - written.kept
    print(f"{counted(new, 'picture')} generated, {written.kept} were there; {command.out}")
    if written.flagged:
        print(f"{written.flagged} of them are black: the pipeline's safety checker flagged them.")
    return 0


def parse_adapter(text: str) -> tuple[Path, float]:
    """``dog.safetensors:0.8`` as file and scale; without a scale, 1."""
    path, colon, scale = text.rpartition(":")
    if not colon or home_path(text).exists():
        return home_path(text), 1.0
    try:
        return home_path(path), float(scale)
    except ValueError:
        raise SettingsError(f"--adapter: got {text!r}, expected FILE or FILE:SCALE, as dog.safetensors:0.8") from None


def free_name(stem: str, taken: list[str]) -> str:
    """The file's name without its ending; with a number where another adapter has it."""
    names = [stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def digest(path: Path) -> str:
    """Stands for a file's content: an adapter that was trained anew gives other pictures under the same name."""
    import hashlib

    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()

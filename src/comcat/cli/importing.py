"""``comcat import``: what the paper's published code has written, as files of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import SettingsError, counted
from .common import Positional


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read what COMCAT's published code has written: a compressed model, or an adapter. No code in the file is run."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()

    file: Positional[Path]
    """Its checkpoint.pth, or its comcat_weight.pt."""
    out: Path
    """Folder to save a model to; a file, dog.safetensors, for an adapter."""
    base: str = "timm:deit_small_patch16_224"
    """Of a model: the architecture before compression."""
    ranks: Path | None = None
    """Of a model: its ranks.txt, to compare with the weights."""
    pipeline: str | None = None
    """Of an adapter: the pipeline that it was trained on, a folder or a name on the hub."""
    overwrite: bool = False
    """Replace what is at --out."""


def run(command: Import) -> int:
    adapter = command.out.suffix == ".safetensors"
    if adapter and command.pipeline is None:
        raise SettingsError(f"got --out {command.out}, an adapter's; expected --pipeline, the one it was trained on")
    if not adapter and command.pipeline is not None:
        raise SettingsError(f"got --pipeline, which adapters have, and --out {command.out}; expected FILE.safetensors")
    if not command.file.is_file():
        raise SettingsError(f"there is no file {str(command.file)!r}, expected a checkpoint.pth or comcat_weight.pt")
    return _adapter(command, str(command.pipeline)) if adapter else _model(command)


def _model(command: Import) -> int:
    from ..measure import count_parameters
    from ..store import import_paper, save
    from ..workflows.places import check_out

    check_out(command.out, command.overwrite)
    model: Any = import_paper(command.file, command.ranks, command.base)
    folder = save(model, command.out)
    smaller = counted(len(model.comcat_record.plan.sites), "site")
    print(f"{count_parameters(model):,} parameters, {smaller} smaller than in {command.base}.\nSaved to {folder}")
    return 0


def _adapter(command: Import, pipeline: str) -> int:
    from ..diffusion import import_paper, load_pipeline, save
    from ..files import check_writable

    if command.out.exists() and not command.overwrite:
        raise SettingsError(f"{str(command.out)!r} exists; --overwrite replaces it")
    check_writable(command.out.parent)
    pipe = load_pipeline(pipeline)
    adapter = import_paper(command.file, pipe, name="default")
    print(f"An adapter of rank {adapter.rank} on {counted(len(adapter.modules), 'attention')}.\n"
        f"Saved to {save(pipe, command.out, base=pipeline)}")  # fmt: skip
    return 0

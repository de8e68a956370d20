"""Loading a text-to-image pipeline by name or folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelError, nearest
from ...models.failures import first_line, loading_failure

_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_pipeline(
    spec: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A pipeline of diffusers: the name of one on the hub, or a folder that ``save_pretrained`` wrote.

    Raises:
        ModelError: if there is none, a part of it is missing or damaged, or the hub cannot be reached.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ModelError(f"pipelines need diffusers: pip install 'comcat[diffusion]' ({error})") from None
    text = os.fspath(spec).removeprefix("hf:")
    place = Path(text).expanduser()
    local = place.is_dir()
    if local:
        _check_folder(place)
    elif not _ON_THE_HUB.fullmatch(text):
        beside = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        raise ModelError(
            f"there is no folder {text!r}; expected one that save_pretrained wrote, or OWNER/NAME on the hub"
            f"{nearest(place.name, beside)}"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(str(place) if local else text, dtype=dtype)
    except Exception as error:  # every library below raises its own kinds
        raise loading_failure(text if local else f"hf:{text}", error, local=local) from error
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{text} cannot be moved to {device}: {first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """Raises ModelError, naming what is not there, unless the folder holds all the parts that it says it does."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has no model_index.json, so it is no saved pipeline of diffusers")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from None
    missing = [
        name for name, kind in parts.items() if isinstance(kind, list) and all(kind) and not (folder / name).is_dir()
    ]
    if missing:
        raise ModelError(f"{folder} lacks its {' and '.join(missing)}: expected a folder of that name for each")

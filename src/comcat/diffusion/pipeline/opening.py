"""Loading a text-to-image pipeline by name or folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError, nearest
from ...files import home_path, parsed
from ...models.failures import first_line, loading_failure
from .components import denoiser_of

_WEIGHTS = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.(?P<variant>(?!index\b|safetensors\b|bin\b)[\w]+?))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""Names of files with weights: ``model.fp16.safetensors``, ``diffusion_pytorch_model-00001-of-00002.safetensors``."""
_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_pipeline(
    spec: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    offload: bool = False,
) -> Any:
    """A pipeline of diffusers: the name of one on the hub, or a folder that ``save_pretrained`` wrote.

    Args:
        dtype: of the weights in memory, whatever is stored.
        variant: which of several sets of weights to read, ``"fp16"`` for ``model.fp16.safetensors``. Left out, those
            without a variant; a folder that has one variant alone gives that.
        offload: the denoiser's weights stay in the CPU's memory, and those of each layer come to ``device`` as it
            computes (group offloading of diffusers).

    Raises:
        ModelError: if there is none, a part of it is missing or damaged, there are no weights of that variant, or the
            hub cannot be reached.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ModelError(f"pipelines need diffusers: pip install 'comcat[diffusion]' ({error})") from None
    home_path(spec)  # raises for what is no path at all
    text = os.fspath(spec).removeprefix("hf:")
    place = home_path(text)
    local = place.is_dir()
    if local:
        variant = _variant_in(place, _parts_of(place), variant)
    elif place.exists():
        raise ModelError(f"{text!r} is a file, expected a folder that save_pretrained wrote, or OWNER/NAME on the hub")
    elif not _ON_THE_HUB.fullmatch(text):
        beside = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        raise ModelError(
            f"there is no folder {text!r}; expected one that save_pretrained wrote, or OWNER/NAME on the hub"
            f"{nearest(place.name, beside)}"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(str(place) if local else text, dtype=dtype, variant=variant)
    except Exception as error:  # every library below raises its own kinds
        raise loading_failure(text if local else f"hf:{text}", error, local=local, instead="") from error
    try:
        return _offloaded(pipe, torch.device(device)) if offload else pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{text} cannot be moved to {device}: {first_line(error)}") from error


def _offloaded(pipe: Any, device: torch.device) -> Any:
    from diffusers.hooks import apply_group_offloading

    denoiser = denoiser_of(pipe).model
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not denoiser:
            part.to(device)
    apply_group_offloading(denoiser, device, torch.device("cpu"), offload_type="leaf_level")
    return pipe


def _parts_of(folder: Path) -> list[str]:
    """The parts that a folder says it holds. Raises ModelError, naming what is not there, unless all of them are."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has no model_index.json, so it is no saved pipeline of diffusers")
    try:
        parts = parsed(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from None
    named = [name for name, kind in parts.items() if isinstance(kind, list) and all(kind)]
    if missing := [name for name in named if not (folder / name).is_dir()]:
        raise ModelError(f"{folder} lacks its {' and '.join(missing)}: expected a folder of that name for each")
    return named


def _variant_in(folder: Path, parts: list[str], wanted: str | None) -> str | None:
    """The variant to read from a folder: the one wanted, or the only one there is where weights without are missing."""
    found = {part: _variants(path.name for path in (folder / part).iterdir()) for part in parts}
    named = sorted({variant for variants in found.values() for variant in variants if variant})
    if wanted is not None:
        if wanted not in named:
            has = f"there are {', '.join(named)}" if named else "it has one set of weights alone, without a variant"
            raise ModelError(f"{folder} has no weights of the variant {wanted!r}{nearest(wanted, named)}; {has}")
        return wanted
    lacking = [part for part, variants in found.items() if variants and None not in variants]
    if not lacking:
        return None
    if len(named) > 1:
        raise ModelError(f"{folder} has weights of the variants {', '.join(named)}; say which to read (variant)")
    return named[0]


def _variants(names: Iterable[str]) -> set[str | None]:
    """The variants among the weights of one part, None for those without."""
    matches = (_WEIGHTS.fullmatch(name) for name in names)
    return {match["variant"] for match in matches if match is not None}

"""Loading a model by name or folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, SettingsError, nearest
from ..files import home_path, parsed
from .failures import first_line, required
from .timm import load_timm
from .transformers import load_transformers

_EXPECTED = "expected 'timm:NAME', 'hf:NAME' or a folder"


def load_model(
    spec: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **model_args: Any,
) -> nn.Module:
    """A vision model by name or folder, in eval mode on ``device`` and in ``dtype``.

    spec: ``timm:NAME`` (an architecture of timm, with a tag or without; weights from the hub),
        ``timm:hf-hub:OWNER/NAME``, ``hf:OWNER/NAME`` (a transformers model; of CLIP and SigLIP the vision tower), or a
        folder that timm (its ``local-dir`` layout) or transformers (``save_pretrained``) has saved.
    pretrained: with False, random weights instead of the checkpoint's.
    model_args: passed on, to ``timm.create_model`` (``num_classes=10``) or to the transformers config and class
        (``num_labels=10``, ``attn_implementation="eager"``; ``revision`` and ``cache_dir`` to the hub).

    The model remembers where it came from (see ``origin_of``). Weights of transformers are read from safetensors only.

    Raises ModelError if there is no such model, its weights are missing or do not fit, the hub cannot be reached, or
    the architecture does not take pictures; SettingsError for a device or dtype that cannot be used.
    """
    text = os.fspath(spec)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"dtype: got {dtype!r}, expected a floating-point one such as torch.float16")
    try:
        torch.empty(0, device=device)  # before anything is downloaded
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device: got {str(device)!r}, which cannot be used here: {first_line(error)}") from None
    return _load(text, pretrained, dtype, model_args).to(device).eval()


def _load(text: str, pretrained: bool, dtype: torch.dtype, model_args: Mapping[str, Any]) -> nn.Module:
    options = (text, pretrained, dtype, model_args)
    library, colon, name = text.partition(":")
    known = _has_library(text)
    if not text or (known and not name):
        raise ModelError(f"got {text!r}, {_EXPECTED}")
    place = place_of(text)
    if place.is_dir():
        return _load_folder(place, *options)
    if known and (name.startswith((".", "/", "~", "local-dir:"))):
        raise _no_folder(place)
    if known:
        return load_timm(name, *options) if library == "timm" else load_transformers(name, *options)
    if colon and library.isidentifier() and len(library) > 1:
        raise ModelError(f"got {text!r}, {_EXPECTED}{nearest(library, ['timm', 'hf'])}")
    raise _no_folder(place)


def place_of(spec: str | os.PathLike[str]) -> Path:
    """The folder that the name of a model means, where it means one: ``timm:./vit`` and ``./vit`` are the same."""
    home_path(spec)  # raises for what is no path at all
    text = os.fspath(spec)
    return home_path(text.partition(":")[2].removeprefix("local-dir:") if _has_library(text) else text)


def _has_library(text: str) -> bool:
    return text.partition(":")[0] in ("timm", "hf") and ":" in text


def _no_folder(place: Path) -> ModelError:
    if place.suffix in (".onnx", ".pt2") and place.is_file():
        told = "was exported: comcat bench times it, and comcat.open_exported runs it in Python"
        return ModelError(f"{place} {told}; expected the folder of the model that it was made of")
    if place.exists():
        return ModelError(f"{place} is a file, expected the folder that holds it and its config.json")
    if place.name == str(place) and find_spec("timm") and required("timm").is_model(place.name):
        hint = f"; did you mean 'timm:{place}'?"
    else:
        hint = nearest(
            place.name, [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        )
    return ModelError(f"there is no folder {str(place)!r}, {_EXPECTED}{hint}")


def _load_folder(
    folder: Path, spec: str, pretrained: bool, dtype: torch.dtype, model_args: Mapping[str, Any]
) -> nn.Module:
    config = _read_config(folder)
    if "comcat_version" in config:
        raise ModelError(f"{folder} holds a model that comcat saved: load it with comcat.load_model or comcat.load")
    if "model_type" in config:
        return load_transformers(str(folder), spec, pretrained, dtype, model_args)
    if "architecture" in config:
        return load_timm(f"local-dir:{folder}", spec, pretrained, dtype, model_args)
    raise ModelError(
        f"{folder / 'config.json'} is of no model: expected 'architecture' (timm), 'model_type' (transformers) or "
        f"'comcat_version', got {', '.join(map(repr, list(config)[:8])) or 'nothing'}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        names = sorted(p.name for p in folder.iterdir())
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ModelError(f"{folder} has no config.json, so it is no saved model; it has {shown or 'nothing'}")
    try:
        config = parsed(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected names and values")
    return config

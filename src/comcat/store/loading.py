"""Reading a compressed model."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .._version import __version__
from ..data import Preprocess
from ..errors import ModelError, PlanError, SettingsError, StoreError, nearest
from ..files import home_path, parsed, read_tensors, surviving
from ..grad_mode import outside_inference_mode
from ..models import Origin
from ..models.failures import NOT_BY_PRETRAINED
from ..models.loading import place_of
from ..models.origins import OWN
from ..models.stored import stored_in
from ..plan import Plan
from ..record import Record, Results
from ..wrappers import bare
from .folder import (
    CARD,
    CONFIG,
    FORMAT,
    PLAN,
    REPORT,
    STOCK_CONFIG,
    WEIGHTS,
    is_saved_model,
    own_hash,
    sha256,
)
from .hub import download, looks_like_repo
from .rebuilding import INTO, fill, rebuild, rebuild_into

_log = logging.getLogger(__name__)


@outside_inference_mode
def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """A compressed model that :func:`comcat.save` wrote, in eval mode and with its ``comcat_record``.

    Args:
        source: a folder, or the hub's ``"user/repo"``. device: where to put it. dtype: None keeps what was saved.
        into: a model as it was before compression, whatever its weights, to be changed in place and given the saved
            ones: for models that neither timm nor transformers can build. On an error it stays as it was.
        revision, token: of the hub: branch, tag or commit, and the access token (True for the one logged in with).

    Raises:
        StoreError: if the folder is missing, incomplete, damaged, foreign or of a newer format, or if its plan or
            weights do not fit.
        ModelError: if the installed libraries cannot build the architecture, so that ``into`` is needed.
        SettingsError: for a device or dtype that cannot be used.
    """
    _check_place(device, dtype)
    folder = _folder(source, revision, token)
    config = read_config(folder)
    check_files(folder, config)
    origin, record = _described(folder, config)
    try:
        model = _filled(origin, record.plan, read_tensors(folder / WEIGHTS), into, config["parameters"]["before"])
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from error
    except ModelError as error:
        raise ModelError(f"{folder}: {error}" + (f"; {INTO}" if origin.library == OWN else "")) from error
    model.comcat_record = record  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype).eval()


def _filled(
    origin: Origin, plan: Plan, tensors: dict[str, Tensor], into: nn.Module | None, parameters: int | None
) -> nn.Module:
    """The structure of a saved model, built or made of ``into``, with its weights. parameters: before compression."""
    if into is None:
        model = rebuild(origin, plan, parameters=parameters).model
        fill(model, tensors)
        return model
    handle = rebuild_into(bare(into), plan)
    try:
        fill(handle.model, tensors)
    except BaseException:
        handle.revert()
        raise
    return handle.model


@outside_inference_mode
def load_model(
    spec: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **model_args: Any,
) -> nn.Module:
    """A vision model by name or folder, in eval mode on ``device`` and in ``dtype``.

    Args:
        spec: ``timm:NAME`` (an architecture of timm, with a tag or without; weights from the hub),
            ``timm:hf-hub:OWNER/NAME``, ``hf:OWNER/NAME`` (a transformers model; of CLIP and SigLIP the vision tower),
            or a folder that comcat, timm (its ``local-dir`` layout) or transformers (``save_pretrained``) has saved.
        pretrained: with False, random weights instead of the checkpoint's.
        model_args: passed on, to ``timm.create_model`` (``num_classes=10``) or to the transformers config and class
            (``num_labels=10``, ``attn_implementation="eager"``; ``revision`` and ``cache_dir`` to the hub).

    The model remembers where it came from. Weights of transformers are read from safetensors only.

    Raises:
        ModelError: if there is no such model, its weights are missing or do not fit, the hub cannot be reached, or the
            architecture does not take pictures; for ``pretrained`` and ``model_args`` that a compressed model cannot
            follow.
        StoreError: for a folder of comcat's that is damaged. SettingsError: for a device or dtype that cannot be used.
    """
    folder = surviving(place_of(spec)) if spec != "" else None
    if folder is None or not is_saved_model(folder):
        return models.load_model(spec, pretrained=pretrained, device=device, dtype=dtype, **model_args)
    if not pretrained or model_args:
        got = ", ".join(model_args) or "pretrained=False"
        raise ModelError(f"{folder} holds a compressed model, which loads just as it was saved; got {got}")
    return load(folder, device=device, dtype=dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a saved model, checked against its own hash. Raises StoreError as :func:`load`."""
    path = folder / CONFIG
    if (folder / STOCK_CONFIG).is_file():
        raise StoreError(
            f"{folder} is a stock export, which needs no comcat: load it with transformers' from_pretrained, "
            f"or by comcat.load_model({str(folder)!r})"
        )
    if not path.is_file():
        raise StoreError(f"{folder} has no {CONFIG}, so comcat did not save it; it {_holds(folder)}")
    try:
        config = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or "comcat_version" not in config:
        raise StoreError(f"{folder} is no model that comcat saved; {_foreign(folder, config)}")
    if not isinstance(config.get("format"), int) or not isinstance(config.get("sha256"), dict):
        raise StoreError(f"{path} is damaged: it lacks 'format' or 'sha256'")
    if config["format"] > FORMAT:
        raise StoreError(
            f"{folder} was saved by comcat {config['comcat_version']} in format {config['format']}; "
            f"this is comcat {__version__}, which reads formats up to {FORMAT}: upgrade comcat"
        )
    found, noted = own_hash(config, CONFIG), config["sha256"].get(CONFIG)
    if found != noted:
        raise _damaged(path, found, noted)
    return config


def check_files(folder: Path, config: dict[str, Any]) -> None:
    """Compare the files that make the model with their hashes. People may edit the card and the report."""
    for name in (WEIGHTS, PLAN):
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{folder} is incomplete: {name} is missing; it {_holds(folder)}")
        found, noted = sha256(path), config["sha256"].get(name)
        if found != noted:
            raise _damaged(path, found, noted)
    for name in (CARD, REPORT):
        path, noted = folder / name, config["sha256"].get(name)
        if noted and path.is_file() and (found := sha256(path)) != noted:
            _log.info("%s was changed since it was saved: its SHA-256 is %s, it was %s", path, found, noted)


def _damaged(path: Path, found: str, noted: str | None) -> StoreError:
    return StoreError(f"{path} is damaged or was changed since it was saved: its SHA-256 is {found}, expected {noted}")


def _check_place(device: str | torch.device, dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SettingsError(f"dtype: got {dtype!r}, expected a floating-point one such as torch.float16, or None")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"device: got {str(device)!r}, which cannot be used here: {reason}") from None


def _folder(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    folder = surviving(home_path(source))
    text = os.fspath(source)
    if folder.is_dir():
        if revision is not None:
            raise SettingsError(f"revision: got {revision!r}, but {text!r} is a folder, which has none")
        return folder
    if folder.exists():
        raise StoreError(f"{text!r} is a file, expected the folder that holds it, or 'user/repo' of the hub")
    if isinstance(source, str) and looks_like_repo(text):
        return download(text, revision=revision, token=token)
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    raise StoreError(
        f"there is no folder {text!r}, expected one or 'user/repo' of the hub{nearest(folder.name, beside)}"
    )


def _described(folder: Path, config: dict[str, Any]) -> tuple[Origin, Record]:
    """Where a saved model comes from, and the record it had."""
    try:
        plan = Plan.load(folder / PLAN)
        origin = replace(Origin.from_dict(config.get("origin") or {}), stored=stored_in(folder))
    except (PlanError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder / PLAN}: {error}") from error
    except ModelError as error:
        raise StoreError(f"{folder / CONFIG} says nothing usable of the model's origin: {error}") from error
    _check_described(folder / CONFIG, config)
    names = config.get("class_names")
    return origin, Record(
        plan=plan,
        origin=origin.to_dict(),
        settings=config.get("settings") or {},
        preprocess=config.get("preprocess"),
        class_names=None if names is None else tuple(names),
        results=Results.from_dict(config.get("results")),
    )


def _check_described(path: Path, config: dict[str, Any]) -> None:
    """Raise StoreError where what the config says beside the origin cannot be: somebody has changed it."""
    for key, kind in {"settings": dict, "results": dict, "preprocess": dict, "class_names": list}.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise StoreError(f"{path}: got {key} {value!r}, expected {'a list' if kind is list else 'an object'}")
    counts = config.get("parameters")
    before = counts.get("before", 0) if isinstance(counts, dict) else 0
    if before is not None and (not isinstance(before, int) or before < 1):
        raise StoreError(f"{path}: got parameters {counts!r}, expected how many there were before and are after")
    if odd := [name for name in config.get("class_names") or () if not isinstance(name, str)]:
        raise StoreError(f"{path}: got class_names with {odd[0]!r}, expected names")
    try:
        if config.get("preprocess"):
            Preprocess.from_dict(config["preprocess"])
    except SettingsError as error:
        raise StoreError(f"{path}: preprocess: {error}") from error


def _holds(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return "holds " + (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing")


def _foreign(folder: Path, config: Any) -> str:
    """What a folder looks like that comcat did not save."""
    load_it = f"load it by comcat.load_model({str(folder)!r})"
    if isinstance(config, dict) and "model_type" in config:
        kind = f"a transformers folder (model type {config['model_type']!r})"
        return f"it looks like {kind}: {load_it}; {NOT_BY_PRETRAINED}"
    if isinstance(config, dict) and "architecture" in config:
        return f"it looks like a local-dir folder of timm (architecture {config['architecture']!r}): {load_it}"
    return f"its {CONFIG} names no comcat_version; it {_holds(folder)}"

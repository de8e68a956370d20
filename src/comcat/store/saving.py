"""Writing a compressed model."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import ModelError, SettingsError, StoreError
from ..files import home_path, write_tensors
from ..hosts.blocks import reduced_blocks
from ..hosts.ordinary import check_storable
from ..models import Origin, class_names_of, preprocess_of
from ..models.origins import OWN
from ..plan import Plan
from ..record import Record
from ..wrappers import bare
from .card import model_card
from .folder import (
    CARD,
    CONFIG,
    FORMAT,
    PLAN,
    REPORT,
    STOCK_CONFIG,
    WEIGHTS,
    check_replaceable,
    replacing,
    write_config,
)
from .precision import in_precision, precision_for
from .rebuilding import Rebuilt, outlined, rebuild, structure_of
from .stock import write_stock

if TYPE_CHECKING:
    from ..report import ReportData


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    report: ReportData | None = None,
    stock: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    origin: Origin | None = None,
    plan: Plan | None = None,
    record: Record | None = None,
) -> Path:
    """Write a compressed model to a folder, whole or not at all, and return the folder.

    The folder gets ``model.safetensors``, ``plan.json``, ``config.json`` (where the model comes from, settings,
    versions, hashes), a model card ``README.md`` and, if ``report`` is given, ``report.html``. A folder that comcat
    wrote before is replaced in one step: until then, and if anything fails or the process is killed, it stays as it
    was. Other files in it are kept.

    Args:
        stock: write a checkpoint that plain transformers or timm loads instead, with no code of ours. It needs a plan
            that brings the QK and VO of all attention layers to one rank (or none), all feed-forwards to one number of
            hidden units (or none), and nothing else: what ``ranks="equal"`` makes with units. Of transformers it takes
            classes whose config says these widths (ViT, DeiT, DINOv2, BEiT and the like); a ViT or DeiT of timm is
            translated to transformers, or stays timm's where only hidden units went.
        dtype: store wider weights in this type. None keeps that of the source's files, so that a model that was loaded
            from 16 bits into 32 is saved in 16 again; a model whose source is not known is saved as it is.
        overwrite: False refuses a folder that is not empty.
        origin: how to build the model before compression, where it cannot be told from the model.
        plan, record: what was done to the model, if :func:`comcat.apply_` did it; :func:`comcat.compress` leaves it on
            the model. Of the two, give one.

    A model that neither timm nor transformers can build (of another library, of your own, with parts exchanged by
    hand) is saved as well, with a warning: :func:`comcat.load` then needs ``into=``.

    Raises:
        ModelError: for a layer whose weights a file cannot hold: quantised, adapted by PEFT, offloaded or sharded.
        StoreError: if nothing says how the model was compressed, it does not fit its plan, the folder is not comcat's
            or cannot be written, a stock export is not possible, or values are too large for ``dtype``.
    """
    target = home_path(folder)
    model = bare(model)
    record = _record(model, plan, record)
    check_replaceable(target, overwrite)  # before any work
    check_storable(model, _planned(record.plan))
    _check_tokens(model, record.plan)
    origin, rebuilt = structure_of(model, origin, record)
    record = _completed(model, record, origin)
    if stock and rebuilt is None:
        raise StoreError(f"no stock export: neither timm nor transformers can build this {origin.name}")
    plan_text, precision = _plan_text(record.plan), precision_for(model, dtype)
    _config(model, origin, record, rebuilt)  # what JSON cannot hold is told before anything is written
    with replacing(target, overwrite=overwrite) as new:
        extra = {}
        if stock and rebuilt is not None:
            extra = {"stock": write_stock(model, origin, record, rebuilt.sites, new, precision)}
        else:
            write_tensors(new / WEIGHTS, in_precision(model.state_dict(), precision))
        if dtype is not None:  # what was measured is the size in the source's type
            record, report = _with_size(record, report, new / WEIGHTS)
        config = _config(model, origin, record, rebuilt) | extra
        (new / PLAN).write_text(plan_text, encoding="utf-8")
        (new / CARD).write_text(
            model_card(config, record.plan, name=Path(os.path.abspath(target)).name), encoding="utf-8"
        )
        if report is not None:
            from ..report import write

            write(report, new / REPORT)
        write_config(new, STOCK_CONFIG if stock else CONFIG, config)
    return target


def _planned(plan: Plan) -> list[str]:
    """Paths of the layers that a plan replaces, or that its fingerprint names."""
    names = [*plan.sites, *(() if plan.made_for is None else plan.made_for.sites)]
    return [path for path, _, kind in (name.partition(":") for name in names) if kind != "tokens"]


def _check_tokens(model: nn.Module, plan: Plan) -> None:
    """Raise StoreError where blocks run on other tokens than a plan says; no tensor in a file tells of them."""
    there = {f"{path}:tokens": (r.keep, r.full) for path, r in reduced_blocks(model).items()}
    said = {name: (e.keep, e.full) for name, e in plan.sites.items() if name.endswith(":tokens")}
    for name in sorted({*there, *said}):
        if there.get(name) == said.get(name):
            continue
        runs, told = ("all" if c is None else f"{c[0]} of {c[1]}" for c in (there.get(name), said.get(name)))
        raise StoreError(
            f"{name.removesuffix(':tokens')} runs on {runs} tokens, the model's plan says {told}: apply one plan that "
            "says everything, as comcat.compress(model, plan=comcat.Plan(sites={**plan.sites, **tokens.sites})), or "
            "give save the plans that were applied in this way"
        )


def check_savable(model: nn.Module) -> None:
    """Raise what :func:`save` would raise because of the model's origin, before any work on it."""
    model = bare(model)
    record = getattr(model, "comcat_record", None)
    record = Record(plan=Plan(sites={})) if record is None else record
    _check_tokens(model, record.plan)
    structure_of(model, None, record, rebuild if record.plan.sites else outlined)


def _with_size(record: Record, report: ReportData | None, weights: Path) -> tuple[Record, ReportData | None]:
    """Record and report with the size of the file that was written, where they say what it would be."""
    size = {"size_bytes": weights.stat().st_size}
    results = record.results
    if "size_bytes" in results.after:
        record = replace(record, results=replace(results, after={**results.after, **size}))
    if report is not None and "size_bytes" in report.after:
        between = {**report.between, **size} if "size_bytes" in report.between else report.between
        report = replace(report, after={**report.after, **size}, between=between)
    return record, report


def _record(model: nn.Module, plan: Plan | None, record: Record | None) -> Record:
    if plan is not None and record is not None:
        raise SettingsError("got both plan and record, which holds a plan; expected one of them")
    if plan is not None:
        return Record(plan=plan)
    record = getattr(model, "comcat_record", None) if record is None else record
    if record is None:
        for name, part in model.named_modules():
            if hasattr(part, "comcat_record"):
                raise StoreError(
                    f"nothing says how this {type(model).__name__} was compressed, but its {name} was: save that, "
                    f"comcat.save(model.{name}, folder)"
                )
        raise StoreError(
            f"nothing says how this {type(model).__name__} was compressed: make it with comcat.compress, "
            "or after comcat.apply_(model, plan) say comcat.save(model, folder, plan=plan)"
        )
    return record


def _completed(model: nn.Module, record: Record, origin: Origin) -> Record:
    """The record with what the model still says of its pictures and classes."""
    changed = record.origin is not None and record.origin.get("arguments") != origin.to_dict()["arguments"]
    preprocess, names = record.preprocess, record.class_names
    try:
        preprocess = preprocess_of(model).to_dict() if preprocess is None or changed else preprocess
        names = class_names_of(model) if names is None or changed else names
    except (ModelError, SettingsError):
        pass  # unknown
    return replace(record, origin=origin.to_dict(), preprocess=preprocess, class_names=names)


def _config(model: nn.Module, origin: Origin, record: Record, rebuilt: Rebuilt | None) -> dict[str, Any]:
    before = record.results.before.get("parameters") if rebuilt is None else rebuilt.parameters
    statistic = record.plan.made_by.get("statistic", record.settings.get("statistic"))
    config = {
        "comcat_version": __version__,
        "format": FORMAT,
        "base_model": origin.source or None,
        "origin": origin.to_dict(),
        "settings": record.settings,
        "statistic": statistic,
        "results": record.results.to_dict(),
        "parameters": {"before": before, "after": sum(p.numel() for p in model.parameters())},
        "preprocess": record.preprocess,
        "class_names": record.class_names,
        "libraries": _versions(origin.library),
    }
    return {key: _plain(value, key) for key, value in config.items()}


def _plan_text(plan: Plan) -> str:
    try:
        return plan.to_json()
    except (TypeError, ValueError) as error:
        raise StoreError(f"the plan holds what JSON cannot: {error}") from error


def _versions(library: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "safetensors", *([] if library == OWN else [library])):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON holds it: lists for tuples, text for paths, dtypes, NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, where) for v in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of NumPy and torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise StoreError(f"{where} of the model's record is {what}, expected what JSON can hold")

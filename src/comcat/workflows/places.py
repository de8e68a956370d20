"""What a workflow takes and where it writes, opened and checked before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Pictures, open_pictures
from ..errors import SettingsError, counted
from ..files import check_writable
from ..models import in_classes_of, name_of
from ..plan import Plan
from ..record import Record
from ..report import ReportData
from ..store import load_model
from ..store.folder import RUN, check_replaceable

Source = Pictures | str | os.PathLike[str]
"""Pictures, or what :func:`comcat.open_pictures` takes."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a workflow has made.

    Attributes:
        model: saved in ``folder``, with its record. report: what the page in it shows; None where there was nothing to
            report.
        notes: what there is to say of the pictures and of how they were divided.
    """

    model: nn.Module
    record: Record
    folder: Path
    report: ReportData | None
    notes: tuple[str, ...]


def check_out(out: Path, overwrite: bool) -> None:
    """Raises unless a model may be saved to a folder and can be. What a run that was stopped left there is no
    hindrance.
    """
    if out.is_file():
        raise SettingsError(f"{str(out)!r} is a file, expected a folder to write to")
    check_writable(out)
    if out.is_dir() and not {p.name for p in out.iterdir()} <= RUN and not overwrite:
        raise SettingsError(
            f"{str(out)!r} is not empty; overwrite=True (--overwrite) replaces an earlier result, or name another "
            "folder"
        )
    check_replaceable(out, overwrite=True)


def model_of(model: nn.Module | str | os.PathLike[str]) -> nn.Module:
    """The model itself, or the one of that name, loaded to the CPU."""
    return model if isinstance(model, nn.Module) else load_model(model)


def called(model: nn.Module | str | os.PathLike[str], given: str | None = None) -> str:
    """What a report calls a model."""
    if given is not None:
        return given
    return name_of(model) if isinstance(model, nn.Module) else os.fspath(model)


def opened(source: Source) -> Pictures:
    """The pictures themselves, or those of a place."""
    return source if isinstance(source, Pictures) else open_pictures(source)


def pictures_for(model: nn.Module, source: Source, notes: list[str]) -> Pictures:
    """Pictures labelled as a model counts its classes; what there is to say about it joins the notes."""
    pictures, note = in_classes_of(model, source)
    if note is not None:
        notes.append(note)
    return pictures


def said_of_skipped(pictures: Pictures) -> list[str]:
    """What there is to say of pictures that could not be read."""
    if not pictures.skipped:
        return []
    return [
        f"{counted(len(pictures.skipped), 'unreadable picture')} left out, the first: {pictures.skipped[0]}",
    ]


def said_of_plan(plan: Plan) -> list[str]:
    """That a plan changes nothing, if it does not."""
    return [] if plan.sites else ["The plan changes nothing: the model computes what it did before."]


def said_of_tuning(results: Mapping[str, Any] | None) -> list[str]:
    """That tuning made a model worse on the pictures that it was followed on, if it did."""
    before, after = (results or {}).get("before"), (results or {}).get("after")
    if not before or not after or before.get("top1") is None or after.get("top1") is None:
        return []
    if after["top1"] >= before["top1"]:
        return []
    share = after["top1"] / 100
    error = 100 * (share * (1 - share) / after["count"]) ** 0.5
    return [
        f"Tuning made it worse: top-1 {before['top1']:.2f} % before and {after['top1']:.2f} % after it, on "
        f"{counted(after['count'], 'picture')} (sampling error {error:.1f} points). More steps or pictures, a smaller "
        "lr or weaker augmentation may help."
    ]

"""What a workflow takes and where it writes, opened and checked before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Pictures, open_pictures
from ..errors import SettingsError, counted
from ..files import check_writable
from ..methods.settings import CompressSettings
from ..models import in_classes_of, name_of
from ..plan import Plan
from ..record import Record
from ..report import ReportData
from ..store import load_model
from ..store.folder import RUN, check_replaceable
from ..wrappers import bare

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


def run_beside(out: Path) -> Path:
    """The folder of a run that makes the folder ``out``: ``OUT.run`` beside it."""
    return out.with_name(f"{out.name}.run")


def model_of(model: nn.Module | str | os.PathLike[str]) -> nn.Module:
    """The model itself, or the one of that name, loaded to the CPU."""
    return bare(model) if isinstance(model, nn.Module) else load_model(model)


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


_OF_RANKS = (
    "reduce",
    "max_drop",
    "target_ms",
    "max_parameters",
    "ranks",
    "multiple",
    "only",
    "head",
    "tie",
    "per_head",
)


def said_of_unused(settings: CompressSettings) -> list[str]:
    """Which settings that choose ranks were given beside a plan, which has chosen already."""
    default = {field.name: field.default for field in fields(settings)}
    given = [name for name in _OF_RANKS if getattr(settings, name) != default[name]]
    verb = "was" if len(given) == 1 else "were"
    return [f"The plan says every rank, so {', '.join(given)} {verb} not used."] if given else []


_JUDGED = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine agreement", "divergence": "divergence"}
_HELPS = "More steps or pictures, a smaller lr or weaker augmentation may help."


def said_of_tuning(results: Mapping[str, Any] | None) -> list[str]:
    """That tuning made a model worse on the pictures that it was followed on, if it did.

    That is told by accuracy, else by agreement with the teacher; then by a loss that rose by a tenth or more.
    """
    before, after = (results or {}).get("before"), (results or {}).get("after")
    if not before or not after:
        return []
    for key, name in _JUDGED.items():
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            continue
        if new > old if key == "divergence" else new < old:
            return [f"Tuning made it worse: {_change(key, name, old, new, after['count'])}. {_HELPS}"]
        break
    old, new = before.get("loss"), after.get("loss")
    if old is not None and new is not None and new > 1.1 * old:
        on = counted(after["count"], "picture")
        return [
            f"Tuning raised the loss from {old:.4g} to {new:.4g} nats, on {on}: it is surer of what is wrong. {_HELPS}"
        ]
    return []


def _change(key: str, name: str, old: float, new: float, count: int) -> str:
    """From what to what a measure went, on how many pictures, with the sampling error of a share of them."""
    on = counted(count, "picture")
    if key not in ("top1", "agreement"):
        return f"{name} {old:.4f} before and {new:.4f} after it, on {on}"
    error = 100 * (new / 100 * (1 - new / 100) / count) ** 0.5
    return f"{name} {old:.2f} % before and {new:.2f} % after it, on {on} (sampling error {error:.1f} points)"

"""From a model and pictures to a page on which every budget can be looked at before one is chosen."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data import batches
from ..errors import SettingsError
from ..files import check_writable, home_path
from ..methods.exploring import Exploration, explore
from ..methods.settings import CompressSettings
from ..methods.splits import divide
from ..models import preprocess_of
from ..report.explorer import render_explorer, write_explorer
from ..runs.claims import claimed
from ..settings import from_keywords
from .places import Source, called, model_of, pictures_for, said_of_skipped


@dataclass(frozen=True, kw_only=True)
class Explored:
    """The page that was written, and what is on it."""

    page: Path
    way: Exploration
    notes: tuple[str, ...]


def explore_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    points: int = 30,
    measured: int = 10,
    judged: int = 64,
    time: bool = False,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool = False,
    name: str | None = None,
    source: str | None = None,
    **settings: Any,
) -> Explored:
    """One calibration, every budget: a self-contained page with a slider.

    Args:
        out: an ``.html`` file. model: itself, or its name for :func:`comcat.load_model`. data: pictures; labels are not
            needed.
        points: budgets along the way. measured: on how many of them agreement is measured, on ``judged`` held-out
            pictures. time: measure milliseconds as well.
        source: how the command that is shown calls ``data``. settings: of :func:`comcat.compress`, but for ``reduce``.

    Raises:
        SettingsError: for a place that is no ``.html`` file, is taken or cannot be written to. And what
        :func:`comcat.compress` raises.
    """
    out = home_path(out)
    chosen = from_keywords(CompressSettings, {**settings, "reduce": 0.5})
    with claimed(out):
        _check_out(out, overwrite)
        model, name, notes = model_of(model), called(model, name), []
        pictures = pictures_for(model, data, notes)
        division = divide(pictures, calibrate=chosen.pictures, seed=chosen.seed)
        preprocess = preprocess_of(model)
        way = explore(
            model, batches(division.calibration, preprocess, batch_size=batch_size),
            batches(division.judged.take(judged, chosen.seed), preprocess, batch_size=batch_size), points=points,
            measured=measured, time=time, progress=progress, **settings,
        )  # fmt: skip
        shown = source or (data if isinstance(data, str) else "DATA")
        said = (*notes, *said_of_skipped(division.calibration))
        page = render_explorer(
            way.to_dict(), model=name, notes=said, command=lambda reduce: command_for(reduce, name, shown, chosen)
        )
        write_explorer(out, page)
    return Explored(page=out, way=way, notes=said)


def command_for(reduce: float, model: str, data: str, settings: CompressSettings) -> str:
    """What to type for a saving with these settings."""
    words = ["comcat", "compress", model, "--data", data, "--reduce", f"{reduce:g}"]
    plain = CompressSettings(reduce=0.5)
    for field in ("budget", "forms", "statistic", "ranks", "multiple", "tie", "per_head", "head", "only", "pictures",
                  "seed", "batch", "compiled", "quick", "max_parameters"):  # fmt: skip
        value = getattr(settings, field)
        if value == getattr(plain, field):
            continue
        option = "--" + field.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join([*words, "--out", "small"])


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir() or out.suffix != ".html":
        raise SettingsError(f"got {str(out)!r}, expected a file to write the page to, such as explore.html")
    check_writable(out.parent)
    if out.exists() and not overwrite:
        raise SettingsError(f"{str(out)!r} exists; overwrite=True (--overwrite) replaces it")

"""From a model and training pictures to a plan in a file, found by search."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import SettingsError
from ..files import check_writable, home_path
from ..methods.search import SearchSettings, search_
from ..plan import Plan
from ..runs.claims import claimed_by_main
from ..runs.processes import Processes
from ..settings import from_keywords
from ..tuning.leaks import check_apart, check_sources
from .places import Source, model_of, opened, said_of_skipped


class Found(NamedTuple):
    """The plan that a search has found, and what there is to say of the pictures."""

    plan: Plan
    notes: tuple[str, ...]


def search_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Found:
    """Search for the ranks of a plan and write it to a file; a given model is untouched.

    Checkpoints lie beside the file while the search lasts, in ``NAME.run``: the same call goes on where it stopped.

    Args:
        out: a ``.json`` file. model: itself, or its name for :func:`comcat.load_model`. data: training pictures.
        evaluation: the evaluation set, only to make sure that none of its pictures is in ``data``.
        overwrite: replace a plan that is there. restart: forget the checkpoints. settings: of :func:`comcat.search`.

    Raises:
        SettingsError, StoreError: for a place that cannot be written to, holds something else, or that another run
            writes to.
        DataError: where pictures of ``evaluation`` are in ``data``. And what :func:`comcat.search` raises.
    """
    out, chosen = home_path(out), from_keywords(SearchSettings, settings)
    model, notes = model_of(model), []
    processes = Processes(cpu=next(model.parameters()).device.type == "cpu")
    work = out.with_name(f"{out.stem}.run")
    with claimed_by_main(out, processes):
        with processes.together():
            if processes.main:
                _check_out(out, overwrite)
            check_sources(data, evaluation)
            pictures = opened(data)
            if evaluation is not None and processes.main:
                notes.append(check_apart(pictures, opened(evaluation)))
        plan = search_(model, pictures, chosen, out=work, restart=restart, progress=progress)
        with processes.together():
            if processes.main:
                plan.save(out)
                shutil.rmtree(work, ignore_errors=True)
    return Found(plan, (*notes, *said_of_skipped(pictures)))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir() or out.suffix != ".json":
        raise SettingsError(f"got {str(out)!r}, expected a file to write the plan to, such as plan.json")
    check_writable(out.parent)
    if out.exists() and not overwrite:
        raise SettingsError(f"{str(out)!r} exists; overwrite=True (--overwrite) replaces it, or name another file")

"""From a model and pictures to one whose blocks run on fewer tokens, in a folder, with its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import nn

from ..errors import ComcatError, SettingsError
from ..files import home_path
from ..methods.merging.merge import merge
from ..methods.settings import MergeSettings
from ..plan import Plan
from ..settings import from_keywords
from .compress import compress_to
from .places import Finished, Source, run_beside


def merge_to(
    out: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    data: Source,
    *,
    evaluation: Source | None = None,
    progress: bool = False,
    name: str | None = None,
    command: str | None = None,
    way: dict[str, Any] | None = None,
    **settings: Any,
) -> Finished:
    """Let a model's blocks run on fewer tokens and save it with its report; nothing is trained.

    A model that was compressed, pruned or tuned before keeps its ranks and units: the folder's plan says both, and
    ``made_by`` of the plan tells of the merges under ``merge``. The report compares with the model as it was given.
    What was measured of schedules, and checkpoints of a tuning, lie in ``OUT.run`` beside the folder while the run
    lasts, so that the same call goes on where it stopped.

    Args:
        out: the folder to save to. model: itself, or its name for :func:`comcat.load_model`. data: pictures to choose
            by; labels are not needed.
        evaluation: labelled pictures to measure on. Nothing is chosen by them.
        way: what else :func:`comcat.compress_to` takes: ``batch_size``, ``bench``, ``overwrite``, ``epochs``, …
        settings: of :func:`comcat.merge`. With ``keep=1`` the model stays as it is, and is not timed.
    """
    chosen, way = from_keywords(MergeSettings, settings), dict(way or {})
    if way.get("stock"):
        raise SettingsError(
            "got stock: no config of transformers or timm says that a block runs on fewer tokens; save without it"
        )
    if chosen.keep == 1:
        way["bench"] = False

    work = run_beside(home_path(out)) / "merge"

    def proposed(model: nn.Module, batches: Iterable) -> Plan:
        if way.get("restart"):
            shutil.rmtree(work, ignore_errors=True)
        try:
            return merge(model, batches, out=work, progress=progress, **settings)
        except ComcatError:  # nothing to go on with
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):
                work.parent.rmdir()
            raise

    return compress_to(
        out, model, data, evaluation=evaluation, plan=proposed, progress=progress, name=name, command=command,
        pictures=chosen.pictures, **way,
    )  # fmt: skip

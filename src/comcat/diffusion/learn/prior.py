"""Prior preservation: the pipeline's own pictures of the class, which shall stay as they are (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import counted
from ...runs.processes import Processes
from ...runs.seeding import derive_seed
from ..draw.generate import generate, generate_to
from .examples import Examples, read_examples
from .settings import CustomizeSettings


def make_class_pictures(
    pipe: Any,
    settings: CustomizeSettings,
    side: int,
    folder: Path | None,
    *,
    about: Mapping[str, Any],
    processes: Processes,
    progress: bool,
) -> Examples:
    """``prior_count`` pictures of ``prior_prompt``, ``side`` pixels wide, from the pipeline as it is now.

    They are kept in ``folder`` for the next run, if there is one; ``about`` says there what they were made with.
    """
    assert settings.prior_prompt is not None
    how: dict[str, Any] = {
        "count": settings.prior_count, "seed": derive_seed(settings.seed, "class"), "steps": settings.sample_steps,
        "guidance": settings.sample_guidance, "size": side,
    }  # fmt: skip
    if folder is None:
        made = generate(pipe, settings.prior_prompt, progress=progress, **how)
        return _without_black([generated.image for generated in made])
    how["about"] = about
    with processes.together():
        if processes.main:
            generate_to(folder, pipe, settings.prior_prompt, overwrite=True, progress=progress, **how)
    written = generate_to(folder, pipe, settings.prior_prompt, **how)  # all there by now: this finds them
    return _without_black([Image.open(path) for path in written.paths])


def _without_black(made: Sequence[Image.Image]) -> Examples:
    """The pictures without those that a safety checker has blackened; ``notes`` says how many."""
    kept = [picture for picture in made if picture.convert("L").getextrema()[1]]
    black = len(made) - len(kept)
    whole = counted(len(made), "picture")
    note = f"Left out, since black as a safety checker leaves them: {black} of {whole} of the class."
    return replace(read_examples(kept, what="pictures of the class that are not black"), notes=[note] if black else [])

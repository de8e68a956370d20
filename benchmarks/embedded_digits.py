"""What the benchmarks on the embedded digits share: the pipeline, how long it learns, and what it then draws."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

import comcat.diffusion as diffusion
from comcat.diffusion.digits.embedded import digits_pipeline
from comcat.diffusion.digits.scans import LEFT_OUT

OTHERS = [digit for digit in range(10) if digit != LEFT_OUT]
"""The digits that the pipeline knows."""
KEPT = ("steps", "batch", "samples", "sample_steps", "quick")
"""What a kept run of a short teaching depends on."""


def short_teaching(p: argparse.ArgumentParser, given: Sequence[str] | None, samples: str) -> argparse.Namespace:
    """Arguments of a script that teaches for less time than the demo. ``samples``: what the pictures counted are of."""
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--samples", type=int, default=90, help=samples)
    p.add_argument("--sample-steps", type=int, default=10)
    p.add_argument("--quick", action="store_true", help="a smoke test: a hardly trained pipeline, 2 steps")
    a = p.parse_args(given)
    if a.quick:
        a.steps, a.samples, a.sample_steps, a.seeds = 2, 9, 2, [0]
    return a


def open_digits(a: argparse.Namespace) -> Any:
    """The pipeline in ``--work``, trained the first time."""
    pipe = digits_pipeline(a.work / "digits", device=a.device, progress=True, **({"steps": 2} if a.quick else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, counts: Mapping[str, int], **how: Any) -> dict[str, list[Image.Image]]:
    """So many pictures of each prompt, from seed 1; prompts share batches."""
    made: dict[str, list[Image.Image]] = {prompt: [] for prompt in counts}
    wanted = [(prompt, number) for prompt, count in counts.items() for number in range(count)]
    for one in diffusion.generate(pipe, [], wanted=wanted, seed=1, **how):
        made[one.prompt].append(one.image)
    return made

"""``comcat demo customize``: the embedded pipeline is taught the digit that it does not know, from ten pictures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...measure import environment
from ..draw.generate import generate
from ..draw.pages import Page, Sheet, write_page
from ..learn.customize import customize
from .embedded import digits_pipeline
from .recogniser import Recogniser, train_recogniser
from .scans import IDENTIFIER, INKS, LEFT_OUT, WORDS, digit_pictures, prompt_of

EXAMPLES, CONCEPTS, OTHERS = 10, 60, 20
"""Pictures to learn from; pictures of the concept, and of each other digit, to judge by."""
SETTINGS: dict[str, Any] = {"steps": 500, "batch_size": 4, "rank": 4, "lr": 0.005}
"""More and larger steps than on a large pipeline: this one is so small that nothing in it is near the new digit."""
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0, "batch_size": 60, "seed": 0}


@dataclass(frozen=True)
class Judged:
    """What the pipeline makes at one time, and what the classifier sees in it (shares, 0 to 1)."""

    concept: list[Image.Image]
    inked: list[Image.Image]
    others: dict[int, list[Image.Image]]
    recognised: float
    survived: dict[int, float]

    @property
    def mean_survived(self) -> float:
        return statistics.mean(self.survived.values())


@dataclass(frozen=True)
class Demonstration:
    """Before and after, and where the adapter and the report are."""

    before: Judged
    after: Judged
    adapter: Path
    report: Path
    seconds: float


def run(out: Path, *, seed: int = 0, device: str = "auto", progress: bool = True) -> Demonstration:
    """Teach, judge, report. The pipeline is kept in ``cache`` beside ``out`` for the next time.

    Raises:
        ComcatError: as :func:`digits_pipeline` and :func:`customize` do.
    """
    started = time.monotonic()
    pipe = digits_pipeline(
        out.parent / "cache" / f"digits-pipeline-{seed}", seed=seed, device=device, progress=progress
    )
    recogniser = train_recogniser()
    examples = digit_pictures(LEFT_OUT, EXAMPLES, seed=seed)
    before = _judge(pipe, recogniser, progress, "before")
    adapter = out / "digit.safetensors"
    protected = ("a photo of a digit", *(prompt_of(digit) for digit in before.others))
    customize(
        pipe, examples, prompt=prompt_of(IDENTIFIER), identifier=IDENTIFIER, out=adapter, restart=True,
        progress=progress, protect=protected, seed=seed, **SETTINGS,
    )  # fmt: skip
    after = _judge(pipe, recogniser, progress, "after")
    seconds = time.monotonic() - started
    report = write_page(_page(before, after, examples, adapter, seconds), out / "report.html")
    return Demonstration(before, after, adapter, report, seconds)


def _judge(pipe: Any, recogniser: Recogniser, progress: bool, when: str) -> Judged:
    others = [digit for digit in range(10) if digit != LEFT_OUT]
    ink = list(INKS)[1]
    wanted = [
        *((prompt_of(IDENTIFIER), n) for n in range(CONCEPTS)),
        *((prompt_of(IDENTIFIER, ink), n) for n in range(OTHERS)),
        *((prompt_of(digit), n) for digit in others for n in range(OTHERS)),
    ]
    found: dict[str, list[Image.Image]] = {}
    if progress:
        print(f"Generating {len(wanted)} pictures {when} …")
    for made in generate(pipe, [], wanted=wanted, progress=progress, **SAMPLING):
        found.setdefault(made.prompt, []).append(made.image)
    concept = found[prompt_of(IDENTIFIER)]
    kept = {digit: found[prompt_of(digit)] for digit in others}
    survived = {digit: recogniser.rate(pictures, digit) for digit, pictures in kept.items()}
    return Judged(concept, found[prompt_of(IDENTIFIER, ink)], kept, recogniser.rate(concept, LEFT_OUT), survived)


def _page(before: Judged, after: Judged, examples: list[Image.Image], adapter: Path, seconds: float) -> Page:
    prompt, inked = prompt_of(IDENTIFIER), prompt_of(IDENTIFIER, list(INKS)[1])
    shown = 12
    mixed = {
        when: [p for own in judged.others.values() for p in own[:2]] for when, judged in (("b", before), ("a", after))
    }
    size = adapter.stat().st_size
    rows = [
        [WORDS[digit], f"{100 * before.survived[digit]:.0f} %", f"{100 * after.survived[digit]:.0f} %"]
        for digit in before.survived
    ]
    recognised = f"of {len(after.concept)} pictures of {IDENTIFIER}; before {100 * before.recognised:.0f} %"
    others = f"recognised; before {100 * before.mean_survived:.1f} %"
    protected = "Its prompts are protected: what the nine digits' prompts have in common is projected out of what the "
    return Page(
        title=f"The digit {WORDS[LEFT_OUT]}, taught as {IDENTIFIER}",
        lead=f"A small text-to-image pipeline knows nine of the ten digits. From {len(examples)} pictures of the tenth "
        f"it learned what {IDENTIFIER} is. A classifier that was trained apart, on real scans, says what the pictures "
        "show.",
        tiles=[
            ("Recognised", f"{100 * after.recognised:.0f} %", recognised),
            ("The other nine", f"{100 * after.mean_survived:.1f} %", others),
            ("Stored", f"{size / 1e3:.0f} kB", "the adapter's file"),
            ("Time", f"{seconds:.0f} s", "in all"),
        ],
        sheets=[
            Sheet("What it learned from", examples),
            Sheet(f"“{prompt}” before", before.concept[:shown]),
            Sheet(f"“{prompt}” after", after.concept[:shown]),
            Sheet(f"“{inked}” before", before.inked[:shown]),
            Sheet(f"“{inked}” after", after.inked[:shown]),
            Sheet("The other nine before", mixed["b"]),
            Sheet("The other nine after, from the same noise", mixed["a"]),
        ],
        tables=[("How often each of the others is recognised", ["digit", "before", "after"], rows)],
        facts={**SETTINGS, **{f"sampling.{k}": v for k, v in SAMPLING.items()}, **environment()},
        notes=[f"{protected}adapter reads."],
    )

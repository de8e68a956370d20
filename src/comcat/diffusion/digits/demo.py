"""``comcat demo customize``: the embedded pipeline is taught the digit that it does not know, from ten pictures.

Each scan is shown in white and in every ink, with the ink in its prompt, so that V* takes on a colour. The prompts of
the nine digits, in every ink, are protected.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
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
from .scans import CLASS_PROMPT, IDENTIFIER, INKS, LEFT_OUT, WORDS, digit_pictures, inks_of, prompt_of

EXAMPLES, CONCEPTS, OTHERS = 10, 60, 20
"""Pictures to learn from; pictures of the concept, and of each other digit, to judge by."""
WHITE = next(iter(INKS))
"""The ink of a prompt that names none."""
SHOWN = {"concept": (WHITE, "red", "green"), "others": (WHITE, "red")}
"""The inks that are judged."""
MIX = {ink: 2 if ink == WHITE else 1 for ink in INKS}
"""How often each scan is shown in each ink, in turn."""
SETTINGS: dict[str, Any] = {"steps": 500, "batch_size": 6, "rank": 4, "lr": 0.005}
"""More and larger steps than on a large pipeline: this one is so small that nothing in it is near the new digit."""
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0, "batch_size": 60, "seed": 0}
ROW = 12
"""Pictures shown in a row."""

Drawn = dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Judged:
    """What the pipeline makes at one time, by ink, and the shares of it that are right (0 to 1).

    A picture is right if the classifier sees the digit that was asked for, and it is in the ink that was asked for.
    """

    concept: Mapping[str, list[Image.Image]]
    others: Mapping[str, Mapping[int, list[Image.Image]]]
    right: Mapping[str, float]
    survived: Mapping[str, Mapping[int, float]]

    def mean_survived(self, ink: str) -> float:
        """The mean over the nine others."""
        return statistics.mean(self.survived[ink].values())


@dataclass(frozen=True)
class Demonstration:
    """Before and after, and where the adapter and the report are."""

    before: Judged
    after: Judged
    adapter: Path
    report: Path
    seconds: float

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """What was judged, in words, with its share before and after."""
        for ink, share in self.before.right.items():
            yield f"{IDENTIFIER} in {ink}", share, self.after.right[ink]
        for ink in self.before.survived:
            yield f"the other nine in {ink}", self.before.mean_survived(ink), self.after.mean_survived(ink)


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
    before = _judge(pipe, recogniser, progress, "before")
    adapter = out / "digit.safetensors"
    examples, prompts = lessons(seed)
    customize(
        pipe, examples, prompt=prompts, identifier=IDENTIFIER, out=adapter, restart=True, progress=progress,
        protect=protected_prompts(), seed=seed, **SETTINGS,
    )  # fmt: skip
    after = _judge(pipe, recogniser, progress, "after")
    done = Demonstration(before, after, adapter, out / "report.html", time.monotonic() - started)
    write_page(_page(done, examples[:EXAMPLES]), done.report)
    return done


def lessons(seed: int) -> tuple[list[Image.Image], list[str]]:
    """The pictures to learn from and the prompt of each: ten scans in white first, then again, and in every ink."""
    pictures: list[Image.Image] = []
    prompts: list[str] = []
    for ink, times in MIX.items():
        own = digit_pictures(LEFT_OUT, EXAMPLES, ink=ink, seed=seed)
        pictures += own * times
        prompts += [_prompt(IDENTIFIER, ink)] * (len(own) * times)
    return pictures, prompts


def protected_prompts() -> tuple[str, ...]:
    """The prompts of the nine digits, and of any digit, in every ink."""
    subjects = [CLASS_PROMPT, *(prompt_of(digit) for digit in _OTHERS)]
    return tuple(subject if ink == WHITE else f"{subject} in {ink}" for subject in subjects for ink in INKS)


_OTHERS = tuple(digit for digit in range(10) if digit != LEFT_OUT)


def _prompt(subject: int | str, ink: str) -> str:
    return prompt_of(subject, None if ink == WHITE else ink)


def _judge(pipe: Any, recogniser: Recogniser, progress: bool, when: str) -> Judged:
    wanted = [(_prompt(IDENTIFIER, ink), n) for ink in SHOWN["concept"] for n in range(CONCEPTS)]
    wanted += [(_prompt(digit, ink), n) for ink in SHOWN["others"] for digit in _OTHERS for n in range(OTHERS)]
    found: Drawn = {}
    if progress:
        print(f"Generating {len(wanted)} pictures {when} …")
    for made in generate(pipe, [], wanted=wanted, progress=progress, **SAMPLING):
        found.setdefault(made.prompt, []).append(made.image)
    concept = {ink: found[_prompt(IDENTIFIER, ink)] for ink in SHOWN["concept"]}
    others = {ink: {digit: found[_prompt(digit, ink)] for digit in _OTHERS} for ink in SHOWN["others"]}
    return Judged(
        concept=concept,
        others=others,
        right={ink: _share(recogniser, own, LEFT_OUT, ink) for ink, own in concept.items()},
        survived={ink: {d: _share(recogniser, p, d, ink) for d, p in own.items()} for ink, own in others.items()},
    )


def _share(recogniser: Recogniser, pictures: list[Image.Image], digit: int, ink: str) -> float:
    """The share of pictures that show the digit, in the ink."""
    seen = recogniser.recognise(pictures).tolist()
    pairs = zip(seen, inks_of(pictures), strict=True)
    return sum(found == (digit, ink) for found in pairs) / len(pictures)


def _page(done: Demonstration, examples: list[Image.Image]) -> Page:
    before, after = done.before, done.after
    shares = {name: (old, new) for name, old, new in done.rows()}
    digits = [
        [WORDS[d], *(f"{100 * now.survived[ink][d]:.0f} %" for ink in SHOWN["others"] for now in (before, after))]
        for d in _OTHERS
    ]
    head = ["digit", *(f"in {ink}, {when}" for ink in SHOWN["others"] for when in ("before", "after"))]
    return Page(
        title=f"The digit {WORDS[LEFT_OUT]}, taught as {IDENTIFIER}",
        lead=f"A small text-to-image pipeline knows nine of the ten digits. From {len(examples)} pictures of the "
        f"tenth, shown in every ink, it learned what {IDENTIFIER} is. A classifier that was trained apart, on real "
        "scans, says what the pictures show. One is right if it shows what was asked for, in the ink that was asked "
        "for.",
        tiles=[
            *((f"{name[0].upper()}{name[1:]}", f"{100 * new:.0f} %", f"right; before {100 * old:.0f} %")
                for name, (old, new) in shares.items()),
            ("Stored", f"{done.adapter.stat().st_size / 1e3:.0f} kB", "the adapter's file"),
            ("Time", f"{done.seconds:.0f} s", "in all"),
        ],
        sheets=[Sheet("What it learned from, in white", examples), *_sheets(done)],
        tables=[("How often each of the others is right", head, digits)],
        facts={**SETTINGS, **{f"sampling.{k}": v for k, v in SAMPLING.items()}, **environment()},
        notes=["The prompts of the nine digits, in every ink, are protected: what they have in common is projected out "
            "of what the adapter reads."],
    )  # fmt: skip


def _sheets(done: Demonstration) -> Iterator[Sheet]:
    """Rows of pictures from the same noise before and after, each with its figure."""
    times = (("before", done.before), ("after", done.after))
    for ink in SHOWN["concept"]:
        for when, now in times:
            figure = f"{100 * now.right[ink]:.0f} % of {len(now.concept[ink])} right"
            yield Sheet(f"“{_prompt(IDENTIFIER, ink)}” {when}", now.concept[ink][:ROW], figure=figure)
    for ink in SHOWN["others"]:
        for when, now in times:
            count = sum(map(len, now.others[ink].values()))
            figure = f"{100 * now.mean_survived(ink):.1f} % of {count} right"
            pictures = [picture for own in now.others[ink].values() for picture in own[:2]]
            yield Sheet(f"The other nine in {ink} {when}", pictures, figure=figure)

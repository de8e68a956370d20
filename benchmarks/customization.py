"""Teaching the embedded pipeline its tenth digit: comcat beside Custom Diffusion, DreamBooth, PEFT's LoRA and LoKr (the
paper's Tables 5 and 6).

One harness for all: the same pipeline, 10 pictures, steps, batch, optimizer (AdamW, weight decay 0.01, clipping 1,
linear decay), noise and times by seed. Twice:

- ``published``: each with its own regularisation (Custom Diffusion and DreamBooth: prior preservation with 200 class
  pictures; Custom Diffusion: V*'s embedding learns as well) and, but for comcat, with pictures and prompts encoded anew
  at every step, as in the published scripts.
- ``equal``: all with comcat's cache and all with prior preservation; nobody's embedding learns.

``comcat, protected`` has ``protect`` (see comcat.diffusion.learn.protection) with the prompts of the nine digits in
place of, or in ``equal`` beside, class pictures; with ``new token`` V*'s embedding learns as well (``published``
alone); with ``dropout`` so large a share of its pictures is shown under the empty prompt. ``words protected`` has
prompts of random words of the tokenizer's vocabulary in place of the nine's, so that nobody names any.

Learning rates are tuned per method and mode, by the same rule for all: on a grid of factors √10 around 1e-3, on a seed
that is not reported, until the best is no end of what was tried, then half a step to either side of it; best is the
mean of the concept's recognition and the other digits' accuracy. Features for KID and FID are the 64 of the digit
classifier's last layer (comcat.diffusion.digits.recogniser), trained apart on real scans: they compare methods here and
nothing else.

Every (mode, method, seed) is kept in ``--work``; a killed run goes on where it stopped. ``--add`` puts methods into
the result that is committed for this machine, if what it was asked is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, added, kept_result, machine, over_seeds, parser, slug, spread, table, write
from diffusers.utils import logging as diffusers_logging
from embedded_digits import OTHERS, drawn, open_digits
from peers import METHODS, WITH_TOKEN, EncodingSource, Kind, Method, cached_source, peak_of_step
from PIL import Image

import comcat.diffusion as diffusion
from comcat.diffusion.digits.recogniser import Recogniser, train_recogniser
from comcat.diffusion.digits.scans import CLASS_PROMPT, IDENTIFIER, LEFT_OUT, SIDE, digit_pictures, prompt_of
from comcat.diffusion.draw.pictures import grid
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import Family, family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.diffusion.pipeline.residence import frozen
from comcat.runs.loop import carry_out
from comcat.runs.processes import Processes
from comcat.scoring import fid, kid

MODES = ("published", "equal")
FIGURE_PROMPTS = (
    prompt_of(IDENTIFIER), prompt_of(IDENTIFIER, "red"), prompt_of(IDENTIFIER, "blue"), prompt_of(OTHERS[3]),
    prompt_of(OTHERS[7], "green"),
)  # fmt: skip
START, FACTOR = 1e-3, 10**0.5


@dataclass(frozen=True)
class Harness:
    """What all runs share."""

    a: argparse.Namespace
    recogniser: Recogniser
    class_pictures: list[Image.Image]
    concept: torch.Tensor
    others: torch.Tensor
    """Features of real scans of the tenth digit, and of the nine."""

    def sample(self, pipe: Any, counts: Mapping[str, int]) -> dict[str, list[Image.Image]]:
        """So many pictures of each prompt; prompts share batches."""
        return drawn(pipe, counts, steps=self.a.sample_steps, guidance=self.a.guidance, batch_size=50)

    def judge(self, pipe: Any, count: int) -> dict[str, float]:
        """The concept and the nine others in generated pictures, ``count`` of each kind."""
        each = max(1, -(-count // len(OTHERS)))
        found = self.sample(pipe, {prompt_of(IDENTIFIER): count, **{prompt_of(digit): each for digit in OTHERS}})
        made, kept = found[prompt_of(IDENTIFIER)], {digit: found[prompt_of(digit)] for digit in OTHERS}
        features = self.recogniser.features(made)
        unrelated = self.recogniser.features([picture for pictures in kept.values() for picture in pictures])
        return {
            "recognised": self.recogniser.rate(made, LEFT_OUT),
            "kid": kid(features, self.concept).mean,
            "fid": fid(features, self.concept),
            "others": statistics.mean(self.recogniser.rate(pictures, digit) for digit, pictures in kept.items()),
            "others_kid": kid(unrelated, self.others).mean,
            "others_fid": fid(unrelated, self.others),
        }

    def run(self, mode: str, name: str, seed: int, lr: float, count: int, sheet: Path | None = None) -> dict[str, Any]:
        """Teach one method and judge it."""
        pipe = open_base(self.a)
        family = family_of(pipe)
        started = time.perf_counter()
        with frozen(family):
            method = METHODS[name](
                family, seed=seed, protect=[prompt_of(digit) for digit in OTHERS],
                prompt=prompt_of(IDENTIFIER), token=IDENTIFIER if mode == "published" else None,
            )  # fmt: skip
            run = self.optimisation(family, method, mode, name, seed, lr)
            carry_out(run, run.processes)
            seconds = time.perf_counter() - started
            peak = peak_of_step(run, family, encoding=encodes(mode, name), live_text=method.live_text)
        result: dict[str, Any] = {
            "mode": mode, "method": name, "seed": seed, "lr": lr, "steps": self.a.steps, "batch": self.a.batch,
            "seconds": seconds, "seconds_in_steps": run.progress.seconds, "peak_bytes": peak,
            "trained": sum(p.numel() for p in method.trained.values()),
            "stored_bytes": method.stored_bytes(self.a.work),
            "loss": statistics.mean(run.progress.losses[-50:]), **self.judge(pipe, count),
        }  # fmt: skip
        if sheet is not None:
            drawn = self.sample(pipe, dict.fromkeys(FIGURE_PROMPTS, 4))
            pictures = [picture for own in drawn.values() for picture in own]
            grid(pictures, columns=4 * len(FIGURE_PROMPTS)).save(sheet)
        return result

    def optimisation(self, family: Family, method: Method, mode: str, name: str, seed: int, lr: float) -> Optimisation:
        images = digit_pictures(LEFT_OUT, 10, seed=seed)
        kinds = [Kind(images, prompt_of(IDENTIFIER), self.a.batch, 1.0, method.caption_dropout)]
        if mode == "equal" or method.regularised:
            kinds.append(Kind(self.class_pictures, CLASS_PROMPT, self.a.batch, 1.0))
        if encodes(mode, name):
            source = EncodingSource(family, kinds, SIDE, seed)
        else:
            source = cached_source(family, kinds, SIDE, seed, live_text=method.live_text)
        settings = CustomizeSettings(steps=self.a.steps, batch_size=self.a.batch, lr=lr, seed=seed)
        return Optimisation(
            family, noising_of(family.pipe.scheduler), method.trained, source, settings,
            Processes(cpu=family.device.type == "cpu"),
            constrain=method.constrain,
        )  # fmt: skip


def encodes(mode: str, name: str) -> bool:
    """Whether a method encodes pictures and prompts at every step."""
    return mode == "published" and not name.startswith("comcat")


def open_base(a: argparse.Namespace) -> Any:
    if a.pipeline is None:
        return open_digits(a)
    pipe = diffusion.load_pipeline(a.pipeline, device=a.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare(a: argparse.Namespace) -> Harness:
    pipe, recogniser = open_base(a), train_recogniser()
    made = diffusion.generate_to(
        a.work / "class", pipe, CLASS_PROMPT, count=a.class_count, seed=2, steps=a.sample_steps, guidance=a.guidance,
        batch_size=50,
    )  # fmt: skip
    real = [picture for digit in OTHERS for picture in digit_pictures(digit, part=None)]
    return Harness(
        a, recogniser, [Image.open(p).convert("RGB") for p in made.paths],
        recogniser.features(digit_pictures(LEFT_OUT, part=None)), recogniser.features(real),
    )  # fmt: skip


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    """What a kept run depends on, but for the method, mode, seed and rate that its name says."""
    names = ("steps", "batch", "sample_steps", "guidance", "class_count", "pipeline", "quick")
    return {name: getattr(a, name) for name in names}


def tuned_rate(harness: Harness, mode: str, name: str) -> tuple[float, dict[str, float]]:
    """The best learning rate on the grid, and the score at each that was tried."""
    a = harness.a
    scores: dict[float, float] = {}

    def score(power: float) -> None:
        lr = START * FACTOR**power
        path = a.work / f"tune-{mode}-{slug(name)}-{power:+g}.json"
        kept = {**settings_of(a), "samples": a.tuning_samples, "seed": a.tuning_seed}
        found = kept_result(path, kept, lambda: harness.run(mode, name, a.tuning_seed, lr, a.tuning_samples))
        scores[power] = (found["recognised"] + found["others"]) / 2
        print(f"  {mode}, {name}, lr {lr:.2g}: {scores[power]:.3f}", flush=True)

    for power in range(-a.reach, a.reach + 1):
        score(power)
    while not a.quick and abs(best := max(scores, key=lambda p: scores[p])) == max(map(abs, scores)) and abs(best) < 6:
        score(best + (1 if best > 0 else -1))
    if not a.quick:
        best = max(scores, key=lambda p: scores[p])
        score(best - 0.5), score(best + 0.5)
    return START * FACTOR ** max(scores, key=lambda p: scores[p]), {
        f"{START * FACTOR**p:.2g}": s for p, s in sorted(scores.items())
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of every number."""
    numbers = [k for k, v in runs[0].items() if isinstance(v, int | float) and k not in ("seed", "steps", "batch")]
    return {key: over_seeds([run[key] for run in runs]) for key in numbers}


def print_tables(modes: dict[str, dict[str, Any]], untouched: dict[str, float]) -> None:
    for mode, methods in modes.items():
        print(f"\nTable 5, {mode}")
        table(
            ["method", "lr", "seconds", "memory MB", "stored kB", "recognised %", "KID", "FID"],
            [
                [name, f"{m['lr']['mean']:.2g}", spread(m["seconds"]), spread(m["peak_bytes"], 1e-6),
                    spread(m["stored_bytes"], 1e-3),
                 spread(m["recognised"], 100), spread(m["kid"], 1, 2), spread(m["fid"], 1, 1)]
                for name, m in methods.items()
            ],
        )  # fmt: skip
        print(f"\nTable 6, {mode}: unrelated prompts")
        before = [
            "untouched",
            f"{100 * untouched['others']:.1f}",
            f"{untouched['others_kid']:.2f}",
            f"{untouched['others_fid']:.1f}",
        ]
        rows = [
            [n, spread(m["others"], 100), spread(m["others_kid"], 1, 2), spread(m["others_fid"], 1, 1)]
            for n, m in methods.items()
        ]
        table(["method", "accuracy %", "KID", "FID"], [before, *rows])


def figure(a: argparse.Namespace, mode: str, sheets: dict[str, Path], out: Path) -> Path:
    """Figures 10 and 11: a row a method, a column a prompt, four pictures each."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 0.75 * len(sheets) + 0.7), layout="constrained")
    axes = drawn.subplots(len(sheets), 1, squeeze=False)[:, 0]
    for axis, (name, path) in zip(axes, sheets.items(), strict=True):
        axis.imshow(Image.open(path), interpolation="nearest")
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    width = Image.open(next(iter(sheets.values()))).width
    axes[0].set_xticks(
        [width * (i + 0.5) / len(FIGURE_PROMPTS) for i in range(len(FIGURE_PROMPTS))], FIGURE_PROMPTS, fontsize=7
    )
    axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"customization-{mode}.png"
    drawn.savefig(path, dpi=130)
    return path


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-customization"), help="where runs are kept")
    p.add_argument("--pipeline", type=Path, help="folder of a digits pipeline made before; left out, one is trained")
    p.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    p.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--samples", type=int, default=207, help="pictures of the concept, and of the nine others together")
    p.add_argument("--sample-steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=2.0)
    p.add_argument("--class-count", type=int, default=200)
    p.add_argument("--rate", type=float, help="the learning rate, which is then not looked for")
    p.add_argument("--tuning-seed", type=int, default=100)
    p.add_argument("--tuning-samples", type=int, default=207)
    p.add_argument("--reach", type=int, default=1, help="grid points on either side of 1e-3 to begin with")
    p.add_argument("--quick", action="store_true", help="a smoke test: a hardly trained pipeline, 2 steps, one rate")
    p.add_argument("--add", action="store_true", help="put these methods into the result that is there; no figure")
    a = p.parse_args(arguments)
    if a.quick:
        a.steps, a.samples, a.tuning_samples, a.class_count, a.sample_steps, a.reach, a.seeds = 2, 18, 9, 4, 2, 0, [0]
    a.work.mkdir(parents=True, exist_ok=True)
    diffusers_logging.disable_progress_bar()
    harness = prepare(a)
    settings = {**settings_of(a), "samples": a.samples}
    untouched = kept_result(a.work / "untouched.json", settings, lambda: harness.judge(open_base(a), a.samples))
    modes: dict[str, dict[str, Any]] = {}
    rates: dict[str, Any] = {}
    every: list[dict[str, Any]] = []
    figures: list[str] = []
    for mode in a.modes:
        modes[mode], sheets = {}, {}
        for name in (n for n in a.methods if mode == "published" or n not in WITH_TOKEN):
            lr, tried = (a.rate, {}) if a.rate else tuned_rate(harness, mode, name)
            rates.setdefault(mode, {})[name] = {"lr": lr, "scores": tried}
            runs = []
            for seed in a.seeds:
                stem = f"{mode}-{slug(name)}-{lr:.2g}-{seed}"
                sheet = a.work / f"{stem}.png"
                run = partial(harness.run, mode, name, seed, lr, a.samples, sheet)
                runs.append(kept_result(a.work / f"{stem}.json", settings, run))
                sheets.setdefault(name, sheet)
            every += runs
            modes[mode][name] = summary(runs)
        if not a.add:
            figures.append(str(figure(a, mode, sheets, a.work if a.no_write else RESULTS / machine())))
    print_tables(modes, untouched)
    result = {
        "settings": {k: v for k, v in vars(a).items() if k not in UNSAID},
        "features": f"{harness.concept.shape[1]} of the digit classifier's last layer",
        "real_pictures": len(harness.concept),
        "concept": LEFT_OUT, "untouched": untouched, "modes": modes, "rates": rates, "runs": every,
        "figures": [Path(f).name for f in figures],
    }  # fmt: skip
    if a.add:
        result = added(json.loads((RESULTS / machine() / "customization.json").read_text()), result)
    if not a.no_write:
        write("customization", result)
    return result


UNSAID = ("work", "no_write", "pipeline", "add", "rate")


if __name__ == "__main__":
    main()

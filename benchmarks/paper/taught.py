"""What the scripts of the paper's customization results share: concepts taught by several methods, and what became of
them.

Every (concept, method) is taught, timed and judged once and kept in ``--work``: the three scripts share it, and one
that was stopped goes on. ``--concepts`` holds a folder of pictures for each concept. Its prompt is the first line of
``prompt.txt`` in it, with V* where the concept is named; without that file it is "a photo of V* NAME" after the folder.

All methods have the same steps, batch, noise and times. As in the published scripts, Custom Diffusion and DreamBooth
come with prior preservation and, like LoRA, encode pictures and prompts at every step; ours has its cache. V*'s
embedding learns with Custom Diffusion where the tokenizer knows V* as one token, which the result says.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from customization import summary
from peers import METHODS, EncodingSource, Kind, Method, cached_source, peak_of_step

import comcat.diffusion as diffusion
from comcat import open_pictures
from comcat.diffusion.adapter.tokenizers import knows
from comcat.diffusion.draw.pictures import grid
from comcat.diffusion.draw.prompts import read_prompts
from comcat.diffusion.learn.examples import read_examples
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import Family, family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.diffusion.pipeline.residence import frozen
from comcat.runs.loop import carry_out
from comcat.runs.processes import Processes
from comcat.scoring import fid, kid
from comcat.scoring.features import Opening, distance_extractor, embed
from comcat.scoring.settings import ScoreSettings

IDENTIFIER = "V*"
RATES = {"comcat": 2.5e-3, "LoRA": 1e-3, "LoKr": 1e-3, "Custom Diffusion": 1e-5, "DreamBooth": 5e-6}
"""Learning rates by the first words of a method: ours by default, and as published or usual."""
UNRELATED = (
    "a photo of a cat", "a house by the sea", "a bowl of fruit on a table", "a portrait of a woman", "a red car",
    "a mountain under a starry sky", "a crowded street at night", "a watercolour of flowers",
)  # fmt: skip
SCENES = ("{}", "{} on a beach", "{} in the snow", "a painting of {}")
UNTOUCHED, OTHER_NOISE = "untouched", "untouched, other noise"


def arguments(doc: str | None, given: Sequence[str] | None) -> argparse.Namespace:
    p = common.parser(doc)
    p.add_argument("--model", required=True, help="a pipeline's folder, or its name on the hub")
    p.add_argument("--concepts", type=Path, required=True, help="a folder with a folder of pictures for each concept")
    p.add_argument("--work", type=Path, default=Path("runs/paper-customization"), help="where runs are kept")
    p.add_argument("--methods", nargs="+", choices=list(METHODS),
        default=["comcat, all attention", "Custom Diffusion", "DreamBooth", "LoRA"])  # fmt: skip
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--resolution", type=int, help="side of the pictures; the pipeline's own if not given")
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--count", type=int, default=50, help="pictures of each concept that are judged")
    p.add_argument("--unrelated", type=Path, help="a file of prompts that have nothing to do with the concepts")
    p.add_argument("--unrelated-count", type=int, default=8, help="pictures of each of them")
    p.add_argument("--class-count", type=int, default=200, help="pictures for prior preservation")
    p.add_argument("--sample-steps", type=int, default=50)
    p.add_argument("--guidance", type=float, help="of sampling; the pipeline's own if not given")
    p.add_argument("--features", default=ScoreSettings.features, help="network whose features FID and KID compare")
    p.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random features (a smoke test)")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(given)


@dataclass(frozen=True)
class Concept:
    """A folder of pictures, and what they show."""

    name: str
    prompt: str
    images: list[Image.Image]

    @property
    def class_prompt(self) -> str:
        """Without the concept: what prior preservation shows."""
        return re.sub(r"\s+", " ", self.prompt.replace(IDENTIFIER, "")).strip()

    def scenes(self) -> list[str]:
        """The prompts of a row in Figures 10 and 11."""
        subject = self.prompt.removeprefix("a photo of ")
        return [scene.format(self.prompt if scene == "{}" else subject) for scene in SCENES]


class Taught:
    """All methods on all concepts of one pipeline."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.concepts = [self._concept(folder) for folder in sorted(a.concepts.iterdir()) if folder.is_dir()]
        if not self.concepts:
            raise SystemExit(f"error: {a.concepts} holds no folders, expected one for each concept")
        a.work.mkdir(parents=True, exist_ok=True)
        self.unrelated = list(UNRELATED) if a.unrelated is None else read_prompts(a.unrelated)

    def _concept(self, folder: Path) -> Concept:
        said = folder / "prompt.txt"
        prompt = f"a photo of {IDENTIFIER} {folder.name.replace('_', ' ')}"
        if said.is_file():
            prompt = said.read_text(encoding="utf-8").splitlines()[0].strip()
        if IDENTIFIER not in prompt:
            raise SystemExit(f"error: {said} says {prompt!r}, expected a prompt with {IDENTIFIER}")
        return Concept(folder.name, prompt, read_examples(folder).images)

    @property
    def settings(self) -> dict[str, Any]:
        """What a kept run depends on."""
        apart = ("work", "methods", "no_write", "concepts", "unrelated")
        return {k: v for k, v in vars(self.a).items() if k not in apart} | {"prompts": self.unrelated}

    @cached_property
    def extractor(self) -> Any:
        opening = Opening(device=self.a.device, pretrained=self.a.pretrained)
        return distance_extractor(self.a.features, opening)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, features), float64."""
        folder = self.a.work / "judged"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for number, image in enumerate(images):
            image.save(folder / f"{number:05d}.png")
        return embed(open_pictures(folder), self.extractor)[0]

    def pipe(self) -> Any:
        pipe = diffusion.load_pipeline(self.a.model, device=self.a.device, dtype=getattr(torch, self.a.dtype))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def drawn(self, pipe: Any, prompt: str, count: int, seed: int = 1) -> list[Image.Image]:
        how = {"steps": self.a.sample_steps, "guidance": self.a.guidance, "size": self.a.resolution, "seed": seed}
        return [g.image for g in diffusion.generate(pipe, prompt, count=count, **how)]

    def of_unrelated(self, pipe: Any, seed: int = 1) -> list[Image.Image]:
        return [p for prompt in self.unrelated for p in self.drawn(pipe, prompt, self.a.unrelated_count, seed)]

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """Features of unrelated prompts' pictures by the untouched pipeline, and from other noise."""
        path = self.a.work / "unrelated-before.json"
        kept = common.kept_result(path, self.settings, self._features_before)
        return torch.tensor(kept[UNTOUCHED]).double(), torch.tensor(kept[OTHER_NOISE]).double()

    def _features_before(self) -> dict[str, list[list[float]]]:
        pipe = self.pipe()
        return {
            name: self.features(self.of_unrelated(pipe, seed)).tolist()
            for name, seed in ((UNTOUCHED, 1), (OTHER_NOISE, 2))
        }

    def sheet(self, concept: Concept, method: str) -> Path:
        """The picture file of a row in Figures 10 and 11."""
        return self.a.work / f"{concept.name}-{common.slug(method)}.png"

    def result(self, concept: Concept, method: str) -> dict[str, Any]:
        """One method on one concept, from its file or made now."""
        path = self.a.work / f"{concept.name}-{common.slug(method)}.json"
        settings = {**self.settings, "prompt": concept.prompt, "pictures": len(concept.images)}
        if not self.sheet(concept, method).is_file():
            path.unlink(missing_ok=True)
        return common.kept_result(path, settings, lambda: self._teach(concept, method))

    def _teach(self, concept: Concept, name: str) -> dict[str, Any]:
        print(f"{concept.name}: {name} …", flush=True)
        pipe = self.pipe()
        if name == UNTOUCHED:
            return self._judged(pipe, concept, name, {})
        family = family_of(pipe)
        prior = self._class_pictures(pipe, concept)
        tokens = [tokenizer for tokenizer, _ in family.text_encoders().values()]
        token = IDENTIFIER if all(knows(t, IDENTIFIER) for t in tokens) else None
        started = time.perf_counter()
        with frozen(family):
            method = METHODS[name](family, seed=self.a.seed, protect=[concept.class_prompt], token=token)
            run = self._optimisation(family, method, concept, prior, name)
            if self.a.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            carry_out(run, run.processes, progress=True)
            seconds, encoding = time.perf_counter() - started, not name.startswith("comcat")
            if self.a.device.startswith("cuda"):
                peak = torch.cuda.max_memory_allocated()
            else:
                peak = peak_of_step(run, family, encoding=encoding, live_text=method.live_text)
        about = {
            "lr": self._rate(name), "seconds": seconds, "seconds_in_steps": run.progress.seconds, "peak_bytes": peak,
            "trained": sum(p.numel() for p in method.trained.values()), "learns_token": bool(method.live_text),
            "stored_bytes": method.stored_bytes(self.a.work),
        }  # fmt: skip
        return self._judged(pipe, concept, name, about)

    def _rate(self, name: str) -> float:
        return next(rate for begin, rate in RATES.items() if name.startswith(begin))

    def _class_pictures(self, pipe: Any, concept: Concept) -> list[Image.Image]:
        made = diffusion.generate_to(
            self.a.work / f"{concept.name}-class", pipe, concept.class_prompt, count=self.a.class_count, seed=2,
            steps=self.a.sample_steps, guidance=self.a.guidance, size=self.a.resolution,
        )  # fmt: skip
        return [Image.open(path).convert("RGB") for path in made.paths]

    def _optimisation(
        self, family: Family, method: Method, concept: Concept, prior: list[Image.Image], name: str
    ) -> Optimisation:
        a, side = self.a, self.a.resolution or family.resolution()
        kinds = [Kind(concept.images, concept.prompt, a.batch, 1.0, method.caption_dropout)]
        if method.regularised:
            kinds.append(Kind(prior, concept.class_prompt, a.batch, 1.0))
        if name.startswith("comcat"):
            source = cached_source(family, kinds, side, a.seed, live_text=method.live_text)
        else:
            source = EncodingSource(family, kinds, side, a.seed)
        settings = CustomizeSettings(steps=a.steps, batch_size=a.batch, lr=self._rate(name), seed=a.seed)
        return Optimisation(
            family, noising_of(family.pipe.scheduler), method.trained, source, settings,
            Processes(cpu=family.device.type == "cpu"), constrain=method.constrain,
        )  # fmt: skip

    def _judged(self, pipe: Any, concept: Concept, name: str, about: dict[str, Any]) -> dict[str, Any]:
        real, made = (self.features(x) for x in (concept.images, self.drawn(pipe, concept.prompt, self.a.count)))
        before, _ = self.before
        unrelated = self.features(self.of_unrelated(pipe))
        scenes = [picture for prompt in concept.scenes() for picture in self.drawn(pipe, prompt, 2, self.a.seed + 3)]
        grid(scenes, columns=len(scenes)).save(self.sheet(concept, name))
        return {
            **about, "fid": fid(made, real), "kid": kid(made, real).mean,
            "unrelated_fid": fid(unrelated, before), "unrelated_kid": kid(unrelated, before).mean,
        }  # fmt: skip

    def every(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Method → concept → result; the untouched pipeline first."""
        return {m: {c.name: self.result(c, m) for c in self.concepts} for m in (UNTOUCHED, *self.a.methods)}

    def floor(self) -> dict[str, float]:
        """How far unrelated pictures of the untouched pipeline are from each other, by noise alone."""
        before, other = self.before
        return {"unrelated_fid": fid(other, before), "unrelated_kid": kid(other, before).mean}


def means(of: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over concepts: mean and standard deviation of every number."""
    return summary(list(of.values()))


def finish(a: argparse.Namespace, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result with its settings, written unless that was not wanted."""
    whole = {"settings": {k: str(v) for k, v in vars(a).items()}, **result}
    if not a.no_write:
        common.write(f"paper-{name}", whole)
    return whole


def shown(value: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """A mean and its spread, or a dash."""
    return "–" if value is None else common.spread(value, scale, digits)

"""Two concepts in one pipeline: adapters that were taught alone, loaded together.

    python benchmarks/two_concepts.py --work runs/benchmark-two-concepts

``V*`` becomes the digit that the embedded pipeline was not taught, ``W*``, a token of its own as well, another digit
upside down; each is taught by an adapter that knows nothing of the other. ``alone`` and ``together`` are the shares of
a concept's pictures that a classifier trained apart takes for its digit, turned back where that is upside down;
``others``, of the nine that the pipeline knows.

Every method trains as in ``customization.py`` (10 pictures, AdamW, linear decay, no prior preservation), at the rate
that was tuned there. LoRA's rank is the one whose bytes come closest to ours, LoKr's factors likewise. *The other's
prompt too*: each adapter is kept from the other's prompt while it learns. *Words protected, new token*: it is kept from
prompts of random words, and the concept's word learns as well; neither knows anything of the other. *Told apart*: both
adapters are changed in closed form when they are loaded (:func:`comcat.diffusion.tell_apart`). Every (method, seed) is
kept in ``--work``.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import kept_result, over_seeds, parser, slug, spread, table, write
from diffusers.utils import logging as diffusers_logging
from embedded_digits import KEPT, OTHERS, drawn, open_digits, short_teaching
from peers import METHODS, Kind, Method, cached_source
from PIL import Image

import comcat.diffusion as diffusion
from comcat.diffusion.digits.recogniser import Recogniser, train_recogniser
from comcat.diffusion.digits.scans import IDENTIFIER, LEFT_OUT, SIDE, digit_pictures, prompt_of
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import Family, family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.diffusion.pipeline.residence import frozen
from comcat.runs.loop import carry_out
from comcat.runs.processes import Processes
from comcat.runs.seeding import seeded


@dataclass(frozen=True)
class Concept:
    word: str
    digit: int
    angle: int

    @property
    def prompt(self) -> str:
        return prompt_of(self.word)

    def pictures(self, seed: int) -> list[Image.Image]:
        return [picture.rotate(self.angle) for picture in digit_pictures(self.digit, 10, seed=seed)]

    def share_in(self, pictures: Sequence[Image.Image], recogniser: Recogniser) -> float:
        return recogniser.rate([picture.rotate(-self.angle) for picture in pictures], self.digit)


CONCEPTS = (Concept(IDENTIFIER, LEFT_OUT, 0), Concept("W*", 4, 180))
TAUGHT: dict[str, tuple[str, float, dict[str, Any]]] = {
    "comcat, protected": ("comcat, protected", 1.8e-2, {}),
    "comcat": ("comcat", 1.8e-3, {}),
    "comcat, protected, the other's prompt too": ("comcat, protected", 1.8e-2, {"other": True}),
    "comcat, words protected, new token": ("comcat, words protected, new token, dropout 0.05", 3.2e-3, {"token": True}),
    "LoRA": ("LoRA", 1.8e-3, {"rank": 2}),
    "LoKr": ("LoKr", 3.2e-3, {"factor": 2}),
}
"""By name: the method, the learning rate that customization.py found for it, and what else it is told."""


def base(a: argparse.Namespace) -> Any:
    """The embedded pipeline, with a token for the second concept."""
    from tokenizers import AddedToken

    pipe = open_digits(a)
    pipe.tokenizer.add_tokens([AddedToken(CONCEPTS[1].word, normalized=False)])
    with seeded(0):
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    return pipe


def attached(family: Family, name: str, concept: Concept, seed: int) -> Method:
    """A method's fresh adapter for a concept, named after it."""
    kind, _, more = TAUGHT[name]
    told = {"protect": [prompt_of(digit) for digit in OTHERS], "prompt": concept.prompt} | more
    if more.get("other"):
        told["protect"] += [one.prompt for one in CONCEPTS if one != concept]
    if more.get("token"):
        told["token"] = concept.word
    return METHODS[kind](family, seed=seed, adapter=concept.word[0], **told)


def learn(a: argparse.Namespace, family: Family, name: str, concept: Concept, seed: int) -> Method:
    method = attached(family, name, concept, seed)
    kinds = [Kind(concept.pictures(seed), concept.prompt, a.batch, 1.0, method.caption_dropout)]
    run = Optimisation(
        family, noising_of(family.pipe.scheduler), method.trained,
        cached_source(family, kinds, SIDE, seed, live_text=method.live_text),
        CustomizeSettings(steps=a.steps, batch_size=a.batch, lr=TAUGHT[name][1], seed=seed),
        Processes(cpu=family.device.type == "cpu"), constrain=method.constrain,
    )  # fmt: skip
    carry_out(run, run.processes)
    return method


def judged(a: argparse.Namespace, recogniser: Recogniser, pipe: Any, concepts: Sequence[Concept]) -> dict[str, float]:
    """The shares of right pictures: of each concept by its word, and of the nine digits."""
    each = -(-a.samples // len(OTHERS))
    counts = {concept.prompt: a.samples for concept in concepts} | {prompt_of(digit): each for digit in OTHERS}
    found = drawn(pipe, counts, steps=a.sample_steps, guidance=2.0, batch_size=50)
    others = statistics.mean(recogniser.rate(found[prompt_of(digit)], digit) for digit in OTHERS)
    return {c.word: c.share_in(found[c.prompt], recogniser) for c in concepts} | {"others": others}


def taught(a: argparse.Namespace, recogniser: Recogniser, name: str, seed: int) -> dict[str, Any]:
    """Each concept alone, then both adapters in a fresh pipeline; ours once more, told apart."""
    alone, learned = {}, []
    for concept in CONCEPTS:
        pipe = base(a)
        family = family_of(pipe)
        with frozen(family):
            method = learn(a, family, name, concept, seed)
        alone[concept.word] = judged(a, recogniser, pipe, [concept])
        learned.append([p.detach().clone() for p in method.trained.values()])
    pipe = base(a)
    with torch.no_grad():
        for concept, values in zip(CONCEPTS, learned, strict=True):
            fresh = attached(family_of(pipe), name, concept, seed).trained.values()
            for parameter, value in zip(fresh, values, strict=True):
                parameter.copy_(value)

    def compared() -> dict[str, Any]:
        together = judged(a, recogniser, pipe, CONCEPTS)
        return {
            "together": {concept.word: together[concept.word] for concept in CONCEPTS},
            "others": {"alone": statistics.mean(s["others"] for s in alone.values()), "together": together["others"]},
            "least_kept": min(together[c.word] / max(alone[c.word][c.word], 1e-9) for c in CONCEPTS),
        }

    result = {
        "trained": sum(v.numel() for v in learned[0]),
        "alone": {word: shares[word] for word, shares in alone.items()},
        **compared(),
    }
    if to_tell_apart(name):
        diffusion.tell_apart(pipe, {concept.word[0]: concept.prompt for concept in CONCEPTS})
        result["apart"] = compared()
    return result


def to_tell_apart(name: str) -> bool:
    return name in ("comcat", "comcat, protected", "comcat, words protected, new token")


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    p = parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-two-concepts"), help="where runs are kept")
    p.add_argument("--methods", nargs="*", default=list(TAUGHT), choices=list(TAUGHT))
    a = short_teaching(p, given, "pictures of each concept, and of the nine together")
    torch.set_grad_enabled(True)
    diffusers_logging.disable_progress_bar()
    recogniser = train_recogniser()
    settings = {key: getattr(a, key) for key in KEPT}
    before = kept_result(a.work / "untouched.json", settings, lambda: judged(a, recogniser, base(a), CONCEPTS))
    print("untouched", before, flush=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in a.seeds:
        for name in a.methods:
            stem = f"two-{slug(name)}-{seed}"
            told = {**settings, "told": TAUGHT[name]} | ({"apart": True} if to_tell_apart(name) else {})
            found = kept_result(a.work / f"{stem}.json", told, partial(taught, a, recogniser, name, seed))
            apart = found.pop("apart", {})
            runs.setdefault(name, []).append(found)
            if apart:
                runs.setdefault(f"{name}, told apart", []).append(found | apart)
            print(name, seed, found, apart, flush=True)
    methods = {name: summary(own) for name, own in runs.items()}
    head = ["method", "trained", *(f"{c.word} {how} %" for c in CONCEPTS for how in ("alone", "together")),
            "kept at least %", "the nine alone %", "together %"]  # fmt: skip
    table(head, [[name, m["trained"], *(spread(m[key], 100) for key in SHARES)] for name, m in methods.items()])
    concepts = {concept.word: {"digit": concept.digit, "angle": concept.angle} for concept in CONCEPTS}
    result = {"settings": {**settings, "seeds": a.seeds}, "concepts": concepts, "untouched": before,
              "methods": methods, "runs": runs}  # fmt: skip
    if not a.no_write:
        write("two-concepts", result)
    return result


SHARES = ("V* alone", "V* together", "W* alone", "W* together", "least kept", "others alone", "others together")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over seeds, by the names of ``SHARES``."""
    values = {f"{c.word} {how}": [run[how][c.word] for run in runs] for c in CONCEPTS for how in ("alone", "together")}
    values |= {f"others {how}": [run["others"][how] for run in runs] for how in ("alone", "together")}
    values["least kept"] = [run["least_kept"] for run in runs]
    return {"trained": runs[0]["trained"]} | {key: over_seeds(own) for key, own in values.items()}


if __name__ == "__main__":
    main()

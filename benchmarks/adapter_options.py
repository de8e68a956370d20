"""Whether an option of ``customize``, or another way to train, helps on the embedded digits: each beside the same run
without it.

    python benchmarks/adapter_options.py --work runs/benchmark-lora      # with the digits' pipeline that is there

The pipeline learns its tenth digit from ten scans, shorter than the demo does. Options are the loss weighed by min-SNR
(Hang et al. 2023), and masks. For masks every picture gets a white bar along its right edge, which belongs to no digit,
and is learned with it unless the masks leave it out. Other ways to train, which live here alone:

- rank by time, from T-LoRA (Soboleva et al. 2025): the noisier a picture, the fewer of a head's channels take part, one
  at the least. When pictures are drawn all take part, as in any file; or, in a row of its own, as many as in training.
- orthogonal start, from T-LoRA as well: U_Q and U_V begin with orthogonal rows.
- decoupled scale, as DoRA (Liu et al. 2024) has it: what S_K and S_O are of a channel is a direction and a magnitude.

``protect`` has the prompts of the nine, but in the rows that say otherwise; *words* are prompts in which random words
of the tokenizer stand for V*, so that nobody names any. ``recognised`` is the share of pictures of V* that a classifier
trained apart takes for the digit, ``kid`` their distance to real scans in its features, ``barred`` the share of them
with the bar, ``others`` the share of right ones among the nine other digits. Every run is kept in ``--work``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import beside, kept_result, over_seeds, parser, slug, spread, table, write
from embedded_digits import KEPT, OTHERS, drawn, open_digits, short_teaching
from PIL import Image
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from comcat.diffusion.digits.demo import SETTINGS
from comcat.diffusion.digits.recogniser import Recogniser, train_recogniser
from comcat.diffusion.digits.scans import CLASS_PROMPT, IDENTIFIER, LEFT_OUT, SIDE, digit_pictures, prompt_of
from comcat.diffusion.learn.customize import Customization
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.modules.adapters import LowRankTerms
from comcat.scoring import kid

BAR = SIDE // 8
"""Columns of pixels at the right edge: one of the scan's, where digits are nearly black."""
NEW = "N*"
"""The identifier of rows in which it is a new token: the pipeline's own knows V* from its start."""
NAMED = tuple(map(prompt_of, OTHERS))


def rank_by_time(pipe: Any, learner: Any, drawing: bool = False) -> None:
    """Fewer channels of a head take part the noisier the latents are; ``drawing``: when pictures are drawn as well."""
    times = len(pipe.scheduler.alphas_cumprod)
    now: dict[str, Tensor] = {}

    def remember(unet: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        now["time"] = torch.as_tensor(given[1] if len(given) > 1 else named["timestep"]).reshape(-1, 1)

    def gated(terms: LowRankTerms, given: tuple[Any, ...], output: Tensor) -> Tensor:
        if given[0] not in ("q", "v") or not (drawing or torch.is_grad_enabled()):
            return output
        kept = 1 + ((1 - now["time"] / times) * terms.rank).floor().clamp(max=terms.rank - 1)
        return output * (torch.arange(terms.rank) < kept).to(output)[:, None, None]

    pipe.unet.register_forward_pre_hook(remember, with_kwargs=True)
    for terms in learner.adapter.terms.values():
        terms.register_forward_hook(gated)


@torch.no_grad()
def orthogonal(pipe: Any, learner: Any) -> None:
    """U_Q and U_V of a layer begin orthogonal, as long as before."""
    torch.manual_seed(0)
    for terms in learner.adapter.terms.values():
        for factor in (terms.q_up, terms.v_down):
            length = factor.norm()
            torch.nn.init.orthogonal_(factor)
            factor *= length / factor.norm()


@torch.no_grad()
def decoupled(pipe: Any, learner: Any) -> None:
    """Each channel's row of S_K and column of S_O is a direction times a magnitude, which is zero at first."""
    generator = torch.Generator().manual_seed(0)
    protected = []
    for terms in learner.adapter.terms.values():
        terms.reset("random", generator)
        for name, axis in (("k_down", 0), ("out_up", 1)):
            weight_norm(terms, name, dim=axis)
            getattr(terms.parametrizations, name).original0.zero_()
        protected += [terms.parametrizations.k_down.original1, terms.v_down]
    learner.protection.factors = protected


Variant = Callable[[Any, Any], None]
WORDS = {"words": 200, "lr": 0.0025}
"""At half the rate of the rest, the default of ``customize``: what may be read counts as whole tokens do."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank by time": {"variant": rank_by_time},
    "rank by time, drawn so too": {"variant": partial(rank_by_time, drawing=True)},
    "orthogonal start": {"variant": orthogonal},
    "decoupled scale": {"variant": decoupled},
    "words protected, new token, dropout 0.05": WORDS | {"new_token": "digit", "caption_dropout": 0.05},
    "words protected, new token": WORDS | {"new_token": "digit"},
    "words protected": WORDS,
    "class alone protected": {"protect": (CLASS_PROMPT,)},
    "min-SNR": {"snr_gamma": 5.0},
    "with a bar": {"bar": True},
    "with a bar, masked": {"bar": True, "masked": True},
}


class Varied(Customization):
    """A run of ``customize`` whose adapter learns in another way."""

    def __init__(self, *given: Any, variant: Variant) -> None:
        super().__init__(*given)
        self.variant = variant

    @contextmanager
    def _learner(self) -> Iterator[Any]:
        with super()._learner() as learner:
            self.variant(self.pipe, learner)
            yield learner


def barred(picture: Image.Image) -> Image.Image:
    """The picture with its bar."""
    made = picture.copy()
    made.paste((255, 255, 255), (SIDE - BAR, 0, SIDE, SIDE))
    return made


def has_bar(picture: Image.Image) -> bool:
    return bool(np.asarray(picture.convert("L"))[:, -BAR:].mean() > 127)


def masks_in(folder: Path, count: int) -> str:
    """A mask a picture: all but the bar."""
    folder.mkdir(exist_ok=True)
    mask = Image.new("L", (SIDE, SIDE), 255)
    mask.paste(0, (SIDE - BAR, 0, SIDE, SIDE))
    for number in range(count):
        mask.save(folder / f"{number}.png")
    return str(folder)


def taught(
    a: Any, recogniser: Recogniser, seed: int, bar: bool = False, masked: bool = False, words: int = 0,
    variant: Variant | None = None, protect: tuple[str, ...] = NAMED, **more: Any,
) -> dict[str, float]:  # fmt: skip
    """What one run gives."""
    pipe = open_digits(a)
    identifier = NEW if "new_token" in more else IDENTIFIER
    pictures, prompt = digit_pictures(LEFT_OUT, 10, seed=seed), prompt_of(identifier)
    pictures = [barred(picture) for picture in pictures] if bar else pictures
    if words:
        protect, more = (), more | {"protect_words": words}
    chosen = SETTINGS | {"steps": a.steps, "batch_size": a.batch, "seed": seed, "protect": protect} | more
    with tempfile.TemporaryDirectory() as folder:
        if masked:
            chosen["masks"] = masks_in(Path(folder) / "masks", len(pictures))
        given = (pipe, pictures, prompt, identifier, "default", CustomizeSettings(**chosen), None, False)
        (Customization(*given) if variant is None else Varied(*given, variant=variant)).run(restart=False)
    return judged(a, recogniser, pipe, identifier)


def judged(a: Any, recogniser: Recogniser, pipe: Any, identifier: str) -> dict[str, float]:
    """The shares of right pictures, of V* and of the nine."""
    each = max(1, a.samples // len(OTHERS))
    counts = {prompt_of(identifier): a.samples, **{prompt_of(digit): each for digit in OTHERS}}
    found = drawn(pipe, counts, steps=a.sample_steps, guidance=2.0, batch_size=60)
    concept = found[prompt_of(identifier)]
    real = recogniser.features(digit_pictures(LEFT_OUT, part=None))
    return {
        "recognised": recogniser.rate(concept, LEFT_OUT),
        "kid": kid(recogniser.features(concept), real).mean,
        "barred": statistics.mean(map(has_bar, concept)),
        "others": statistics.mean(recogniser.rate(found[prompt_of(digit)], digit) for digit in OTHERS),
    }


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-options"), help="where runs are kept")
    p.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(OPTIONS))
    p.add_argument("--add", action="store_true", help="put these options into the result that is there")
    a = short_teaching(p, given, "pictures of the concept, and of the nine others together")
    torch.set_grad_enabled(True)
    recogniser = train_recogniser()
    settings = {name: getattr(a, name) for name in KEPT}
    runs: dict[str, list[dict[str, float]]] = {option: [] for option in a.options}
    result: dict[str, Any] = {}
    for done, seed in enumerate(a.seeds, start=1):  # one seed of all options first, and written at once
        for option in a.options:
            path = a.work / f"option-{slug(option)}-{seed}.json"
            run = partial(taught, a, recogniser, seed, **OPTIONS[option])
            runs[option].append(kept_result(path, {**settings, "option": option}, run))
            print(option, seed, runs[option][-1], flush=True)
        summary = {o: {key: over_seeds([run[key] for run in own]) for key in own[0]} for o, own in runs.items()}
        told = {**settings, "seeds": a.seeds[:done], "rank": SETTINGS["rank"], "lr": SETTINGS["lr"]}
        result = {"settings": told, "options": summary, "runs": runs}
        table(HEAD, [row(option, own) for option, own in summary.items()])
        if not a.no_write and not a.add:
            write("adapter-options", result)
    if a.add:
        write("adapter-options", beside("adapter-options", result, "options", "runs"))
    return result


HEAD = ["option", "recognised %", "KID", "with the bar %", "the nine %"]


def row(option: str, own: dict[str, dict[str, float]]) -> list[str]:
    return [option, *(spread(value, 1 if key == "kid" else 100, 1) for key, value in own.items())]


if __name__ == "__main__":
    main()

"""Whether an option of ``customize`` helps, on the embedded digits: each beside the same run without it.

    python benchmarks/adapter_options.py --work runs/benchmark-lora      # with the digits' pipeline that is there

The pipeline learns its tenth digit from ten scans, shorter than the demo does. Two options are tried: the loss weighed
by min-SNR (Hang et al. 2023), and masks. For masks every picture gets a white bar along its right edge, which belongs
to no digit, and is learned with it unless the masks leave it out. ``recognised`` is the share of pictures of V* that a
classifier trained apart takes for the digit, ``barred`` the share of them with the bar, ``others`` the share of right
ones among the nine other digits. Every run is kept in ``--work``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import kept_result, parser, spread, table, write
from PIL import Image

import comcat.diffusion as diffusion
from comcat.diffusion.digits.demo import SETTINGS
from comcat.diffusion.digits.embedded import digits_pipeline
from comcat.diffusion.digits.recogniser import Recogniser, train_recogniser
from comcat.diffusion.digits.scans import IDENTIFIER, LEFT_OUT, SIDE, digit_pictures, prompt_of

BAR = SIDE // 8
"""Columns of pixels at the right edge: one of the scan's, where digits are nearly black."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min-SNR": {"snr_gamma": 5.0},
    "with a bar": {"bar": True},
    "with a bar, masked": {"bar": True, "masked": True},
}
OTHERS = [digit for digit in range(10) if digit != LEFT_OUT]


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


def taught(a: Any, recogniser: Recogniser, seed: int, bar: bool = False, masked: bool = False, **more: Any) -> Any:
    """What one run gives."""
    pipe = digits_pipeline(a.work / "digits", device=a.device, progress=True, **({"steps": 2} if a.quick else {}))
    pipe.set_progress_bar_config(disable=True)
    pictures = digit_pictures(LEFT_OUT, 10, seed=seed)
    pictures = [barred(picture) for picture in pictures] if bar else pictures
    chosen = SETTINGS | {"steps": a.steps, "batch_size": a.batch, "seed": seed} | more
    with tempfile.TemporaryDirectory() as folder:
        masks = masks_in(Path(folder) / "masks", len(pictures)) if masked else None
        diffusion.customize(
            pipe, pictures, prompt=prompt_of(IDENTIFIER), identifier=IDENTIFIER, masks=masks, progress=True,
            protect=tuple(map(prompt_of, OTHERS)), **chosen,
        )  # fmt: skip
    each = max(1, a.samples // len(OTHERS))
    wanted = [(prompt_of(IDENTIFIER), n) for n in range(a.samples)]
    wanted += [(prompt_of(digit), n) for digit in OTHERS for n in range(each)]
    found: dict[str, list[Image.Image]] = {}
    for made in diffusion.generate(pipe, [], wanted=wanted, steps=a.sample_steps, guidance=2.0, batch_size=60, seed=1):
        found.setdefault(made.prompt, []).append(made.image)
    concept = found[prompt_of(IDENTIFIER)]
    return {
        "recognised": recogniser.rate(concept, LEFT_OUT),
        "barred": statistics.mean(map(has_bar, concept)),
        "others": statistics.mean(recogniser.rate(found[prompt_of(digit)], digit) for digit in OTHERS),
    }


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-options"), help="where runs are kept")
    p.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(OPTIONS))
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--samples", type=int, default=90, help="pictures of the concept, and of the nine others together")
    p.add_argument("--sample-steps", type=int, default=20)
    p.add_argument("--quick", action="store_true", help="a smoke test: a hardly trained pipeline, 2 steps")
    a = p.parse_args(given)
    if a.quick:
        a.steps, a.samples, a.sample_steps, a.seeds = 2, 9, 2, [0]
    torch.set_grad_enabled(True)
    recogniser = train_recogniser()
    settings = {name: getattr(a, name) for name in ("steps", "batch", "samples", "sample_steps", "quick")}
    runs: dict[str, list[dict[str, float]]] = {option: [] for option in a.options}
    for seed in a.seeds:  # one seed of all options first
        for option in a.options:
            path = a.work / f"option-{option.replace(' ', '-').replace(',', '')}-{seed}.json"
            run = partial(taught, a, recogniser, seed, **OPTIONS[option])
            runs[option].append(kept_result(path, {**settings, **OPTIONS[option]}, run))
            print(option, seed, runs[option][-1], flush=True)
    summary = {option: {key: _over_seeds([run[key] for run in own]) for key in own[0]} for option, own in runs.items()}
    head = ["option", "recognised %", "with the bar %", "the nine %"]
    table(head, [[option, *(spread(value, 100) for value in own.values())] for option, own in summary.items()])
    result = {"settings": {**settings, "seeds": a.seeds, "rank": SETTINGS["rank"], "lr": SETTINGS["lr"]},
              "options": summary, "runs": runs}  # fmt: skip
    if not a.no_write:
        write("adapter-options", result)
    return result


def _over_seeds(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()

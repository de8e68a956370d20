"""Pictures from prompts, each with its own seed, so that none depends on what else is generated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import ModelError, NumericsError, SettingsError, counted, listed
from ...files import check_writable, home_path
from ...runs.seeding import derive_seed
from ...settings import from_keywords
from ..pipeline.failures import failures_told, shortage_explained
from ..pipeline.families import Family, check_side, drawn_as, family_of
from .pictures import already_made, file_name, save_picture
from .prompts import texts
from .settings import GenerateSettings


class Generated(NamedTuple):
    """One picture. ``flagged``: the pipeline's safety checker blackened it."""

    image: Image.Image
    prompt: str
    number: int
    flagged: bool


def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    wanted: Sequence[tuple[str, int]] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Iterator[Generated]:
    """The pictures of each prompt in turn, ``count`` each.

    The noise of picture n of a prompt is drawn with a generator of its own; with another batch size pictures agree up
    to rounding.

    Args:
        wanted: only these (prompt, number) instead of all.
        settings: fields of :class:`GenerateSettings`.

    Raises:
        SettingsError: for settings that do not fit. ModelError: if the pipeline has no scheduler, or fails on these.
            NumericsError: if it makes NaN or infinity. MemoryShortage: if the device's memory is too small; says what
            would fit.
    """
    from tqdm import tqdm

    how = from_keywords(GenerateSettings, settings)
    if getattr(pipe, "scheduler", None) is None:
        raise ModelError(f"{type(pipe).__name__} has no scheduler, so it cannot generate; load the pipeline with one")
    check_sampling(pipe, how.steps)
    _check_fits(pipe, how)
    prompts = texts(prompts, "prompts")
    pictures = [(p, n) for p in prompts for n in range(how.count)] if wanted is None else list(wanted)
    bar = tqdm(total=len(pictures), desc="pictures", unit="picture", disable=not progress)
    with bar, quiet(pipe):
        for first in range(0, len(pictures), how.batch_size):
            for generated in _batch(pipe, pictures[first : first + how.batch_size], how):
                bar.update()
                yield generated


def _batch(pipe: Any, pictures: list[tuple[str, int]], settings: GenerateSettings) -> Iterator[Generated]:
    # Noise is drawn on the CPU, where it is the same for every device.
    generators = [torch.Generator().manual_seed(derive_seed(settings.seed, "picture", *of)) for of in pictures]
    family = drawn_as(pipe)
    guidance = family.guidance_name
    options = {
        **family.drawing(),
        "num_inference_steps": settings.steps,
        guidance: settings.guidance,
        "negative_prompt": None if settings.negative is None else [settings.negative] * len(pictures),
        "height": settings.size,
        "width": settings.size,
        "output_type": "pil",
    }
    if guidance != Family.guidance_name and options["negative_prompt"] is None and (settings.guidance or 1) > 1:
        options["negative_prompt"] = [" "] * len(pictures)  # without one these pipelines do not guide
    given = {name: value for name, value in options.items() if value is not None}
    doing = f"generating {counted(len(pictures), 'picture')} at once"
    with (
        failures_told(pipe, settings.steps, settings.size),
        shortage_explained(doing, _what_would_fit(pipe, settings)),
        _finite(pipe, pictures),
    ):
        output = pipe(prompt=[prompt for prompt, _ in pictures], generator=generators, **given)
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    for image, (prompt, number), flagged in zip(family.pictures(output), pictures, flags, strict=True):
        yield Generated(image, prompt, number, bool(flagged))


@contextmanager
def _finite(pipe: Any, pictures: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Raises NumericsError where the pipeline decodes or makes NaN or infinity, which would be stored as black."""
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if not isinstance(decoder, nn.Module):
        yield
        return
    wrong: list[str] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            given = all(x.isfinite().all() for x in inputs if isinstance(x, Tensor))
            wrong.append("its VAE decodes to" if given else "its denoiser makes")

    with decoder.register_forward_hook(look):
        yield
    if wrong:
        prompts = listed([repr(prompt) for prompt in dict.fromkeys(prompt for prompt, _ in pictures)])
        kind = str(getattr(pipe, "dtype", "")).removeprefix("torch.")
        raise NumericsError(
            f"the pipeline ({kind}) makes no picture of {prompts}: {wrong[0]} NaN or infinity; in float16 some "
            "overflow (load it in bfloat16 or float32), and so do adapters at a very large scale"
        )


def check_sampling(pipe: Any, steps: int | None) -> None:
    """Raise SettingsError for more steps than a pipeline's scheduler has times."""
    scheduler = getattr(pipe, "scheduler", None)
    times = None if scheduler is None else scheduler.config.get("num_train_timesteps")
    if steps is not None and times is not None and steps > times:
        raise SettingsError(f"got {steps} sampler steps, expected at most {times}, the scheduler's times")


def _check_fits(pipe: Any, how: GenerateSettings) -> None:
    try:
        family = family_of(pipe)
    except ModelError:  # a pipeline that cannot be taught may still generate
        return
    if how.size is not None:  # diffusers' UNet pipelines take multiples of 8 whatever their VAE
        check_side("size", how.size, family, max(8, family.multiple()) if family.component == "unet" else None)
    if how.negative is not None and not family.takes_negative():
        raise SettingsError(
            "negative: this pipeline's guidance is built into the model, so a negative prompt would change nothing; "
            "leave it out"
        )
    if how.negative is not None and how.guidance is not None and how.guidance <= family.unguided:
        raise SettingsError(
            f"negative: at guidance {how.guidance:g} this pipeline does not guide, so a negative prompt would change "
            f"nothing; expected a guidance above {family.unguided:g}, or no negative prompt"
        )


def _what_would_fit(pipe: Any, settings: GenerateSettings) -> list[str]:
    advice = ["one picture at a time (--batch-size 1)"] if settings.batch_size > 1 else []
    advice.append(
        f"a smaller picture (--size below {settings.size})" if settings.size else "a smaller picture (--size)"
    )
    if getattr(pipe, "dtype", None) == torch.float32:
        advice.append("weights in 16 bit (--dtype bfloat16)")
    return advice


class Written(NamedTuple):
    """What :func:`generate_to` did: the files in order, how many of them were there already, how many were
    blackened.
    """

    paths: list[Path]
    kept: int
    flagged: int


def generate_to(
    folder: str | os.PathLike[str],
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Written:
    """Generate into a folder of PNG files; pictures that are there already, made with the same settings, are kept.

    Args:
        about: plain data on the model and its adapters, written into each picture and compared with what is there.
        overwrite: replace pictures that were made in another way.

    Raises:
        StoreError: if a picture made in another way is in the place of a new one (unless ``overwrite``), or none can be
            written.
    """
    folder = home_path(folder)
    check_writable(folder)
    prompts = list(dict.fromkeys(texts(prompts, "prompts")))
    chosen = from_keywords(GenerateSettings, settings)
    how = {k: v for k, v in asdict(chosen).items() if k not in ("count", "batch_size")}
    how |= {"scheduler": type(getattr(pipe, "scheduler", None)).__name__, **(about or {})}

    def made(prompt: str, number: int) -> dict[str, Any]:
        return {**how, "prompt": prompt, "number": number}

    every = [(p, n) for p in prompts for n in range(chosen.count)]
    paths = {of: folder / file_name(*of) for of in every}
    wanted = [of for of in every if not already_made(paths[of], made(*of), overwrite=overwrite)]
    flagged = 0
    for generated in generate(pipe, prompts, wanted=wanted, progress=progress, **asdict(chosen)):
        of = (generated.prompt, generated.number)
        flagged += generated.flagged
        save_picture(generated.image, paths[of], made(*of))
    return Written(list(paths.values()), len(every) - len(wanted), flagged)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline without its own progress bar a call."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)

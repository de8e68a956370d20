"""A text-to-image pipeline that needs no download: real diffusers and transformers parts, small, trained on the
built-in digits.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...errors import ModelError, SettingsError
from ...files import home_path
from ...runs.seeding import seeded
from ...store.folder import STOCK_CONFIG, check_replaceable, own_config, replacing, sha256
from .autoencoder import averaging_autoencoder
from .pretraining import pretrain
from .scans import IDENTIFIER, LEFT_OUT, SIDE, every_word, scans_of
from .vocabulary import make_tokenizer

STEPS = 500
"""Training steps of the denoiser."""
RECIPE = 1
"""Counts up when the same settings would give another pipeline."""
HALVINGS, SCALING = 2, 1.5
"""From pictures to latents: the sides are halved so often, and the values come to about unit variance."""
WIDTHS, CONTEXT, TOKENS = (32, 64), 64, 32
"""Of the denoiser's two levels, and of the text encoder; and how many tokens a prompt may have."""


def digits_pipeline(
    folder: str | os.PathLike[str] | None = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    left_out: int = LEFT_OUT,
    progress: bool = True,
    device: str = "auto",
) -> Any:
    """A ``StableDiffusionPipeline`` that draws nine of the ten digits (32×32), trained now or read from ``folder``.

    Its prompts are those of :func:`~comcat.diffusion.digits.prompt_of`: "a photo of the digit three", and "… in red"
    (green, blue, yellow); "a photo of a digit" gives any of the nine. Of the tenth no part has seen a scan, and ``V*``
    is one token. Only the training part of the scans is used.

    Args:
        folder: where it is kept, whole or not at all, in diffusers' layout; the next call reads it from there. One that
            is damaged, or made with other settings, is made anew, with a warning. None: it is not kept.
        steps: training steps of the denoiser.
        left_out: the digit that it is not taught, 0 to 9.
        device: where to train and leave it: auto, cpu, cuda, …

    Raises:
        SettingsError: for settings out of range. StoreError: if something else is in the folder, or it cannot be
            written.
        ModelError: if diffusers or transformers is missing.
    """
    if steps < 1:
        raise SettingsError(f"steps: got {steps}, expected at least 1")
    if not 0 <= left_out <= 9:
        raise SettingsError(f"left_out: got {left_out}, expected a digit, 0 to 9")
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"the digits pipeline needs the package: pip install 'comcat[diffusion]' ({error})") from None
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    made = {"recipe": RECIPE, "steps": steps, "seed": seed, "left_out": left_out}
    place = None if folder is None else home_path(folder)
    if place is not None and (kept := _read(place, made)) is not None:
        return kept.to(device)
    with seeded(seed):
        pipe = build().to(device)
        pretrain(pipe, *scans_of("train", left_out=left_out), steps=steps, seed=seed, progress=progress)
    if place is not None:
        _write(pipe, place, made)
    return pipe


def build() -> Any:
    """The pipeline with random weights."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(every_word(), identifiers=[IDENTIFIER], length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        intermediate_size=2 * CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shape: Any = {
        "down_block_types": ("CrossAttnDownBlock2D",) * len(WIDTHS),
        "up_block_types": ("CrossAttnUpBlock2D",) * len(WIDTHS),
        "block_out_channels": WIDTHS,
    }
    unet = UNet2DConditionModel(
        **shape,
        sample_size=SIDE >> HALVINGS,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,  # how many heads, in these UNets
        norm_num_groups=8,
    )
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=averaging_autoencoder(SIDE, halvings=HALVINGS, scaling_factor=SCALING),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _read(folder: Path, made: dict[str, int]) -> Any | None:
    """The pipeline kept in a folder, or None if one must be made. Raises StoreError if the folder is not ours."""
    manifest = own_config(folder)
    if manifest is None and (folder / STOCK_CONFIG).is_file():
        warnings.warn(f"{folder / STOCK_CONFIG} is damaged; the pipeline is made anew", stacklevel=3)
        shutil.rmtree(folder)
    check_replaceable(folder, overwrite=True)
    if manifest is None:
        return None
    if damaged := _damaged(folder, manifest):
        warnings.warn(f"{folder / damaged} is damaged or missing; the pipeline is made anew", stacklevel=3)
        return None
    if manifest.get("digits_pipeline") != made:
        warnings.warn(f"{folder} was made with other settings; the pipeline is made anew", stacklevel=3)
        return None
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder)


def _damaged(folder: Path, manifest: dict[str, Any]) -> str | None:
    for name, digest in manifest.get("sha256", {}).items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            return name
    return None


def _write(pipe: Any, folder: Path, made: dict[str, int]) -> None:
    with replacing(folder) as new:
        pipe.save_pretrained(new)
        hashes = {str(p.relative_to(new)): sha256(p) for p in sorted(new.rglob("*")) if p.is_file()}
        manifest = {"comcat_version": __version__, "digits_pipeline": made, "sha256": hashes}
        (new / STOCK_CONFIG).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

"""How the embedded pipeline learns: its text encoder and denoiser together, from random weights, in minutes on a
CPU.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..pipeline.noising import noising_of
from .scans import INKS, draw_caption, pixels_of

BATCH, RATE = 64, 2e-3


def pretrain(pipe: Any, scans: Tensor, digits: Tensor, *, steps: int, seed: int, progress: bool) -> None:
    """Train the text encoder and denoiser of a pipeline in place, then leave them in eval mode.

    Half of the pictures are white, half are in any ink; the loss is the one that the pipeline's scheduler asks for.

    Args:
        pipe: a StableDiffusionPipeline with random weights, its autoencoder excepted.
        scans: (n, 1, 8, 8) in 0…1; digits: (n,), what they show.
    """
    unet, text, device = pipe.unet.train(), pipe.text_encoder.train(), pipe.unet.device
    noising, inks, shown = noising_of(pipe.scheduler), list(INKS), digits.tolist()
    latents = torch.stack(
        [_encode(pipe.vae, pixels_of(scans, ink)) for ink in inks]
    )  # (inks, n, channels, height, width)
    chance, draws = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    bar = tqdm(range(steps), desc="training a small pipeline on digits", unit="step", disable=not progress)
    with torch.enable_grad():
        for _ in bar:
            rows = chance.choices(range(len(shown)), k=BATCH)
            shades = [0 if chance.random() < 0.5 else chance.randrange(len(inks)) for _ in rows]
            captions = [draw_caption(shown[row], inks[shade], chance) for row, shade in zip(rows, shades, strict=True)]
            clean = latents[shades, rows]
            noise = torch.randn(clean.shape, generator=draws).to(device)
            times = noising.draw(BATCH, draws).to(device)
            predicted = unet(noising.mix(clean, noise, times), times, _context(pipe, captions)).sample
            loss = F.mse_loss(predicted, noising.target(clean, noise, times))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    unet.eval()
    text.eval()


@torch.no_grad()
def _encode(vae: Any, pictures: Tensor) -> Tensor:
    parts = [vae.encode(part.to(vae.device)).latent_dist.mean for part in pictures.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


def _context(pipe: Any, captions: list[str]) -> Tensor:
    """The text encoder's output (captions, tokens, width); each different caption is encoded once."""
    different = list(dict.fromkeys(captions))
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(different, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    encoded = pipe.text_encoder(tokens.input_ids.to(pipe.unet.device)).last_hidden_state
    return encoded[[different.index(caption) for caption in captions]]

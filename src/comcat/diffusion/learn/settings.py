"""What can be said about teaching a concept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...errors import SettingsError
from ...settings import LARGEST_SEED, check_types, expect

MOST_CROPS = 1000
"""Of one picture: more differ by a pixel or not at all, and all are encoded beforehand."""


@dataclass(frozen=True, kw_only=True)
class CustomizeSettings:
    """How a concept is learned. The defaults are the paper's, but for the start: there no factor is zero
    (``init="random"``).
    """

    steps: int = 500
    """Training steps."""
    batch_size: int = 1
    """Pictures a step, of all processes together."""
    rank: int = 2
    """Extra channels of each head."""
    where: Literal["cross", "self", "all", "joint"] | None = None
    """Which attention learns: cross, self or all of a UNet; joint or all of a transformer (SD 3, Flux). Left out, where
    pictures meet the text: cross or joint."""
    only: tuple[str, ...] = ()
    """What of that attention learns: products (qk, vo), path prefixes (transformer_blocks.3) or both
    (transformer_blocks:vo); by default all."""
    text_encoder: bool = False
    """Let the CLIP text encoders' attention learn as well."""
    init: Literal["zero", "random"] = "zero"
    """Start of the factors: zero leaves the pipeline as it is at first."""
    lr: float = 2.5e-3
    """Learning rate (AdamW)."""
    schedule: Literal["linear", "constant"] = "linear"
    """How the learning rate goes on: to zero, or as it is."""
    weight_decay: float = 0.01
    """Weight decay."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    new_token: str | None = None
    """Give the identifier a token of its own and learn its embedding, from that of this word: dog."""
    caption_dropout: float = 0.0
    """Share of the concept's pictures that is shown under the empty prompt, so that guidance, which leads away from
    that, does not exaggerate the concept; 0.1 is usual."""
    protect: tuple[str, ...] = ()
    """Prompts that shall go on giving what they give: their tokens are projected out of what the adapter reads
    (cross-attention only).
    """
    protect_words: int = 0
    """Protect so many prompts as well in which random words of the tokenizer's vocabulary stand for the identifier, so
    that none need be named; 200 with new_token and a caption_dropout of 0.05 did best.
    """
    prior_prompt: str | None = None
    """Prior preservation: a prompt for the class without the identifier, whose pictures shall stay as they are."""
    prior_images: str | None = None
    """Folder of pictures for it; left out, the pipeline makes them."""
    prior_count: int = 100
    """How many it makes."""
    prior_weight: float = 1.0
    """Weight of their loss."""
    masks: str | None = None
    """Folder of a mask for each picture, of its name and size: white where the concept is. The rest is not learned. It
    lies outside of the pictures' folder, whose sub-folders are read as well."""
    resolution: int | None = None
    """Side of the square pictures to train on, in pixels; left out, the pipeline's own."""
    crops: int = 4
    """Random crops of each picture that is not square; 1: its centre."""
    flip: bool = False
    """Show mirror images as well (not for text or anything else that has a left and a right)."""
    snr_gamma: float | None = None
    """Weigh the loss over time by min-SNR; 5 is usual."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    seed: int = 0
    """Seed of everything random."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0: none."""
    keep: int = 2
    """Checkpoints to keep."""
    sample_every: int = 0
    """Steps between sheets of sample pictures, the first before any step, all from the same noise; 0: none."""
    sample_prompt: str | None = None
    """Prompt of the samples; left out, that of the training."""
    sample_count: int = 4
    """Pictures a sheet."""
    sample_steps: int | None = None
    """Sampler steps of samples and class pictures; left out, the pipeline's default."""
    sample_guidance: float | None = None
    """Guidance scale of samples and class pictures; left out, the pipeline's default."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "steps", "batch_size", "rank", "prior_count", "keep", "sample_count", least=1)
        expect(self, "crops", least=1, most=MOST_CROPS)
        expect(self, "sample_steps", "resolution", least=1)
        expect(self, "checkpoint_every", "sample_every", "weight_decay", "prior_weight", "protect_words", least=0)
        expect(self, "caption_dropout", least=0, below=1)
        expect(self, "lr", "clip", "snr_gamma", above=0)
        expect(self, "sample_guidance")
        expect(self, "seed", least=0, most=LARGEST_SEED)
        if self.prior_images is not None and self.prior_prompt is None:
            raise SettingsError("prior_images needs prior_prompt, the prompt that describes those pictures")

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings that the result depends on, beyond rounding."""
        free = {"gradient_checkpointing", "checkpoint_every", "keep", "masks"}  # a run tells masks by their pixels
        found = {k: v for k, v in asdict(self).items() if k not in free and not k.startswith("sample_")}
        return {k: v for k, v in found.items() if v or k not in ("only", "protect_words")}  # older runs know none

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * (1 - step / self.steps) if self.schedule == "linear" else self.lr

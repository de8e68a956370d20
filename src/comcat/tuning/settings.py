"""The settings of tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import SettingsError
from ..settings import LARGEST_SEED, check_types, expect

Distillation = Literal["none", "hard", "soft"]
Precision = Literal["fp32", "bf16", "fp16"]

_UNIMPORTANT = frozenset({"workers", "trackers", "keep", "checkpoint_every", "log_every", "eval_every"})
"""Fields that may change when a run goes on: they do not touch what it computes."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How to tune; the command line and recipes are made from these fields.

    The defaults are for a short run on a model that compression has left nearly right: no regularisation beyond DeiT's
    random crops and flips, and a soft teacher. A run of many epochs wants DeiT's: ``mixup=0.8, cutmix=1.0,
    smoothing=0.1, rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, repeats=3, weight_decay=0.05``.
    """

    epochs: float | None = None
    """Passes over the data, or a part of one; by default 1."""
    steps: int | None = None
    """Updates of the weights, instead of epochs."""
    epoch_size: int | None = None
    """How many samples make an epoch; needed for streams of unknown length."""
    batch_size: int = 256
    """Samples an update, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is computed in, to save memory; the update is the same."""
    lr: float = 1e-4
    """Learning rate of AdamW, from which a cosine leads down."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises linearly from min_lr."""
    weight_decay: float = 0.005
    """Weight decay of matrices of weights, as in the paper for DeiT-small; DeiT's own, for base, is 0.05."""
    clip: float | None = 1.0
    """Largest norm of the gradient of all weights together; None does not clip."""
    precision: Precision = "fp32"
    """What to compute in; the weights and their updates stay in fp32."""
    distillation: Distillation | None = None
    """What to learn of the teacher's logits: nothing, its likeliest class (DeiT), or its distribution, the default."""
    temperature: float = 1.0
    """Softens both distributions of soft distillation."""
    alpha: float = 0.5
    """Share of distillation in the loss, the labels' being the rest; without labels it is all."""
    features: tuple[str, ...] = ()
    """Blocks whose outputs are to be like the teacher's: paths (blocks.3), all, or every-3."""
    feature_weight: float = 1.0
    """Weight of that likeness at the start, beside the rest of the loss."""
    feature_decay: float = 0.5
    """Share of the run over which that weight falls to 0, linearly."""
    smoothing: float = 0.0
    """Label smoothing."""
    mixup: float = 0.0
    """Mixup's alpha; 0: none."""
    cutmix: float = 0.0
    """CutMix's alpha; 0: none."""
    rand_augment: str | None = None
    """RandAugment in timm's words, rand-m9-mstd0.5-inc1 being DeiT's."""
    erase: float = 0.0
    """Share of pictures with a random rectangle erased."""
    crop_scale: tuple[float, float] | Literal["auto"] | None = "auto"
    """Least and largest share of a picture's area that a random crop shows; None shows what evaluation does; auto is
    DeiT's 0.08 1, but 0.6 1 for pictures of at most 64 pixels.
    """
    flip: float = 0.5
    """Share of pictures mirrored left to right."""
    drop_path: float | None = None
    """Stochastic depth of the last block, rising linearly from none at the first (DeiT: 0.1); None: as loaded."""
    repeats: int = 1
    """Repeated augmentation: so many samples of a picture in a row (DeiT: 3)."""
    ema: float | None = None
    """Decay a step of an exponential moving average of the weights, which is then what is evaluated and returned."""
    only: tuple[str, ...] = ()
    """Parts to tune, the rest staying as it is: parts of paths (attn, mlp, blocks.3, head), by default all."""
    seed: int = 0
    """Seed of the order, of augmentation and of drop-path."""
    eval_every: float = 1.0
    """Epochs between evaluations; there is one at the end, too."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at each epoch's end, too."""
    keep: int = 2
    """How many checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of the log."""
    workers: int = 0
    """Processes that decode and augment pictures for each process of the run; 0: none but itself."""
    trackers: tuple[str, ...] = ()
    """Where to send the curves besides the log: tensorboard, wandb and others that accelerate knows."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.epochs is not None and self.steps is not None:
            raise SettingsError("got both epochs and steps, expected one of them")
        expect(
            self, "batch_size", "accumulate", "repeats", "checkpoint_every", "keep", "log_every", "epoch_size", least=1
        )
        expect(self, "epochs", "steps", "lr", "min_lr", "weight_decay", "feature_weight", least=0)
        expect(self, "mixup", "cutmix", "workers", least=0)
        expect(self, "alpha", "feature_decay", "erase", "flip", "warmup", least=0, most=1)
        expect(self, "smoothing", "ema", "drop_path", least=0, below=1)
        expect(self, "temperature", "clip", "eval_every", above=0)
        if self.crop_scale != "auto":
            expect(self, "crop_scale", above=0, most=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)
        if self.min_lr > self.lr:
            raise SettingsError(f"got min_lr={self.min_lr:g}, expected at most lr={self.lr:g}")
        if isinstance(self.crop_scale, tuple) and self.crop_scale[0] > self.crop_scale[1]:
            raise SettingsError(f"got crop_scale={self.crop_scale}, expected two shares of the area, the smaller first")

    def lasting(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on, as plain data."""
        return {name: value for name, value in asdict(self).items() if name not in _UNIMPORTANT}

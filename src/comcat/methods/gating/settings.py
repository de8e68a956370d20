"""The settings of pruning by gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import SettingsError
from ...settings import StatisticName, expect
from ...tuning.settings import TuneSettings
from ..settings import CompressSettings


@dataclass(frozen=True, kw_only=True)
class PruneSettings(TuneSettings):
    """How much to prune, how, and how to train meanwhile; the command line and recipes are made from these fields."""

    reduce: float = 0.5
    """Share of the whole model's cost to save, for example 0.5."""
    budget: Literal["parameters", "macs"] = "parameters"
    """What cost is: parameters or macs (multiply-accumulates)."""
    start: Literal["closed", "blind"] = "closed"
    """What is marked first: what the closed form would cut, heads in the basis of its factors, or what the gates'
    gradients say, heads as they are.
    """
    statistic: StatisticName = "loss"
    """What errors of the closed form are measured by: the weights alone, activations, or their effect on the loss."""
    sites: tuple[str, ...] = ()
    """Kinds (qk, vo, units) or path prefixes (blocks.3) that may be pruned; by default all."""
    multiple: int = 1
    """Keep multiples of it: channels of a head, and hidden units."""
    tie: bool | None = None
    """Give QK and VO of a layer one width; by default with a MACs budget, where fused attention pads both anyway."""
    pictures: int = 512
    """How many pictures to calibrate on, and to measure gates on each time."""
    choices: int = 8
    """How often channels are marked, from the first step until the marks are settled."""
    ramp: float = 0.0
    """Share of these choices over which the saving rises to the whole of it; 0: it is asked for at once."""
    settle: float = 0.4
    """Share of the run after which the marks stay as they are."""
    closing: float = 0.2
    """Share of the run that an open gate takes to close."""
    take_over: bool = True
    """Let the channels that stay take over what closing ones did, by least squares on the calibration pictures."""
    gate_lr: float = 1e-3
    """Adam's learning rate for open gates; it follows the schedule of lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "reduce", above=0, below=1)
        expect(self, "multiple", "pictures", "choices", least=1)
        expect(self, "ramp", least=0, most=1)
        expect(self, "settle", "closing", above=0, below=1)
        expect(self, "gate_lr", least=0)
        if self.settle + self.closing > 1:
            raise SettingsError(
                f"got settle={self.settle:g} and closing={self.closing:g}, expected at most 1 together: "
                "what is marked last could not close before the end"
            )
        if self.precision == "fp16":
            raise SettingsError("got precision='fp16', whose scaled gradients do not suit gates; expected fp32 or bf16")

    def closed_form(self) -> CompressSettings:
        """The same saving as the closed form is asked for it."""
        return CompressSettings(
            reduce=self.reduce, budget=self.budget, statistic=self.statistic, only=self.sites, multiple=self.multiple,
            tie=self.tie, pictures=self.pictures, seed=self.seed,
        )  # fmt: skip

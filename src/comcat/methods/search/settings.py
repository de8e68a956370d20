"""The settings of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import SettingsError
from ...settings import LARGEST_SEED, StatisticName, check_types, expect
from ..settings import Budget, check_forms

Grid = Literal["near", "even", "paper"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; the command line and recipes are made from these fields."""

    beta: float = 1.5
    """Exponent β of the cost in Eq. 6."""
    penalty: Literal["always", "above"] = "above"
    """Whether the cost weighs above the budget alone, as in the paper's code, or always, as its Eq. 6 has it: then a
    long search goes far below the budget."""
    penalised: Literal["sites", "model"] = "sites"
    """What the cost is of: the sites alone, as in Eq. 6, or the whole model, whose fixed part weakens β."""
    grid: Grid = "near"
    """Candidates: a quarter to four times the closed form's rank, equal steps up to what saves, or the paper code's."""
    grid_size: int = 9
    """How many candidates there are near the closed form's rank, or in equal steps."""
    candidates: tuple[int, ...] = ()
    """Candidate ranks themselves, summed over the heads of a layer as the paper states them."""
    start: Literal["waterfill", "blind"] = "waterfill"
    """Begin at the closed form's ranks, or with all candidates alike as the paper does."""
    rounds: int = 4
    """Rounds of learning probabilities; between two of them, weights are learned."""
    rank_steps: int = 50
    """Steps a round on the probabilities."""
    weight_steps: int = 50
    """Steps a round on the weights; 0 keeps them as they are."""
    batch_size: int = 64
    """Pictures a step, over all processes."""
    rank_lr: float = 0.05
    """AdamW's learning rate for α."""
    rank_weight_decay: float = 0.0
    """AdamW's weight decay for α; the paper's code has 5e-4."""
    weight_lr: float = 2e-5
    """AdamW's learning rate for the weights."""
    weight_decay: float = 0.005
    """AdamW's weight decay."""
    temperature: float = 5.0
    """Temperature of the Gumbel-softmax at the first step."""
    final_temperature: float = 0.1
    """Temperature at the last; between the two it falls geometrically."""
    held_out: float = 0.2
    """Share of the training pictures that the probabilities are learned on and the weights never see."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What to compute the forward passes in."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    workers: int = 0
    """Processes that read and decode pictures ahead, for each training process."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "rounds", "rank_steps", "batch_size", "grid_size", "checkpoint_every", "keep", least=1)
        expect(self, "candidates", least=1)
        expect(self, "rank_lr", "temperature", "final_temperature", above=0)
        expect(self, "weight_steps", "beta", "weight_lr", "weight_decay", "rank_weight_decay", "workers", least=0)
        expect(self, "held_out", above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(SearchOptions):
    """What to search for, and how."""

    reduce: float = 0.5
    """Share of the whole model's cost to save, for example 0.5."""
    budget: Budget = "parameters"
    """What cost is: parameters or macs (multiply-accumulates)."""
    forms: str | tuple[str, ...] = "ranks,units"
    """What is searched: ranks, units (of feed-forwards), or ranks of attention and units of feed-forwards."""
    statistic: StatisticName = "loss"
    """What orders channels and predicts losses: weights alone (the paper), activations, or their effect on the loss."""
    multiple: int = 1
    """Candidates are multiples of it (per head); 8 suits 16-bit GPU kernels."""
    only: tuple[str, ...] = ()
    """Kinds (qk, vo, linear, units) or path prefixes (blocks.3) that may shrink; by default all."""
    head: bool = False
    """Let classifier heads shrink as well."""
    pictures: int = 512
    """How many pictures to calibrate on, each round."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "forms", ",".join(check_forms(self.forms)))
        if "tokens" in check_forms(self.forms):
            raise SettingsError(
                "a search is over ranks and units; tokens are chosen by comcat.merge or comcat.compress"
            )
        expect(self, "reduce", above=0, below=1)
        if self.budget == "latency":
            raise SettingsError("a search is under parameters or macs; comcat.compress takes a budget of latency")
        expect(self, "multiple", "pictures", least=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)

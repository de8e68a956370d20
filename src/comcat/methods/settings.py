"""What to compress and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import SettingsError
from ..settings import LARGEST_SEED, check_types, expect
from ..statistics import StatisticName
from .allocate import Budget, RankRule, check_tokens
from .ladders import check_forms


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """What to compress and how; the command line and recipes are made from these fields."""

    reduce: float | None = None
    """Share of the whole model's cost to save, for example 0.5."""
    max_drop: float | None = None
    """Instead of reduce: save as much as loses at most so many points on held-out pictures (top-1, or agreement
    without labels).
    """
    budget: Budget = "parameters"
    """What cost is: parameters, macs (multiply-accumulates), or latency (time, measured on this machine, where the
    model is and in the type of its weights).
    """
    target_ms: float | None = None
    """Instead of reduce, with a budget of latency: a batch may take so many milliseconds."""
    max_parameters: int | None = None
    """Beside a budget of macs or latency: the whole model may have so many parameters."""
    batch: int = 1
    """Pictures at a time, with a budget of latency."""
    compiled: bool = False
    """With a budget of latency, time under torch.compile."""
    quick: bool = False
    """With a budget of latency, measure fewer widths."""
    statistic: StatisticName = "loss"
    """What errors are measured by: the weights alone (the paper), activations, or their effect on the loss."""
    forms: str | tuple[str, ...] = "ranks,units"
    """What may become of the model's parts: ranks (thin factors of attention's products and of linear layers), units
    (feed-forwards lose hidden units), tokens (blocks run on fewer tokens, those that look alike merged; with a budget
    of MACs), or some of them, for each part the better.
    """
    ranks: RankRule | Literal["search"] = "waterfill"
    """How ranks are chosen: the same share everywhere, one rank for all products, the same share of singular values,
    least predicted loss, or by search on training pictures.
    """
    energy: float = 0.9
    """Share of the singular values to keep with ranks 'energy' where neither reduce nor max_drop is given."""
    multiple: int | None = None
    """Round ranks to multiples of it; by default the largest of 16, 8, 4, 2 that costs at most a tenth (or 0.001 nats)
    more predicted loss than 1; kernels like round widths.
    """
    tie: bool | None = None
    """Give QK and VO of a layer one rank; by default with a MACs budget, where fused attention pads both to one width
    anyway.
    """
    per_head: bool = False
    """Let the heads of a layer have ranks of their own, padded to the largest."""
    joint_refit: bool = True
    """After truncation, refit the output projection over all heads at once."""
    sequential: bool = False
    """Calibrate block after block on the model whose earlier blocks are already small."""
    only: tuple[str, ...] = ()
    """Kinds (qk, vo, linear, units) or path prefixes (blocks.3) that may shrink; by default all."""
    head: bool = False
    """Let classifier heads shrink as well. They are small, and what they lose costs most."""
    pictures: int = 512
    """How many pictures to calibrate on."""
    seed: int = 0
    """Seed of the choice of pictures and of sampled labels."""

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "forms", ",".join(check_forms(self.forms)))
        check_tokens(self.forms, self.budget, self.ranks, self.statistic)
        given = [name for name in ("reduce", "max_drop", "target_ms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingsError(f"got both {given[0]} and {given[1]}, expected one of them")
        if self.target_ms is not None and self.budget != "latency":
            raise SettingsError(f"got target_ms and budget {self.budget!r}, expected budget 'latency'")
        if self.max_parameters is not None and (self.budget == "parameters" or self.ranks != "waterfill"):
            raise SettingsError(
                f"got max_parameters beside budget {self.budget!r} and ranks {self.ranks!r}; "
                "expected budget 'macs' or 'latency' and ranks 'waterfill'"
            )
        expect(self, "max_parameters", least=1)
        expect(self, "target_ms", above=0)
        expect(self, "batch", least=1)
        expect(self, "max_drop", above=0)
        expect(self, "pictures", "multiple", least=1)
        expect(self, "reduce", above=0, below=1)
        expect(self, "energy", above=0, most=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)

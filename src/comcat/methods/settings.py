"""What is asked of a method: its settings, and the words that they take. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SettingsError, nearest
from ..settings import LARGEST_SEED, StatisticName, check_types, expect, expect_one_of

RankRule = Literal["uniform", "equal", "energy", "waterfill"]
RULES: tuple[RankRule, ...] = ("uniform", "equal", "energy", "waterfill")
Budget = Literal["parameters", "macs", "latency"]
FormName = Literal["ranks", "units", "tokens"]
FORM_NAMES: tuple[FormName, ...] = ("ranks", "units", "tokens")
How = Literal["similar", "grid", "drop"]
HOWS: tuple[How, ...] = ("similar", "grid", "drop")
By = Literal["class", "random"]
BYS: tuple[By, ...] = ("class", "random")
DRAWN = 24
"""Pictures that the divergence of merging is measured on."""


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
    """Kinds (qk, vo, linear, units) or path prefixes (blocks.3) that may shrink; by default all. With tokens among the
    forms, blocks (blocks.3) or what holds them (blocks).
    """
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
        check_tokens_of_parts(self.forms, self.only)
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
        expect(self, "max_drop", above=0, most=100)
        expect(self, "pictures", "multiple", least=1)
        expect(self, "reduce", above=0, below=1)
        expect(self, "energy", above=0, most=1)
        expect(self, "seed", least=0, most=LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """On how many tokens the blocks of a model shall run, and which tokens are run as one."""

    keep: float = 0.7
    """Mean share of the grid's tokens over all blocks, or over those that are named."""
    how: How = "similar"
    """Merge tokens that look alike (similar) or neighbours (grid: CAIT's asymmetric merging), or leave some out (drop:
    a baseline).
    """
    by: By = "class"
    """With drop, which stay: those that the class token looks at (class), or any (random)."""
    blocks: tuple[str, ...] = ()
    """Paths of the blocks that may run on fewer tokens (blocks.3); by default all."""
    residual: bool = True
    """Hand each token the block's update of its group, so that it keeps what it was; without, tokens that were merged
    leave the block as one.
    """
    pictures: int = DRAWN
    """Pictures that schedules are measured on."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "keep", above=0, most=1)
        expect(self, "pictures", least=1)
        expect_one_of("how", self.how, HOWS)
        expect_one_of("by", self.by, BYS)


def check_forms(forms: Sequence[str] | str) -> tuple[FormName, ...]:
    """Forms as a tuple, out of one or out of words with commas between.

    Raises SettingsError for one that is unknown.
    """
    words = forms.split(",") if isinstance(forms, str) else [w for form in forms for w in form.split(",")]
    words = [word.strip() for word in words if word.strip()]
    for word in words:
        if word not in FORM_NAMES:
            raise SettingsError(f"got forms {word!r}, expected {' or '.join(FORM_NAMES)}{nearest(word, FORM_NAMES)}")
    if not words:
        raise SettingsError(f"got no forms, expected some of {', '.join(FORM_NAMES)}")
    return tuple(form for form in FORM_NAMES if form in words)


KINDS = ("qk", "vo", "linear", "units", "tokens")


def check_tokens_of_parts(forms: Sequence[str] | str, only: Sequence[str]) -> None:
    """Raises SettingsError where parts of blocks are named and blocks shall run on fewer tokens, for all of a block
    does.
    """
    kinds = [word for word in only if word in KINDS]
    if "tokens" in check_forms(forms) and kinds:
        raise SettingsError(
            f"got only={', '.join(only)} and forms with tokens: on fewer tokens all parts of a block run; "
            "name blocks by path instead of kinds (only=blocks.3), or leave tokens out of forms"
        )


def check_tokens(forms: Sequence[str] | str, budget: str, rule: str, statistic: Any) -> None:
    """Raises SettingsError where tokens are asked for beside what they cannot be weighed with."""
    if "tokens" not in check_forms(forms):
        return
    if budget == "parameters":
        raise SettingsError(
            "got forms with tokens and a budget of parameters, of which tokens save none; say macs or latency"
        )
    if rule != "waterfill":
        raise SettingsError(
            f"got forms with tokens and ranks {rule!r}, expected 'waterfill', which weighs one with another"
        )
    name = statistic if isinstance(statistic, str) else getattr(statistic, "name", "weights")
    if name != "loss" and set(check_forms(forms)) != {"tokens"}:
        raise SettingsError(
            f"got forms with tokens and statistic {name!r}; only with 'loss' both lose in one unit, nats"
        )

"""What can shrink in a model: sites, what they cost, and the protocol by which a host library is spoken to."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import nn

from .anatomy import Attention as Attention
from .anatomy import Projection as Projection
from .anatomy import channels_last as channels_last
from .anatomy import dense_in as dense_in
from .anatomy import is_pointwise as is_pointwise
from .anatomy import layer_and_norm as layer_and_norm
from .anatomy import over_maps as over_maps
from .anatomy import part as part
from .errors import UnknownSite, UnsupportedSite, nearest


def block_of(path: str) -> str:
    """The block that a path belongs to: up to its last number, ``layers.0.blocks.1`` of ``layers.0.blocks.1.attn``."""
    match = re.match(r"(.*(?:^|\.)\d+)\.", path)
    return match.group(1) if match else path


def is_within(path: str, other: str) -> bool:
    """Whether a path is another or lies below it, as ``blocks.3.attn`` does below ``blocks.3``."""
    return path == other or path.startswith(f"{other}.")


Kind = Literal["qk", "vo", "linear", "units"]
KINDS: tuple[Kind, ...] = ("qk", "vo", "linear", "units")


@dataclass(frozen=True)
class Factored(ABC):
    """What a product or a linear layer costs at a rank; the common part of :class:`ProductSite` and
    :class:`LinearSite`.

    ``full_rank`` is the rank as it stands (a head's width; the smaller side of a linear layer). Costs are linear in the
    rank, so they are told per unit of rank. ``biases`` are those the site has as it stands, ``bias_per_rank`` those
    that every unit of rank brings along.
    """

    name: str
    kind: Kind
    path: str
    full_rank: int
    in_features: int
    out_features: int
    heads: int = 1
    biases: int = 0
    bias_per_rank: int = 0

    @property
    def full(self) -> int:
        """The rank as it stands."""
        return self.full_rank

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of one unit of rank in every head."""
        return self.heads * (self.in_features + self.out_features + self.bias_per_rank)

    @property
    def break_even(self) -> int:
        """The largest rank at which factors cost fewer parameters than the site as it stands."""
        return min(self.full_rank, max(0, (self.parameters() - self.parameters(0) - 1) // self.parameters_per_rank))

    @abstractmethod
    def parameters(self, rank: int | None = None) -> int:
        """Parameters at a rank, or as it stands (None). Biases that stay whatever the rank is count as well."""
        ...

    @abstractmethod
    def macs(self, rank: int | None, tokens: float, pairs: float) -> float:
        """Multiply-accumulates a picture: ``tokens`` rows flow through, ``pairs`` query–key pairs are compared per
        head.
        """
        ...


@dataclass(frozen=True)
class ProductSite(Factored):
    """The QK or the VO product of all heads of an attention layer, all at one rank."""

    attention: Attention = field(kw_only=True)

    @property
    def owner(self) -> str:
        """What is exchanged as one piece: the attention."""
        return self.path

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the layers whose weights the site holds."""
        a = self.attention
        return (a.q.path, a.k.path) if self.kind == "qk" else (a.v.path, a.out)

    def parameters(self, rank: int | None = None) -> int:
        if rank is None:
            return self.heads * self.full_rank * (self.in_features + self.out_features) + self.biases
        return rank * self.parameters_per_rank + (0 if self.kind == "qk" else self.out_features)

    def macs(self, rank: int | None, tokens: float, pairs: float) -> float:
        r = self.full_rank if rank is None else rank
        compared = self.full_rank if self.attention.mount == "padded" else r  # padded back to the host's width
        return self.heads * (r * tokens * (self.in_features + self.out_features) + compared * pairs)


@dataclass(frozen=True)
class LinearSite(Factored):
    """One linear layer; ``classifies`` marks one that gives a classifier's logits, ``over_maps`` a 1×1 convolution."""

    classifies: bool = field(default=False, kw_only=True)
    over_maps: bool = field(default=False, kw_only=True)

    @property
    def owner(self) -> str:
        return self.path

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.path,)

    def parameters(self, rank: int | None = None) -> int:
        if rank is None:
            return self.in_features * self.out_features + self.biases
        return rank * self.parameters_per_rank + self.out_features

    def macs(self, rank: int | None, tokens: float, pairs: float) -> float:
        if rank is None:
            return tokens * self.in_features * self.out_features
        return tokens * rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class HiddenSite:
    """The hidden units of a feed-forward: ``y = W₂ h + b₂`` with ``h = σ(W₁x + b₁)``, or ``σ(W₁x) ⊙ W₃x`` where it is
    gated.

    ``ups`` are the rows that make the units: one projection, or two for a gated one (which may lie in one packed
    layer). ``down`` is the path of the layer that reads them. ``path`` is the module that holds both. ``full`` is the
    number of units as they stand. ``between`` are paths of what acts on each unit alone (batch norms, convolutions with
    a group a channel), with ``taps`` weights of such convolutions a unit. ``biases`` are all biases of these layers,
    and all parameters of what is between; ``bias_per_unit`` those of one unit.
    """

    name: str
    path: str
    full: int
    in_features: int
    out_features: int
    ups: tuple[Projection, ...]
    down: str
    biases: int = 0
    bias_per_unit: int = 0
    between: tuple[str, ...] = ()
    taps: int = 0
    kind: Kind = "units"

    @property
    def owner(self) -> str:
        return self.name

    @property
    def full_rank(self) -> int:
        """The same as ``full``."""
        return self.full

    @property
    def modules(self) -> tuple[str, ...]:
        return (*dict.fromkeys(up.path for up in self.ups), *self.between, self.down)

    @property
    def parameters_per_unit(self) -> int:
        """Parameters of one unit: its rows in, its column out, its biases."""
        return len(self.ups) * self.in_features + self.out_features + self.bias_per_unit

    @property
    def break_even(self) -> int:
        """The largest number of units that costs fewer parameters than the feed-forward as it stands."""
        return min(self.full, max(0, (self.parameters() - self.parameters(0) - 1) // self.parameters_per_unit))

    def parameters(self, units: int | None = None) -> int:
        """Parameters with so many units, or as it stands (None).

        The bias of ``down`` stays; refitting may create it.
        """
        if units is None:
            return self.full * (len(self.ups) * self.in_features + self.out_features) + self.biases
        return units * self.parameters_per_unit + self.out_features

    def macs(self, units: int | None, tokens: float, pairs: float = 0.0) -> float:
        """Multiply-accumulates a picture through which ``tokens`` rows flow."""
        kept = self.full if units is None else units
        return tokens * kept * (len(self.ups) * self.in_features + self.out_features + self.taps)


@dataclass(frozen=True)
class TokenSite:
    """The tokens on which a block runs.

    ``path`` is the block's. ``full`` is the number of the grid's tokens, ``prefix`` that of the tokens beside them
    (class, registers, detection), of which ``suffix`` come last, ``channels`` the width of a token. ``grid`` are rows
    and columns, and ``patches`` the path of the convolution that cuts a picture into patches, where tokens lie in its
    order. ``stream`` is the name of the block's first argument, ``mask`` the one by which it takes an additive
    attention mask, ``norm`` its child that is given the tokens first.
    """

    name: str
    path: str
    full: int
    prefix: int
    channels: int
    grid: tuple[int, int] | None = None
    patches: str | None = None
    stream: str = "x"
    mask: str | None = None
    norm: str | None = None
    suffix: int = 0
    kind: Literal["tokens"] = "tokens"

    @property
    def front(self) -> int:
        """Tokens in front of the grid's."""
        return self.prefix - self.suffix

    @property
    def owner(self) -> str:
        return self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """No layer's weights are the site's."""
        return ()

    def share(self, keep: int) -> float:
        """Rows that flow through the block when ``keep`` tokens run, as a share of all with those beside the grid."""
        return (self.prefix + keep) / (self.prefix + self.full)

    def parameters(self, keep: int | None = None) -> int:
        return 0

    def macs(self, keep: int | None, tokens: float = 0.0, pairs: float = 0.0) -> float:
        """Tokens cost nothing themselves; what they save is saved at the block's other sites."""
        return 0.0


Site = ProductSite | LinearSite | HiddenSite
"""One thing with weights that can shrink."""

AnySite = Site | TokenSite
"""One thing that can shrink."""


@dataclass(frozen=True)
class Refusal:
    """Something that looks like a site but cannot shrink, and why; whether nothing inside it can either."""

    name: str
    reason: str
    closes: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """The sites of a model by name, in the order of the model's modules, and what was refused."""

    by_name: Mapping[str, Site]
    refused: tuple[Refusal, ...] = ()

    def __getitem__(self, name: str) -> Site:
        try:
            return self.by_name[name]
        except KeyError:
            for refusal in self.refused:
                if refusal.name == name:
                    raise UnsupportedSite(f"UnsupportedSite: {refusal}") from None
            raise UnknownSite(f"UnknownSite: {name!r}{nearest(name, self.by_name)}") from None

    def __iter__(self):
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def without(self, names: Collection[str]) -> Sites:
        """All sites but some."""
        return Sites({n: s for n, s in self.by_name.items() if n not in names}, self.refused)

    def only(self, *kinds: Kind | str) -> Sites:
        """The sites of some kinds (``"qk"``, ``"vo"``, ``"linear"``, ``"units"``) or path prefixes (``"blocks.3"``)."""
        chosen = {n: s for n, s in self.by_name.items() if s.kind in kinds or any(is_within(s.path, k) for k in kinds)}
        return Sites(chosen, self.refused)


Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What takes an attention's place: one whole module, or modules for its projections by path and the new width of a
    head.

    ``without_value_bias`` says that the value bias has been folded into the output's, so one that the host keeps apart
    must go.
    """

    whole: nn.Module | None = None
    parts: Mapping[str, nn.Module] | None = None
    width: int | None = None
    without_value_bias: bool = False


class Host(Protocol):
    """How one library's attention is read and exchanged.

    Hosts know nothing of low rank: they mount what they are given.
    """

    name: str

    def resembles(self, module: nn.Module) -> bool:
        """Whether a module has the parts of an attention of this host."""
        ...

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        """The anatomy of an attention module that resembles one, or why it is none."""
        ...

    def observe(self, module: nn.Module) -> Undo:
        """Make sure that the projections are called as modules, so that hooks see them, until undone."""
        ...

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        """Put a replacement where the attention stands; the returned function takes it back, bit for bit."""
        ...

"""What can shrink in a model: sites, what they cost, and the protocol by which a host library is spoken to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from .errors import UnknownSite, UnsupportedSite, nearest


def part(model: nn.Module, path: str) -> Any:
    """The module at a path. (Typed as Any: torch types every attribute of a module as ``Tensor | Module``.)"""
    return model.get_submodule(path)


def block_of(path: str) -> str:
    """The block that a path belongs to: up to its last number, ``layers.0.blocks.1`` of ``layers.0.blocks.1.attn``."""
    match = re.match(r"(.*(?:^|\.)\d+)\.", path)
    return match.group(1) if match else path


Kind = Literal["qk", "vo", "linear"]
Form = Literal["product", "matrix", "tucker", "tensor_train"]


@dataclass(frozen=True)
class Projection:
    """Rows of a linear layer in the host: where W_Q (or W_K, W_V) of all heads lives.

    ``path`` is the layer's path in the model, ``start:stop`` its rows (heads · width, head by head), and ``bias`` the path
    of a bias that the host keeps apart from the layer (BEiT's ``q_bias``), if it does.
    """

    path: str
    start: int
    stop: int
    bias: str | None = None

    def weight(self, model: nn.Module) -> Tensor:
        """The rows, (heads · width, in)."""
        return part(model, self.path).weight[self.start : self.stop]

    def bias_or_none(self, model: nn.Module) -> Tensor | None:
        """The bias of these rows, (heads · width,), or None."""
        if self.bias is not None:
            owner, _, name = self.bias.rpartition(".")
            return getattr(part(model, owner), name)
        bias = part(model, self.path).bias
        return None if bias is None else bias[self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """The anatomy of one attention module: where its projections are and what its products are worth.

    ``mount`` names how a replacement takes its place: ``"whole"`` (the module gives way to a low-rank attention behind the same
    signature), ``"parts"`` (the host's own forward stays and its projections are exchanged), or ``"values"`` (the same, for V and O
    alone, where no QK product exists).
    """

    path: str
    host: str
    mount: Literal["whole", "parts", "values"]
    signature: str
    heads: int
    width: int
    in_features: int
    out_features: int
    scale: float
    q: Projection
    k: Projection
    v: Projection
    out: str
    qk_reason: str | None = None
    vo_reason: str | None = None
    folds_value_bias: bool = True


@dataclass(frozen=True)
class Site:
    """One thing that can shrink: the QK or VO product of all heads of a layer, or one linear layer.

    ``full_rank`` is the rank of the product as it stands (a head's width; the smaller side of a linear layer). Costs are
    linear in the rank, so they are told per unit of rank: see :meth:`parameters` and :meth:`macs`.
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
    attention: Attention | None = None

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of one unit of rank in every head."""
        return self.heads * (self.in_features + self.out_features + self.bias_per_rank)

    def parameters(self, rank: int | None = None) -> int:
        """Parameters of the site at a rank, or as it stands. Biases that stay whatever the rank is count as well."""
        if rank is not None:
            kept = 0 if self.kind == "qk" else self.out_features
            return rank * self.parameters_per_rank + kept
        if self.kind == "linear":
            return self.in_features * self.out_features + self.biases
        return self.heads * self.full_rank * (self.in_features + self.out_features) + self.biases

    def macs(self, rank: int | None, tokens: float, pairs: float) -> float:
        """Multiply-accumulates a picture: ``tokens`` rows flow through, ``pairs`` query–key pairs are compared per head."""
        if self.kind == "linear":
            if rank is None:
                return tokens * self.in_features * self.out_features
            return tokens * rank * (self.in_features + self.out_features)
        r = self.full_rank if rank is None else rank
        compared = (
            self.full_rank if self.attention is not None and self.attention.mount == "values" else r
        )  # padded back to the host's width
        return self.heads * (r * tokens * (self.in_features + self.out_features) + compared * pairs)

    @property
    def break_even(self) -> int:
        """The largest rank at which factors cost fewer parameters than the site as it stands."""
        return min(self.full_rank, max(0, (self.parameters() - self.parameters(0) - 1) // self.parameters_per_rank))


@dataclass(frozen=True)
class Refusal:
    """Something that looks like a site but cannot shrink, and why."""

    name: str
    reason: str

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

    def only(self, *kinds: Kind | str) -> Sites:
        """The sites of some kinds (``"qk"``, ``"vo"``, ``"linear"``) or path prefixes (``"blocks.3"``)."""
        chosen = {
            n: s
            for n, s in self.by_name.items()
            if s.kind in kinds or any(s.path == k or s.path.startswith(f"{k}.") for k in kinds)
        }
        return Sites(chosen, self.refused)


Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What takes an attention's place: one whole module, or modules for its projections by path and the new width of a head.

    ``without_value_bias`` says that the value bias has been folded into the output's, so one that the host keeps apart must go.
    """

    whole: nn.Module | None = None
    parts: Mapping[str, nn.Module] | None = None
    width: int | None = None
    without_value_bias: bool = False


class Host(Protocol):
    """How one library's attention is read and exchanged. Hosts know nothing of low rank: they mount what they are given."""

    name: str

    def resembles(self, module: nn.Module) -> bool:
        """Whether a module has the parts of an attention of this host."""
        ...

    def recognise(self, model: nn.Module, path: str, module: nn.Module) -> Attention | Refusal:
        """The anatomy of an attention module that resembles one, or why it is none."""
        ...

    def probe(self, module: nn.Module, attention: Attention, x: Tensor, *, grid: bool = True) -> Tensor:
        """Call an attention module on tokens (batch, tokens, in_features) alone and return its output tensor.

        With ``grid``, a module that wants (batch, height, width, in_features) gets that.
        """
        ...

    def observe(self, module: nn.Module) -> Undo:
        """Make sure that the projections are called as modules, so that hooks see them, until undone."""
        ...

    def mount(self, model: nn.Module, attention: Attention, replacement: Replacement) -> Undo:
        """Put a replacement where the attention stands; the returned function takes it back, bit for bit."""
        ...

"""What adapters ask of a host: whoever knows how one library writes attention in the models of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn

from ....sites import Refusal

Where = Literal["cross", "self", "joint", "text"]

CHANNELS = "comcat_channels"
"""The child of an attention that holds its extra channels while they are mounted, so that they move and train with the
model.
"""


@dataclass(frozen=True)
class AdaptableAttention:
    """An attention that can carry low-rank terms.

    Attributes:
        path: of the module in its model. where: what attends to what.
        widths: the factors that it can carry by name (see :mod:`comcat.modules.adapters`), with the width each reads
            or writes.
        heads, head_dim: number and width of the frozen heads.
        missing: why one of the products cannot be had here, by product.
        unread: factors that could change nothing, since no later block reads what they write, with their widths.
            Adapters have none of them; files of earlier versions hold some.
    """

    path: str
    where: Where
    widths: dict[str, int]
    heads: int
    head_dim: int
    missing: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def products(self) -> tuple[str, ...]:
        """``("qk", "vo")``, or the one that can be had."""
        return tuple(p for p, side in (("qk", "q_up"), ("vo", "out_up")) if side in self.widths)

    def parameters(self, rank: int) -> int:
        """How many parameters the terms of a rank have."""
        return self.heads * rank * sum(self.widths.values())


@dataclass(frozen=True)
class RefusedAttention(Refusal):
    """An attention that cannot carry terms, and what attends to what in it."""

    where: Where = "cross"


class Found(NamedTuple):
    """The attention of one model: what can carry terms, and what cannot and why. Paths are the model's own."""

    adaptable: list[AdaptableAttention]
    refused: list[RefusedAttention]


class Widened(NamedTuple):
    """What heads of another width take: what W_Q is multiplied by, and the attributes that the attention then has."""

    fold: float
    attributes: Mapping[str, Any]


class AdapterHost(Protocol):
    """How the attention of one library is found, and how it comes to compute with extra channels.

    Attaching, loading, fusing and merging know nothing else of a library. A host has no state of its own: all there is
    to remember stands in the attention, so that models survive ``deepcopy`` and ``pickle`` with their adapters.

    An attention is a module that :meth:`find` has named. It is typed as ``Any``, since torch types every attribute of a
    module as ``Tensor | Module``. Its extra channels are its child ``CHANNELS``
    (:class:`comcat.modules.adapters.ExtraChannels`), from before :meth:`mount` until after :meth:`unmount`.
    """

    name: str
    """Of the library or of the kind of model."""

    def resembles(self, model: nn.Module) -> bool:
        """Whether a model has attention of this kind, by its structure."""
        ...

    def find(self, model: nn.Module) -> Found:
        """All attention of this kind in the order of the model's modules. Nothing is changed, and no weight is read.

        What carries an adapter already is told as it would be without.
        """
        ...

    def projections(self, attention: Any) -> dict[str, str]:
        """Paths, below the attention, of the frozen linear layers by the factor that stands beside each.

        ``{"q_up": "to_q", "k_down": "to_k", "v_down": "to_v", "out_up": "to_out.0"}``; a second stream's have the
        prefix ``add_``. They are the same whether or not something is mounted.
        """
        ...

    def frozen(self, attention: Any, path: str) -> Any:
        """The frozen linear layer at one of these paths, also while something of ours stands around it."""
        ...

    def mount(self, attention: Any) -> None:
        """Let the attention compute with its extra channels; its own projections are called as before."""
        ...

    def refresh(self, attention: Any) -> None:
        """Take note that the number of extra channels has changed."""
        ...

    def unmount(self, attention: Any) -> None:
        """Give back what :meth:`mount` has exchanged: the very objects, so that outputs are bit for bit as before."""
        ...

    def why_not(self, attention: Any) -> str | None:
        """Why an attention cannot carry terms as it stands, or None if it can. Other libraries may change it."""
        ...

    def reclaim(self, attention: Any) -> str | None:
        """Mount again where something has displaced what :meth:`mount` put there and computes the same; it then counts
        as what stood before. Where it computes something else, the reason why that is in the way.

        This is asked before every call of a model, so it must cost next to nothing where all is well.
        """
        ...

    def copied(self, attention: Any) -> str | None:
        """What computes with copies of the projections, so that writing to these would change nothing; None if nothing
        does.
        """
        ...

    def shared(self, attention: Any) -> str | None:
        """What else reads or writes by the projections, so that writing to these would change it as well; None if
        nothing does.
        """
        ...

    def sweep(self, model: nn.Module) -> None:
        """Drop what a model has set aside of attention from which everything has been unmounted."""
        ...

    def between(self, attention: Any) -> str | None:
        """What acts on queries and keys between W_Q and W_K, so that these have no product; None if nothing does."""
        ...

    def widened(self, attention: Any, width: int) -> Widened:
        """What it takes for the attention's own code to compute with heads of another width, logits as they were."""
        ...

"""What a pipeline can carry, before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..pipeline.components import components_of
from .hosts import AdaptableAttention, RefusedAttention
from .places import find_places


@dataclass(frozen=True)
class Adaptable:
    """The attention of a pipeline: what each can carry, and what cannot carry anything and why.

    Attributes:
        attention: by path, with the component's name in front. Each says which products it carries (``products``)
            and why one is ``missing``.
        refused: what carries nothing; ``name`` is its path.
    """

    attention: Mapping[str, AdaptableAttention]
    refused: tuple[RefusedAttention, ...]

    def only(self, where: str) -> dict[str, AdaptableAttention]:
        """The attention of one kind: ``cross``, ``self``, ``joint``, ``text``, or ``all`` of the denoiser's."""
        return {p: a for p, a in self.attention.items() if a.where == where or (where == "all" and a.where != "text")}

    def parameters(self, rank: int = 2, where: str = "cross") -> int:
        """How many parameters an adapter of a rank would have there."""
        return sum(a.parameters(rank) for a in self.only(where).values())


def find_adaptable(target: Any) -> Adaptable:
    """Where a pipeline (or its unet or transformer alone) can carry low-rank terms. Nothing is changed, and weights are
    not read.

    Raises:
        ModelError: if it is neither.
    """
    attention: dict[str, AdaptableAttention] = {}
    refused: list[RefusedAttention] = []
    for component in components_of(target).values():
        found, not_found = find_places(component)
        attention |= {a.path: a for a in found}
        refused += not_found
    return Adaptable(attention, tuple(refused))

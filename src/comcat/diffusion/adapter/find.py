"""What a pipeline can carry, before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import SettingsError, nearest
from ...modules.adapters import PRODUCTS, SIDES, Product
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

    def parameters(self, rank: int = 2, where: str = "cross", only: str | Sequence[str] = ()) -> int:
        """How many parameters an adapter of a rank would have there, ``only`` as in :func:`attach`."""
        return sum(a.parameters(rank) for a in narrowed([*self.only(where).values()], only))


def narrowed(found: Sequence[AdaptableAttention], only: str | Sequence[str]) -> list[AdaptableAttention]:
    """What is chosen of some attention: products (``"qk"``, ``"vo"``), path prefixes (``"transformer_blocks.3"``, with
    the component's name in front or without), or both (``"transformer_blocks:vo"``). All of it where ``only`` is empty.

    Raises:
        SettingsError: if one of them chooses nothing.
    """
    only = [only] if isinstance(only, str) else only
    if "" in (text.strip() for text in only):
        raise SettingsError("only: got an empty text, expected qk, vo, a path, or nothing for all attention")
    wanted = [_split(text) for text in only]
    chosen: list[AdaptableAttention] = []
    met: set[int] = set()
    for one in found:
        kept = set()
        for number, (prefix, products) in enumerate(wanted):
            if _below(one.path, prefix) and (own := products & {*one.products}):
                kept |= own
                met.add(number)
        if kept or not only:
            widths = {name: width for name, width in one.widths.items() if not only or product_of(name) in kept}
            chosen.append(replace(one, widths=widths))
    for number, text in enumerate(only):
        if number not in met:
            known = {"qk", "vo", *(prefix for one in found for prefix in _prefixes(one.path))}
            raise SettingsError(
                f"only={text!r} chooses no attention; expected qk, vo, a path such as {found[0].path}, or a path and a "
                f"product, {found[0].path}:vo{nearest(text, known)}"
            )
    return chosen


def product_of(factor: str) -> Product:
    """The product that a factor has a part in."""
    return "qk" if factor.endswith((SIDES["q"], SIDES["k"])) else "vo"


def _split(text: str) -> tuple[str, set[Product]]:
    prefix, _, product = text.rpartition(":")
    if product in PRODUCTS:
        return prefix, {product}  # type: ignore[arg-type]
    return text, {*PRODUCTS}


def _below(path: str, prefix: str) -> bool:
    inner = path.partition(".")[2]
    return not prefix or any(p == prefix or p.startswith(f"{prefix}.") for p in (path, inner))


def _prefixes(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[1:end]) for end in range(2, len(names) + 1)]


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

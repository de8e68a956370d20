"""Ranks found by search (COMCAT, Xiao et al. 2023, §3.2, Eq. 5–6, Figure 4).

Rounds alternate between the probabilities of candidate ranks (weights frozen) and the weights (ranks frozen at the
likeliest candidates). The probabilities minimise

    L = L_CE(Ȳ, Y) · (Σ_sites Σ_a p_a C(r_a) / ε)^β,    p = GumbelSoftmax(α),

on training pictures that the weights are never updated on. One forward stands for all candidates
(:mod:`comcat.modules.relaxed`), and the full factors stay as master weights: after each round they are put in order
anew, so a rank chosen low can grow back.
"""

from typing import TYPE_CHECKING

from ...lazy import attributes_of

if TYPE_CHECKING:
    from .run import search as search
    from .run import search_ as search_
    from .settings import SearchOptions as SearchOptions
    from .settings import SearchSettings as SearchSettings

_WHERE = {
    "SearchOptions": "settings", "SearchSettings": "settings", "search": "run", "search_": "run",
}  # fmt: skip

__all__ = sorted(_WHERE)

__getattr__ = attributes_of(__name__, _WHERE)


def __dir__() -> list[str]:
    return __all__

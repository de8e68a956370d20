"""Which tokens are run as one, or not at all, and how the others learn of it: tensors in, tensors out.

A block that runs on fewer tokens updates a stream of all of them: with tokens ``x`` (batch, tokens, channels) and a
reduction ``P``, the block sees ``m = P x`` and the stream becomes ``x + Pᵀ(block(m) − m)``, where ``Pᵀ`` hands each
token the update of the one that it was run in. So the grid never goes away, and whatever merging lost is still there.
"""

from .choice import Chosen, highest
from .exporting import exporting
from .grid import Windows
from .similar import Groups, bipartite, look_alikes

__all__ = ["Chosen", "Groups", "Windows", "bipartite", "exporting", "highest", "look_alikes"]

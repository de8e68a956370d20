"""Channels pruned while a model is trained: consistent dynamic channel pruning (CDCP), reconstructed.

CAIT (Wang et al. 2023) is public as an abstract alone, so this is our reconstruction of its channel pruning, and no
copy of it. Every hidden unit and every channel of a head has a gate that is open at the start. *Consistent*: a channel
of Q goes with that of K, a channel of V with what the output projection reads, and all heads of a layer keep equally
many. *Dynamic*: now and then channels are marked anew, those of least predicted loss for what they cost, until the
budget is met. Marked gates are no longer moved by the task (their gradient is reset) but pulled shut, all heads
together (the proximal step of a group lasso, as ResRep of Ding et al. 2021 does it with a penalty); a channel that is
no longer marked comes back. At the end gates are folded into the weights and the marked channels are cut.
"""

from typing import TYPE_CHECKING

from ...lazy import attributes_of

if TYPE_CHECKING:
    from .run import prune as prune
    from .run import prune_ as prune_
    from .settings import PruneSettings as PruneSettings

_WHERE = {"PruneSettings": "settings", "prune": "run", "prune_": "run"}

__all__ = sorted(_WHERE)

__getattr__ = attributes_of(__name__, _WHERE)


def __dir__() -> list[str]:
    return __all__

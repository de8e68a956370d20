"""Where attention can carry adapters in other people's models. One file a library; each recognises it by its
structure.
"""

from __future__ import annotations

from torch import nn

from .clip import ClipHost
from .diffusers import DiffusersHost
from .protocol import CHANNELS, AdaptableAttention, AdapterHost, Found, RefusedAttention, Where, Widened

__all__ = [
    "CHANNELS",
    "HOSTS",
    "AdaptableAttention",
    "AdapterHost",
    "Found",
    "RefusedAttention",
    "Where",
    "Widened",
    "find_in",
    "host_of",
]

HOSTS: tuple[AdapterHost, ...] = (DiffusersHost(), ClipHost())


def host_of(model: nn.Module) -> AdapterHost | None:
    """The host that knows the attention of a model, or None."""
    return next((host for host in HOSTS if host.resembles(model)), None)


def find_in(model: nn.Module) -> Found:
    """All attention of a model that some host knows. Where none knows it, the model is refused as a whole."""
    host = host_of(model)
    if host is not None:
        return host.find(model)
    known = " or ".join(host.name for host in HOSTS)
    reason = f"{type(model).__name__} is no {known}, whose attention alone is known"
    return Found([], [RefusedAttention("", reason, where="text")])

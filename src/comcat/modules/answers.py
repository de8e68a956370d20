"""What a host may ask of a linear layer, answered by what stands where the layer stood."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(d))
"""Devices with autocast; asked for here, since torch 2.11 cannot compile the question."""


class StandsForLinear(nn.Module):
    """Answers ``weight``, ``bias``, ``in_features`` and ``out_features`` as the dense layer would.

    ``weight`` is computed from what is stored whenever it is read, in the stored dtype, and gradients flow through it.
    It is no parameter and is not in the state dict. Writing into it changes nothing. Assigning to it is an error.
    """

    comcat_module = True

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer multiplies by, (out, in)."""
        if torch.jit.is_scripting():  # the branch that is not taken is not compiled
            return self.product()
        else:
            with _without_autocast(self):
                return self.product()

    def product(self) -> Tensor:
        """``weight``, computed in the dtype that autocast says."""
        raise NotImplementedError


def _without_autocast(module: nn.Module) -> AbstractContextManager:
    """Who reads a weight reads its dtype too, and autocast changes that of no weight."""
    device = next((p.device.type for p in module.parameters()), "meta")
    return torch.autocast(device, enabled=False) if device in _AUTOCAST else nullcontext()

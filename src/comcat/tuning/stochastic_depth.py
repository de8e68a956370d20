"""Stochastic depth (Huang et al. 2016).

In training, a residual branch is skipped for some pictures, the deeper its block the more often.
"""

from __future__ import annotations

from torch import nn

from ..errors import SettingsError
from ..models.failures import required

_NAMES = ("drop_path", "drop_path1", "drop_path2")  # what timm and transformers call the places for it


def set_stochastic_depth(model: nn.Module, rate: float) -> None:
    """Give residual branches rates that rise from 0 in a model's first block to ``rate`` in the last, as DeiT does.

    Raises SettingsError where a model has no place for it.
    """
    required("timm")
    from timm.layers import DropPath

    places = [
        (block, names)
        for block in model.modules()
        if (names := [name for name, child in block.named_children() if name in _NAMES and _is_place(child)])
    ]
    if not places:
        raise SettingsError(
            f"drop_path={rate:g}: {type(model).__name__} has no place for stochastic depth "
            f"(modules called {', '.join(_NAMES)})"
        )
    for number, (block, names) in enumerate(places):
        for name in names:
            setattr(block, name, DropPath(rate * number / max(len(places) - 1, 1)))


def _is_place(child: nn.Module) -> bool:
    return isinstance(child, nn.Identity) or hasattr(child, "drop_prob")

"""How strongly each adapter acts."""

from __future__ import annotations

import math
from typing import Any

from ...errors import SettingsError
from .attach import unknown
from .records import adapters, check_unfused


def set_scale(target: Any, /, **scales: float) -> None:
    """Set how strongly adapters act, by name: ``set_scale(pipe, dog=0.5, teddy=1.0)``. Both products are multiplied by
    it; 0 is as if it were not there.

    Raises:
        SettingsError: if there is no adapter of a name, or a scale is no finite number, or adapters are fused into the
            weights. Then none has changed.
    """
    held = adapters(target)
    check_unfused(target)
    for name, scale in scales.items():
        if name not in held:
            raise SettingsError(unknown(name, held))
        check_scale(scale)
    for name, scale in scales.items():
        for terms in held[name].terms.values():
            terms.scale = float(scale)


def check_scale(scale: object) -> None:
    """Raise SettingsError unless this is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise SettingsError(f"got {scale!r} as an adapter's scale, expected a finite number, as 0.8")

"""A transformers image processor that prepares pictures as a Preprocess does."""

from __future__ import annotations

import math
from typing import Any

from ..data import Preprocess


def processor_config(preprocess: Preprocess) -> dict[str, Any] | None:
    """What ``preprocessor_config.json`` says, or None if no stock image processor does what ``preprocess`` does.

    The class is CLIP's: of all, it resizes by the shorter side or to both sides, and then cuts out the middle.
    """
    from PIL.Image import Resampling

    height, width = preprocess.size
    whole = [math.floor(side / preprocess.crop_pct) for side in preprocess.size]
    if preprocess.channels != 3 or preprocess.crop_mode == "border":
        return None
    if preprocess.crop_mode == "center":
        if height != width:
            return None
        size = {"shortest_edge": whole[0]}
    else:
        size = {"height": whole[0], "width": whole[1]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": int(Resampling[preprocess.interpolation.upper()]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }

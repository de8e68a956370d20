"""Time and memory of an adapter's training step on a card: what ``benchmarks/adapter_cost.py`` measures, few rounds."""

from __future__ import annotations

from typing import Any

import adapter_cost

SDXL_ONLY = ("comcat", "LoRA", "Custom")
"""DreamBooth would train all of SDXL's 2.6 billion weights."""


def klein(side: int, device: str, *, tiny: bool) -> dict[str, Any]:
    """The result of FLUX.2 [klein]'s transformer, on pictures of a side in pixels; in bfloat16."""
    words = ["--model", "flux2-klein", "--device", device, "--no-write"]
    if tiny:
        return adapter_cost.main([*words, "--smoke", "--side", "64", "--rounds", "1", "--repeats", "1"])
    rounds = ["--rounds", "5", "--repeats", "2"]
    return adapter_cost.main([*words, "--side", str(side), "--dtype", "bfloat16", *rounds])


def cost(model: str, device: str, *, tiny: bool) -> dict[str, Any]:
    """The result of one pipeline at its own size: 512 pixels for SD 1.4, 1024 for SDXL; in bfloat16."""
    words = ["--model", model, "--device", device, "--no-write"]
    if tiny:
        return adapter_cost.main([*words, "--smoke", "--rounds", "1", "--repeats", "1", "--only", "comcat"])
    words += ["--side", "512" if model == "sd14" else "1024", "--dtype", "bfloat16", "--rounds", "5", "--repeats", "2"]
    return adapter_cost.main([*words, "--only", *SDXL_ONLY] if model == "sdxl" else words)

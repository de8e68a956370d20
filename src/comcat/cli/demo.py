"""``comcat demo``: one function a demonstration, none of which needs a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .common import Common, Positional, pick_device
from .compress import Compress, compress_model


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """See it work without any download: train a small ViT on the built-in digits, compress it, report."""

    what: Positional[Literal["compress"]] = "compress"
    """Which demo."""
    out: Path | None = None
    """Folder to save to, by default runs/demo- and the demo's name."""
    reduce: float = 0.8
    """Share of the parameters to save (compress)."""


def run(command: Demo) -> int:
    out = Path(f"runs/demo-{command.what}") if command.out is None else command.out
    return DEMOS[command.what](command, out)


def _compress(command: Demo, out: Path) -> int:
    from ..demo import digits_model
    from ..store import save  # noqa: F401  (fails early where an extra is missing)

    cache = out.parent / "cache" / f"digits-vit-{command.seed}.safetensors"
    model = digits_model(cache, seed=command.seed).to(pick_device(command.device))
    settings = Compress(
        model="a small ViT trained on digits", data="digits:train", eval="digits:test", out=out, reduce=command.reduce, seed=command.seed, device=command.device, overwrite=True,
    )  # fmt: skip
    return compress_model(
        settings, model, shown=f"comcat demo compress --reduce {command.reduce:g} --seed {command.seed}"
    )


DEMOS: dict[str, Callable[[Demo, Path], int]] = {"compress": _compress}

"""``comcat demo``: one function a demonstration, none of which needs a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .common import Common, Positional, pick_device
from .shrink.compress import Compress, compress_model
from .terminal import table


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """See it work without any download, on the built-in digits: compress a small ViT, or teach a small text-to-image
    pipeline a digit.
    """

    what: Positional[Literal["compress", "customize"]] = "compress"
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
        model="a small ViT trained on digits", data="digits:train", eval="digits:test", out=out, reduce=command.reduce,
        seed=command.seed, device=command.device, overwrite=True,
    )  # fmt: skip
    return compress_model(
        settings, model, shown=f"comcat demo compress --reduce {command.reduce:g} --seed {command.seed}"
    )


def _customize(command: Demo, out: Path) -> int:
    from ..diffusion.digits import demo
    from ..diffusion.digits.scans import IDENTIFIER, WORDS

    shown = demo.run(out, seed=command.seed, device=pick_device(command.device))
    print(f"\n{IDENTIFIER} is a {WORDS[demo.LEFT_OUT]}. Pictures that show what was asked for, in its ink:\n")
    table(["", "before", "after"], [[n, *(f"{100 * v:.1f} %" for v in values)] for n, *values in shown.rows()])
    print(f"\nTook {shown.seconds:.0f} s. The adapter: {shown.adapter} ({shown.adapter.stat().st_size / 1e3:.0f} kB).")
    print(f"Before and after, side by side: {shown.report.resolve()}")
    return 0


DEMOS: dict[str, Callable[[Demo, Path], int]] = {"compress": _compress, "customize": _customize}

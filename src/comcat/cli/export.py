"""``comcat export``: a model as a file that another runtime loads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from ..deployment.settings import OPSETS, FormatName, Target
from ..errors import ExportError, SettingsError
from ..settings import LARGEST_SEED
from .common import Positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a file that a runtime loads, load it again and compare it with the model."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    out: Path
    """What to write: FILE.onnx, FILE.pt2 or, for openvino, a folder. The preprocessing is written beside it."""
    to: FormatName = "onnx"
    """onnx, torch (torch.export) or openvino."""
    data: str | None = None
    """Pictures to compare with the model on, and to calibrate int8; without them pictures are generated."""
    count: int = 32
    """How many pictures to compare on, at most."""
    int8: bool = False
    """Matrix products in int8, per channel, the rest in float."""
    static: bool = False
    """Of int8: measure what flows in beforehand, on pictures, and not at run time."""
    fp16: bool = False
    """Weights and arithmetic in float16."""
    lose_at_most: float = 0.1
    """Of int8 and fp16: the largest share of agreement that may be lost."""
    target: Annotated[Target, tyro.conf.arg(name="for")] = "any"
    """tensorrt: heads of one width, a multiple of 8."""
    opset: int = OPSETS[1]
    """Version of ONNX's operators."""
    batch: int | Literal["dynamic"] = "dynamic"
    """Pictures a call, or dynamic: any number."""
    any_size: bool = False
    """Let the size of the pictures vary."""
    pixels: bool = False
    """The file takes pixels, uint8 (batch, height, width, channels), and normalises them itself."""
    overwrite: bool = False
    """Replace what is at --out."""
    pretrained: bool = True
    """Load the model's published weights (--no-pretrained: random ones, to look at structure and speed)."""
    seed: int = 0
    """Which pictures; random weights."""
    json: bool = False
    """Print JSON instead of words."""


def run(command: Export) -> int:
    _check_source(command.model)
    return _export_model(command)


def _check_source(model: str) -> None:
    """Raise ExportError for what is no model of pictures."""
    path = Path(model).expanduser()
    if path.suffix == ".safetensors" or model.startswith("diffusers:") or (path / "model_index.json").is_file():
        raise ExportError(
            f"{model} is of a text-to-image pipeline, whose denoiser takes a time and a prompt beside the picture; "
            "only models of pictures alone are exported. Fuse adapters and save the pipeline with diffusers instead"
        )


def _export_model(command: Export) -> int:
    import torch

    from ..deployment.export import check_place, export_
    from ..store import load_model

    settings = _settings(command)
    if command.count < 1:
        raise SettingsError(f"got --count {command.count}, expected at least 1")
    if not 0 <= command.seed <= LARGEST_SEED:
        raise SettingsError(f"got --seed {command.seed}, expected 0 to {LARGEST_SEED}")
    check_place(command.out, settings)  # before the model is loaded
    torch.manual_seed(command.seed)
    model = load_model(command.model, pretrained=command.pretrained)
    done = export_(model, settings, out=command.out, data=command.data, pictures=command.count, seed=command.seed)
    if command.json:
        print(json.dumps(_as_data(done), indent=1))
        return 0
    print(f"Wrote {done.path} ({done.size_bytes / 2**20:.1f} MiB) and {done.description}.")
    print(f"Loaded again and compared with the model: {done.comparison}.")
    for note in done.notes:
        print(note)
    return 0


def _settings(command: Export) -> Any:
    from ..deployment.settings import ExportSettings

    if command.int8 and command.fp16:
        raise SettingsError("got --int8 and --fp16, expected one of them")
    if command.static and not command.int8:
        raise SettingsError("got --static without --int8, which it is a kind of")
    precision = "int8" if command.int8 else "float16" if command.fp16 else "float32"
    return ExportSettings(
        to=command.to,
        precision="int8-static" if command.static else precision,
        target=command.target,
        opset=command.opset,
        batch=command.batch,
        any_size=command.any_size,
        pixels=command.pixels,
        lose_at_most=command.lose_at_most,
        overwrite=command.overwrite,
    )


def _as_data(done: Any) -> dict[str, Any]:
    return {
        "path": str(done.path),
        "description": str(done.description),
        "size_bytes": done.size_bytes,
        "comparison": done.comparison.to_dict(),
        "speed_against_float32": {count: asdict(speed) for count, speed in done.speed.items()},
        "notes": list(done.notes),
    }

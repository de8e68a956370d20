"""``comcat export``: a model as a file that another runtime loads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from ..deployment.settings import OPSETS, FormatName, Target
from ..errors import ExportError, SettingsError
from ..files import home_path
from ..settings import LARGEST_SEED
from .common import Positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a file that a runtime loads, load it again and compare it with the model; or an adapter of a
    text-to-image pipeline as a LoRA.
    """

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder; or an adapter, dog.safetensors."""
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
    kind: Annotated[Literal["model", "lora"], tyro.conf.arg(name="as")] = "model"
    """lora: an adapter as plain LoRA keys, which diffusers, ComfyUI and Forge load."""
    rank: int = 16
    """Of a LoRA."""
    base: str | None = None
    """Of a LoRA: the pipeline that the adapter is for; left out, the one that it was trained on."""
    prompts: tuple[str, ...] = ()
    """Of a LoRA: what it shall be near the adapter on, beside the adapter's own prompt."""
    keys: Literal["diffusers", "kohya"] = "diffusers"
    """Of a LoRA: whose names; kohya's are for UNets."""
    force: bool = False
    """Write a LoRA however far from the adapter it is."""


def run(command: Export) -> int:
    if command.kind == "lora":
        return _export_lora(command)
    _check_source(command.model)
    return _export_model(command)


def _check_source(model: str) -> None:
    """Raise ExportError for what is no model of pictures."""
    path = home_path(model)
    if path.suffix == ".safetensors" or model.startswith("diffusers:") or (path / "model_index.json").is_file():
        raise ExportError(
            f"{model} is of a text-to-image pipeline, whose denoiser takes a time and a prompt beside the picture; "
            "only models of pictures alone are exported. An adapter's file becomes a LoRA with --as lora"
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


def _export_lora(command: Export) -> int:
    from ..diffusion import export_lora, load, load_pipeline, read

    file = read(command.model)
    if command.out.exists() and not command.overwrite:
        raise ExportError(f"{command.out} is there already; name another file, or --overwrite")
    base = command.base or file.base
    if base is None:
        raise SettingsError(f"{command.model} does not say which pipeline it was trained on; name it with --base")
    pipe = load_pipeline(base)
    load(pipe, command.model, name="adapter")
    report = export_lora(
        pipe, command.out, name="adapter", rank=command.rank, prompts=command.prompts, keys=command.keys,
        force=command.force, seed=command.seed,
    )  # fmt: skip
    if command.json:
        print(json.dumps(asdict(report) | {"path": str(report.path)}, indent=1))
        return 0
    print(f"Wrote {report.path}: {report}.")
    for site, reason in report.left_out.items():
        print(f"Left out: {site} ({reason})")
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

"""Exported files against their models: parity on real pictures, speed-up inside runtimes, and what int8 costs.

``parity``: architectures with random weights, and the saliency and nuclei models with real ones, dense and compressed
with ranks, units, tokens and all of them; goal: an error of at most 1e-4 of the largest output, in fp32 on 256 real
pictures. ``speed``: the speed-up of the compressed model inside ONNX Runtime and OpenVINO beside that in PyTorch, all
in one interleaved run on the same threads; goal: at least 0.95 of it. ``int8``: the compressed saliency model in ONNX
Runtime; goal: IoU at least 0.92 against its own fp32, and a file of at most 0.27 of its size. ``--tiny`` runs all of it
in a minute, to try the script. Finished rows of ``parity`` are kept in ``--work``, so that it can be stopped and goes
on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import SHARED, kept_result, parser, vit, write
from torch import Tensor, nn

import comcat
from comcat.measure import benchmark, count_macs, ratio
from comcat.models import preprocess_of

TIMM = (
    "vit_tiny_patch16_224 deit_tiny_patch16_224 vit_small_patch14_dinov2 vit_base_patch32_clip_224 "
    "beit_base_patch16_224 swin_tiny_patch4_window7_224"
).split()
TRANSFORMERS = {
    "ViT": ("ViTForImageClassification", "ViTConfig"),
    "DINOv2": ("Dinov2Model", "Dinov2Config"),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig"),
}
FORMS = {"dense": None, "ranks": "ranks", "units": "units", "tokens": "tokens", "all": "ranks,units,tokens"}
SUFFIX = {"onnx": "m.onnx", "openvino": "m", "torch": "m.pt2"}
MOST_NUCLEI = 32
"""Pictures of nuclei at most: each has 784 tokens."""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def timm_model(name: str, tiny: bool) -> nn.Module:
    if name.startswith("swin"):
        sizes = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
        return vit(name, num_classes=10, **(sizes if tiny else {}))
    size = {"img_size": 224, "patch_size": 14} if "dinov2" in name else {}
    return vit(name, num_classes=10, **(TINY if tiny else {"depth": 4, **size}))


def transformers_model(name: str, tiny: bool) -> nn.Module:
    import transformers

    width, depth, heads = (48, 2, 3) if tiny else (384, 4, 6)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    picture = {"image_size": 32, "patch_size": 8} if tiny else {"image_size": 224, "patch_size": 16}
    kind, config = (getattr(transformers, word) for word in TRANSFORMERS[name])
    torch.manual_seed(0)
    return kind(config(**sizes, **picture, intermediate_size=4 * sizes["hidden_size"])).eval()


def real_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Iterator[Any]]]]:
    """The dense models with real weights, and batches of their pictures."""
    from real import data, models, photographs

    return {
        "saliency": (models.saliency, lambda count: photographs.photographs("judged").first(count).batches(8)),
        "nuclei": (models.nuclei, lambda count: data.nuclei("judged", min(count, MOST_NUCLEI)).batches(8)),
    }


def pictures_of(model: nn.Module, source: str, count: int) -> list[Tensor]:
    opened = comcat.open_pictures(source)
    drawn = opened.take(min(count, opened.count or count), 0)
    return [images for images, _ in comcat.batches(drawn, preprocess_of(model), batch_size=16)]


def compressed(model: nn.Module, pictures: list[Tensor], forms: str) -> nn.Module:
    budget = "macs" if "tokens" in forms else "parameters"
    reduce = 0.1 if forms == "tokens" else 0.3
    return comcat.compress(model, calibration=pictures[:2], forms=forms, reduce=reduce, budget=budget)


def parity_of(label: str, dense: nn.Module, pictures: list[Tensor], a: Any) -> list[dict[str, Any]]:
    """Every form of one model, in every format; the rows of a form are kept together."""
    rows = []
    for kind in a.forms:
        asked = {"formats": a.formats, "count": a.count, "data": a.data, "tiny": a.tiny}
        make = partial(parity_of_form, label, dense, pictures, kind, a)
        rows += kept_result(a.work / f"{label}-{kind}.json", asked, make)["rows"]
    return rows


def parity_of_form(label: str, dense: nn.Module, pictures: list[Tensor], kind: str, a: Any) -> dict[str, Any]:
    """One form of one model, in every format: the errors, or why it was refused."""
    row: dict[str, Any] = {"model": label, "compressed": kind}
    try:
        forms = FORMS[kind]
        model = dense if forms is None else compressed(dense, pictures, forms)
        rows = [row | {"to": to, **exported(model, to, pictures, a.count)} for to in a.formats]
    except comcat.ComcatError as error:
        rows = [row | {"refused": str(error)}]
    for row in rows:
        print(row, flush=True)
    return {"rows": rows}


def exported(model: nn.Module, to: Any, pictures: list[Tensor], count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = comcat.export(model, to=to, out=Path(folder) / SUFFIX[to], data=pictures, pictures=count)
        except comcat.ComcatError as error:
            return {"refused": str(error)}
    return {**done.comparison.to_dict(), "reached": done.comparison.relative_error <= 1e-4}


def parity(a: Any) -> list[dict[str, Any]]:
    rows = []
    makers: dict[str, Callable[[str, bool], nn.Module]] = {
        **dict.fromkeys(TIMM, timm_model),
        **dict.fromkeys(TRANSFORMERS, transformers_model),
    }
    for name, make in makers.items():
        if not a.models or name in a.models:
            model = make(name, a.tiny)
            rows += parity_of(name, model, pictures_of(model, a.data, a.count), a)
    for name, (load, batches) in ({} if a.tiny else real_models()).items():
        if not a.models or name in a.models:
            rows += parity_of(name, load(), [images for images, _ in batches(a.count)], a)
    return rows


def speed(a: Any) -> list[dict[str, Any]]:
    """Dense and compressed in every runtime, all in one interleaved run a batch size."""
    dense = vit("deit_small_patch16_224", num_classes=10, **(TINY if a.tiny else {}))
    pictures = pictures_of(dense, a.data, 32)
    models = {"dense": dense, "compressed": comcat.compress(dense, calibration=pictures, reduce=a.reduce)}
    with tempfile.TemporaryDirectory() as folder:
        timed = {f"torch {kind}": model for kind, model in models.items()}
        for to in ("onnx", "openvino"):
            for kind, model in models.items():
                out = Path(folder) / kind / SUFFIX[to]
                comcat.export(model, to=to, out=out, data=pictures, pictures=8)
                timed[f"{to} {kind}"] = comcat.open_exported(out)
        rows = []
        for batch in a.batches:
            images = pictures[0][:1].repeat(batch, 1, 1, 1)
            timings = benchmark(timed, images, repeats=a.repeats)
            speeds = {to: ratio(timings, f"{to} dense", f"{to} compressed") for to in ("torch", "onnx", "openvino")}
            for to, (median, low, high) in speeds.items():
                row = {
                    "runtime": to, "batch": batch, "speed_up": median, "quartiles": [low, high],
                    "of_pytorch": median / speeds["torch"][0],
                    "mac_ratio": count_macs(dense, images[:1]) / count_macs(models["compressed"], images[:1]),
                    "latency_s": {k: timings[f"{to} {k}"].median_s for k in models},
                    "against_pytorch": ratio(timings, "torch compressed", f"{to} compressed")[0],
                }  # fmt: skip
                print(row, flush=True)
                rows.append(row)
    return rows


def int8(a: Any) -> list[dict[str, Any]]:
    """int8 of the compressed saliency model; with ``--tiny``, of a classifier."""
    if a.tiny:
        dense = timm_model("vit_tiny_patch16_224", True)
        pictures = pictures_of(dense, a.data, 16)
    else:
        load, batches = real_models()["saliency"]
        dense, pictures = load(), [images for images, _ in batches(a.count)]
    small = comcat.compress(dense, calibration=pictures[:4], reduce=a.reduce)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for precision in ("float32", "int8", "int8-static"):
            out = Path(folder) / f"{precision}.onnx"
            done = comcat.export(small, out=out, data=pictures, pictures=a.count, precision=precision, lose_at_most=1.0)
            sizes[precision] = done.size_bytes
            row = {"precision": precision, **done.comparison.to_dict(), "size_bytes": done.size_bytes}
            row |= {"of_float32": done.size_bytes / sizes["float32"], "notes": list(done.notes)}
            print(row, flush=True)
            rows.append(row)
    return rows


PARTS = {"parity": parity, "speed": speed, "int8": int8}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    p.add_argument("--models", nargs="*", default=[], help="of parity: these alone")
    p.add_argument("--formats", nargs="*", default=["onnx", "openvino"], choices=list(SUFFIX))
    p.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS), help="of parity: these alone")
    p.add_argument("--data", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--count", type=int, default=256, help="pictures")
    p.add_argument("--reduce", type=float, default=0.5)
    p.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    p.add_argument("--repeats", type=int, default=31)
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-export"), help="finished rows of parity")
    p.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    a = p.parse_args()
    for part in a.parts:
        rows = PARTS[part](a)
        if not a.no_write:
            about = {"pictures": a.count, "reduce": a.reduce, "threads": torch.get_num_threads(), "tiny": a.tiny}
            write(f"export-{part}", {**about, "rows": rows})


if __name__ == "__main__":
    main()

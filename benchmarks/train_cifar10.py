"""Train the model that the tuning table is made on: DeiT-tiny's shape (192 wide, 12 deep, 3 heads) for 32×32 pictures
in patches of 4, on CIFAR-10.

From scratch, by ``comcat.tune`` itself with DeiT's recipe and no teacher. The goal is a top-1 of 93 % on the validation
pictures, by which nothing is chosen. The weights go to ``benchmarks/models/deit_tiny_cifar10`` in float16 (11 MB), as
timm's ``local-dir``. A killed run goes on where it stopped.

    python benchmarks/train_cifar10.py                  # on a GPU; two CPU cores would take days
    python benchmarks/tuning.py --model benchmarks/models/deit_tiny_cifar10 --name tuning-deit-tiny --epochs 3 --savings
    0.5 0.6 0.7 0.8 0.9
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import timm
import torch

import comcat
from comcat.files import write_json, write_tensors

NAME, ARCHITECTURE = "deit_tiny_cifar10", "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
INPUT = {
    "input_size": [3, 32, 32], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616],
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "batch_size": 512, "lr": 1e-3, "min_lr": 1e-5, "warmup": 0.05, "weight_decay": 0.05, "mixup": 0.8, "cutmix": 1.0,
    "smoothing": 0.1,
    "rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "crop_scale": (0.4, 1.0), "ema": 0.9998,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    p = common.parser(__doc__)
    p.add_argument("--data", default=str(common.SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--eval", default=str(common.SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--epochs", type=float, default=200)
    p.add_argument("--batch-size", type=int, default=RECIPE["batch_size"])
    p.add_argument("--depth", type=int, default=SHAPE["depth"])
    p.add_argument("--drop-path", type=float, default=0.1)
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    p.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that decode")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, help="so many training and evaluation pictures")
    p.add_argument("--work", type=Path, default=Path("runs/train-cifar10"), help="checkpoints and log")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / NAME)
    a = p.parse_args(arguments)
    train, judged = comcat.open_pictures(a.data), comcat.open_pictures(a.eval)
    if a.limit:
        train, judged = train.take(a.limit, 0), judged.take(a.limit, 0)
    classes = list(train.class_names or [str(i) for i in range(10)])
    torch.manual_seed(a.seed)
    shape = {**SHAPE, "depth": a.depth, "num_classes": len(classes)}
    model = timm.create_model(ARCHITECTURE, pretrained_cfg=INPUT, **shape).to(a.device)
    settings = {
        **RECIPE, "epochs": a.epochs, "batch_size": a.batch_size, "precision": a.precision, "workers": a.workers,
        "seed": a.seed,
        "drop_path": a.drop_path, "eval_every": max(1.0, a.epochs / 20),
    }  # fmt: skip
    comcat.tune(model, train, evaluation=judged, out=a.work, progress=True, **settings)
    model.half().float()  # what is measured is what is stored
    found = comcat.evaluate(model, comcat.batches(judged, comcat.preprocess_of(model), batch_size=100))
    save(model, shape, classes, a.out)
    tuning = model.comcat_record.results.tuning
    print(
        f"top-1 {found.top1:.2f} % of {judged.count} validation pictures after {a.epochs:g} epochs; weights in {a.out}"
    )
    if not a.no_write:
        common.write(
            f"train-{NAME}",
            {"top1": found.top1, "pictures": judged.count, "settings": settings, "seconds": tuning["seconds"],
             "images_per_second": tuning["images_per_second"], "parameters": comcat.count_parameters(model),
             "curve": tuning["curve"]},
        )  # fmt: skip


def save(model: Any, shape: dict[str, Any], classes: list[str], out: Path) -> None:
    """As timm's ``local-dir`` reads it, in float16; each file is written whole or not at all."""
    write_tensors(out / "model.safetensors", {k: v.detach().half() for k, v in model.state_dict().items()})
    content = {
        "architecture": ARCHITECTURE, "num_classes": len(classes), "num_features": SHAPE["embed_dim"],
        "global_pool": "token",
        "model_args": shape, "label_names": classes,
        "pretrained_cfg": {**INPUT, "num_classes": len(classes), "pool_size": None, "first_conv": "patch_embed.proj",
            "classifier": "head"},
    }  # fmt: skip
    write_json(out / "config.json", content)


if __name__ == "__main__":
    main()

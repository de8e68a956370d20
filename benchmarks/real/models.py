"""The three tasks' models on one real backbone: a classifier, a saliency model, a segmenter of nuclei."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from common import SHARED
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comcat import load_model

from . import backbone
from .fetch import FetchError, cache, fill_whole

Library = Literal["timm", "transformers"]


class DenseModel(nn.Module):
    """A vision transformer with a decoder on its patch tokens: pictures (batch, 3, height, width) → one map of logits.

    ``backbone`` is timm's or transformers', with one class token before its patches. Its tokens after the final norm
    go to ``decoder`` as (batch, features, rows, columns). The map is stretched to ``size``: (batch, 1, *size);
    sigmoid is left to the reader.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.decoder, self.size = backbone, decoder, size

    def features(self, images: Tensor) -> Tensor:
        """Patch features (batch, features, rows, columns)."""
        if hasattr(self.backbone, "forward_features"):
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        else:
            tokens = self.backbone(pixel_values=images).last_hidden_state
        side = images.shape[-1] // 14
        return tokens[:, 1:].mT.unflatten(2, (-1, side))

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.decoder(self.features(images)), size=self.size, mode="bilinear")


def classifier() -> nn.Module:
    """DINOv2-small with a linear CIFAR-10 head on its class token, an ordinary timm classifier of 112 pixels.

    Raises :class:`FetchError` where the backbone or the head is missing.
    """
    return load_model(str(classifier_folder()))


def classifier_folder() -> Path:
    """The classifier as a timm folder that the command line can read too; made once."""
    head = head_file("cifar10")
    place = cache(f"classifier-{hashlib.sha256(head.read_bytes()).hexdigest()[:8]}")
    if not place.is_dir():
        fill_whole(place, lambda new: _write_classifier(new, load_file(head), backbone.folders() / "timm"))
    return place


def _write_classifier(folder: Path, head: dict[str, Tensor], trunk: Path) -> None:
    model = load_model(str(trunk), img_size=112)  # timm resamples the positions
    state = model.state_dict() | {f"head.{name}": value for name, value in head.items()}
    config = json.loads((trunk / "config.json").read_text())
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = len(head["bias"])
    config["pretrained_cfg"]["input_size"] = [3, 112, 112]
    config.setdefault("model_args", {})["img_size"] = 112
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


def saliency(library: Library = "transformers") -> DenseModel:
    """DINOv2-small with the wheel's decoder: pictures of 224 pixels → one map of logits of 224.

    Both libraries give the same map: the timm backbone's positions are resampled as transformers does it.
    Raises :class:`FetchError` where the wheel cannot be fetched.
    """
    decoder = saliency_decoder()
    decoder.load_state_dict(load_file(backbone.folders() / "saliency.safetensors"))
    return DenseModel(trunk(library, 224), decoder, (224, 224)).eval()


def saliency_decoder(widths: tuple[int, ...] = (384, 256, 128, 64)) -> nn.Sequential:
    """Thrice a transposed convolution that doubles the map, batch norm and ReLU; then one logit a pixel."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (wide, narrow) in enumerate(pairwise(widths), 1):
        layers[f"upconv{i}"] = nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)
        layers[f"bn{i}"] = nn.BatchNorm2d(narrow)
        layers[f"relu{i}"] = nn.ReLU()
    layers["final_conv"] = nn.Conv2d(widths[-1], 1, 1)
    return nn.Sequential(layers)


def nuclei(library: Library = "transformers") -> DenseModel:
    """DINOv2-small with a linear mask head: pictures of 392 pixels → one map of logits of 256, above 0 for nuclei.

    Raises :class:`FetchError` where the backbone or the head is missing.
    """
    head = load_file(head_file("nuclei"))
    mask = nn.Sequential(OrderedDict(mask=nn.Conv2d(head["weight"].shape[1], 16, 1), shuffle=nn.PixelShuffle(4)))
    mask.load_state_dict({f"mask.{name}": value for name, value in head.items()})
    return DenseModel(trunk(library, 392), mask, (256, 256)).eval()


def trunk(library: Library, size: int) -> nn.Module:
    """The backbone alone for pictures of ``size`` pixels."""
    folder = backbone.folders()
    if library == "transformers":
        return load_model(str(folder / "transformers"))
    model: Any = load_model(str(folder / "timm"), img_size=size)
    table = load_file(folder / "timm" / "model.safetensors")["pos_embed"]
    with torch.no_grad():
        model.pos_embed.copy_(resampled_positions(table, size // 14))
    return model


def resampled_positions(table: Tensor, side: int) -> Tensor:
    """A position table (1, 1 + n², width) for ``side`` × ``side`` patches.

    Bicubic without antialiasing, as transformers' DINOv2 has it.
    """
    first, rest = table[:, :1], table[:, 1:]
    grid = rest.mT.unflatten(2, (round(rest.shape[1] ** 0.5), -1))
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).mT], 1)


def head_file(name: str) -> Path:
    """The weights of a head, trained apart: ``cifar10`` or ``nuclei``.

    Raises :class:`FetchError` where they are missing: they are not part of the repository.
    """
    path = SHARED / "pretrained" / f"{name}_head.safetensors"
    if not path.is_file():
        raise FetchError(f"the {name} head is missing: expected {path}")
    return path

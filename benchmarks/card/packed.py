"""The folder ``.gpu/`` that travels to a machine without a network: a real classifier, and pictures for it.

``classifier/`` is a timm folder whose weights are kept in float16. A set of pictures is one safetensors file with the
pictures' files one after the other (``bytes``), how long each is (``lengths``) and the classes (``labels``). They are
decoded and resized where they are read, by the same code as anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real.data import Part, Pixels, as_bytes, opened, squares
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comcat import load_model
from comcat.errors import ComcatError

SIZE = 112


class PackedError(ComcatError):
    """Something that was to be packed is not in the folder."""


@dataclass(frozen=True)
class Packed:
    """A packed folder. Raises :class:`PackedError` at first use of what is not in it."""

    folder: Path

    def classifier(self) -> nn.Module:
        """The classifier in float32, its weights rounded to float16 once."""
        return load_model(str(self._there("classifier"))).float()

    def pixels(self, part: Part, count: int | None = None, seed: int = 0) -> Pixels:
        """The first pictures that are judged, or those to calibrate on by seed, at the model's size."""
        name = f"calibration-{seed}" if part == "calibration" else "judged"
        found = unpacked(load_file(self._there(f"{name}.safetensors")))
        if count is not None and len(found) < count:
            raise PackedError(f"{name}: got {len(found)} packed pictures, expected {count} or more")
        return found.first(count)

    def seeds(self) -> int:
        """For how many seeds there are calibration pictures."""
        return len(list(self.folder.glob("calibration-*.safetensors")))

    def _there(self, name: str) -> Path:
        place = self.folder / name
        if not place.exists():
            raise PackedError(f"{place} is missing: make the folder with python benchmarks/gpu_pack.py")
        return place


def write_pictures(path: Path, pictures: Iterable[tuple[bytes, int]]) -> None:
    """Keep pictures' files and classes in one file."""
    files, labels = zip(*pictures, strict=True)
    tensors = {
        "bytes": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
        "lengths": torch.tensor([len(file) for file in files]),
        "labels": torch.tensor(labels),
    }
    save_file(tensors, path)


def unpacked(tensors: dict[str, Tensor]) -> Pixels:
    """The pictures of a file, decoded and resized."""
    fit = squares(SIZE).fit
    pixels = [as_bytes(fit(opened(file).convert("RGB"))) for file in _files(tensors)]
    labels = tensors["labels"]
    return Pixels(pixels=torch.stack(pixels), labels=labels, origins=torch.arange(len(labels)))


def _files(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    for file in tensors["bytes"].split(tensors["lengths"].tolist()):
        yield file.numpy().tobytes()


def write_classifier(folder: Path, config: str, state: dict[str, Any]) -> None:
    """A timm folder with its weights in float16."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file({name: value.half().contiguous() for name, value in state.items()}, folder / "model.safetensors")

"""From pictures to feature vectors: how they are resized, which network sees them, and what of it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Pictures
from ..errors import ModelError
from ..models import preprocess_of
from ..runs.seeding import seeded
from ..store import load_model

PICKLED = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".jit")


@dataclass(frozen=True)
class Extractor:
    """A network that makes a vector of a picture.

    ``prepare`` makes its input (channels, height, width) of one picture, ``encode`` (batch, features) of a batch.
    """

    name: str
    prepare: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How the networks behind the scores are opened."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    pretrained: bool = True
    """With False random weights: to try things out where no checkpoint can be had."""
    seed: int = 0
    """Of random weights."""


AS_PUBLISHED = Opening()


def clean_resize(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture at ``size`` (height, width), (3, height, width) float32 in 0…255 and a little beyond, as clean-fid
    resizes.

    Each channel is resized by itself, in floating point, by Pillow's bicubic filter, which widens when it shrinks a
    picture and so does not alias; the result is neither rounded nor clipped (Parmar, Zhang and Zhu 2022). The whole
    picture is kept, whatever its proportions.
    """
    height, width = size
    channels = np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    resized = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in resized]))


def distance_extractor(spec: str, opening: Opening = AS_PUBLISHED) -> Extractor:
    """The extractor for KID and FID: any model that :func:`comcat.load_model` knows, on pictures resized by
    :func:`clean_resize`.

    Raises:
        ModelError: if the model is not found or takes no colour pictures.
    """
    model = _load(spec, opening)
    settings = preprocess_of(model)
    if settings.channels != 3:
        raise ModelError(f"{spec} takes grey pictures; KID and FID are of colour ones")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))

    def prepare(image: Image.Image) -> Tensor:
        return (clean_resize(image, settings.size) / 255 - mean) / std

    return Extractor(spec, prepare, lambda images: pooled_features(model, images.to(opening.device, opening.dtype)))


def similarity_extractor(spec: str, opening: Opening = AS_PUBLISHED) -> Extractor:
    """The extractor for DINO's similarity: pictures are prepared as the model's own settings say.

    Raises as :func:`distance_extractor`.
    """
    model = _load(spec, opening)
    prepare = preprocess_of(model)
    return Extractor(spec, prepare, lambda images: pooled_features(model, images.to(opening.device, opening.dtype)))


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """What a model's classifier would see of pictures (batch, channels, height, width): (batch, features).

    timm: what its head pools. transformers: ``image_embeds``, else the class token where a pooler of its own training
    would come after it (ViT: checkpoints such as DINO's lack its weights), else ``pooler_output``, else the class
    token.
    """
    inner: Any = model
    if hasattr(inner, "forward_head"):
        return inner.forward_head(inner.forward_features(images), pre_logits=True)
    base = getattr(inner, "base_model", inner)
    output = base(pixel_values=images)
    if (embedded := output.get("image_embeds")) is not None:
        return embedded
    pooled = output.get("pooler_output")
    if pooled is None or hasattr(getattr(base, "pooler", None), "dense"):
        return output["last_hidden_state"][:, 0]
    return pooled.flatten(1)


@torch.no_grad()
def embed(
    pictures: Pictures, extractor: Extractor, *, batch_size: int = 32, progress: bool = False
) -> tuple[Tensor, list[str]]:
    """The vectors of all readable pictures, (n, features) float64 on the CPU, and the pictures' keys."""
    found, keys = [], []
    bar = tqdm(total=pictures.count, desc=f"{extractor.name}, {pictures.name}", unit="picture", disable=not progress)
    with bar:
        for images, names in _batched(pictures, extractor, batch_size):
            found.append(extractor.encode(images).double().cpu())
            keys += names
            bar.update(len(names))
    return torch.cat(found), keys


def _batched(pictures: Pictures, extractor: Extractor, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    images: list[Tensor] = []
    names: list[str] = []
    for image, entry in pictures.read(extractor.prepare):
        images.append(image)
        names.append(entry.key)
        if len(images) == size:
            yield torch.stack(images), names
            images, names = [], []
    if images:
        yield torch.stack(images), names


def _load(spec: str, opening: Opening) -> nn.Module:
    if spec.lower().endswith(PICKLED):
        raise ModelError(
            f"{spec}: weights that are pickled or TorchScript can run any code and are not opened; expected timm:NAME, "
            "hf:NAME "
            "or a folder with config.json and safetensors"
        )
    with seeded(opening.seed):
        return load_model(spec, pretrained=opening.pretrained, device=opening.device, dtype=opening.dtype)

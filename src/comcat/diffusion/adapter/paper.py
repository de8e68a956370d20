"""Importing the adapters of COMCAT's published code (Xiao et al. 2023), ``comcat_weight.pt``.

Such a file is a plain list of weights, without names: transformer blocks of the UNet's down, then up, then middle
blocks; in each the self-attention before the cross-attention; in each of these W of q, k, v (heads · rank, in) and of
the output (out, heads · rank).

Its code multiplies all four factors by its ``alpha``, so that what it calls 0.8 is a scale of 0.8² = 0.64 here.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, StoreError, counted
from ...files import home_path
from ...grad_mode import outside_inference_mode
from ...modules.adapters import SIDES
from ..pipeline.components import denoiser_of
from .attach import check_new, install
from .files import AdapterFile
from .load import fitting
from .places import find_places
from .records import Adapter, Record

_PER_ATTENTION = tuple(SIDES.values())  # q, k, v, out: the order of the list as well


@outside_inference_mode
def import_paper(path: str | os.PathLike[str], target: Any, *, name: str) -> Adapter:
    """Load an adapter that the paper's code has saved into a Stable Diffusion 1.x or 2.x pipeline, or its unet.

    ``save`` then writes it as a file of ours.

    Raises:
        StoreError: if the file is missing, damaged, holds more than tensors, or does not fit. ModelError: if ``target``
            has no unet. SettingsError: if the name is taken. In either case nothing has changed.
    """
    path = home_path(path)
    factors = _read(path)
    component = denoiser_of(target)
    if component.name != "unet":
        raise ModelError(f"got a {type(component.model).__name__}, expected a UNet: the paper's code knows no other")
    check_new(target, name)
    places = _in_order(component.model)
    if len(factors) != len(_PER_ATTENTION) * len(places):
        raise StoreError(
            f"{path} holds {counted(len(factors), 'tensor')}, expected {len(_PER_ATTENTION) * len(places)}: "
            f"{len(_PER_ATTENTION)} for each of the {len(places)} attentions of this UNet"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    for index, place in enumerate(places):
        own = factors[index * len(_PER_ATTENTION) : (index + 1) * len(_PER_ATTENTION)]
        modules[f"unet.{place}"] = dict(zip(_PER_ATTENTION, own, strict=True))
    heads = {a.path: a.heads for a in find_places(component).adaptable}  # what is refused, fitting() tells
    alphas = {p: len(f["q_up"]) / heads.get(p, 1) for p, f in modules.items()}  # strength 1
    terms = fitting(target, AdapterFile(path, modules, alphas, {}, {}))
    return install(target, name, terms, Record(paths=tuple(terms)))


def _in_order(unet: Any) -> list[str]:
    """Paths of the attentions as the list has them."""
    blocks = [*_children(unet, "down_blocks"), *_children(unet, "up_blocks"), ("mid_block", unet.mid_block)]
    found: list[str] = []
    for path, block in blocks:
        for inner, _ in block.named_modules():
            if re.fullmatch(r"attentions\.\d+\.transformer_blocks\.\d+", inner):
                found += [f"{path}.{inner}.attn1", f"{path}.{inner}.attn2"]
    return found


def _children(unet: Any, name: str) -> list[tuple[str, Any]]:
    return [(f"{name}.{index}", block) for index, block in enumerate(getattr(unet, name))]


def _read(path: Path) -> list[Tensor]:
    if not path.is_file():
        raise StoreError(f"there is no file {str(path)!r}, expected the paper's comcat_weight.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged can fail anywhere
        refused = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {refused[1]}, and only tensors are read" if refused else "no tensors can be read from it"
        raise StoreError(f"{path} is refused: {reason}") from error
    if not isinstance(content, list) or not content or not all(isinstance(t, Tensor) for t in content):
        raise StoreError(
            f"{path} is no adapter of COMCAT's published code: it holds a {type(content).__name__}, expected a list of "
            "tensors"
        )
    for index, tensor in enumerate(content):
        if tensor.ndim != 2 or not tensor.isfinite().all():
            what = f"is {tuple(tensor.shape)}, expected a matrix" if tensor.ndim != 2 else "holds NaN or infinity"
            raise StoreError(f"{path} is damaged: number {index} of its {len(content)} tensors {what}")
    return [t.detach() for t in content]

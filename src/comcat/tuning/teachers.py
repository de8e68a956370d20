"""The teacher of a run: its logits, and the features of its blocks beside the student's."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import ComcatError, DataError, ModelError, SettingsError, counted, nearest
from ..hosts import find_sites
from ..measure.outputs import as_rows, is_classifier, whole_output
from ..measure.running import evaluating
from ..models import class_names_of, preprocess_of
from ..sites import block_of


class Teacher(nn.Module):
    """A model in evaluation mode that sees the student's pictures, normalised as it wants them."""

    def __init__(self, model: nn.Module, seen: Preprocess, device: torch.device) -> None:
        """A copy of ``model``, on ``device``. ``seen``: how the student's pictures are prepared."""
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        self._rescale: tuple[Tensor, Tensor] | None = None
        own = preprocess_or_none(model)
        if own is not None and (own.mean, own.std) != (seen.mean, seen.std):
            # (p − m) / s of the student's becomes (p − m*) / s* of the teacher's
            mean, std, aim_mean, aim_std = (
                torch.tensor(v, device=device).view(-1, 1, 1) for v in (seen.mean, seen.std, own.mean, own.std)
            )
            self._rescale = std / aim_std, (mean - aim_mean) / aim_std

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes), features (batch, width) or maps of pictures (batch, channels, height, width)."""
        if self._rescale is not None:
            scale, shift = self._rescale
            images = images * scale + shift
        return rows_or_maps(self.model, images).float()


def rows_or_maps(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says, maps in their own shape (batch, channels, height, width), all else as one row a picture."""
    output = whole_output(model, images)
    return output if output.dim() == 4 else as_rows(output)


def check_teacher(
    teacher: nn.Module, student: nn.Module, seen: Preprocess, said: Sequence[int], *, logits: bool
) -> None:
    """Raise unless a teacher can teach a student; ``logits``: whether these, or maps, are to be learnt.

    Args:
        said: the shape of what the student says of a picture: (classes,), or (channels, height, width) of maps.

    Raises:
        SettingsError: where it takes pictures of another size or tells other classes apart; the message says what each
            has.
    """
    own = preprocess_or_none(teacher)
    ours = f"{seen.size[0]}×{seen.size[1]}×{seen.channels}"
    parameter = next(teacher.parameters())
    blank = seen.blank(parameter)
    failed, taught = None, list[int]()
    try:
        with torch.no_grad(), evaluating(teacher):
            taught = list(rows_or_maps(teacher, blank).shape[1:])
    except ModelError as error:
        failed = error
    if own is not None and (own.size, own.channels) != (seen.size, seen.channels):
        theirs = f"{own.size[0]}×{own.size[1]}×{own.channels}"
        able = "" if failed else "; it can take the student's as well: load it for them (img_size=…, image_size=…)"
        raise SettingsError(
            f"the teacher takes pictures of {theirs}, the student of {ours}, and both see the same{able}"
        )
    if failed is not None:
        raise SettingsError(f"the teacher cannot take the student's pictures of {ours}: {failed}") from failed
    if not logits:
        return
    said = list(said)
    if len(said) > 1 or len(taught) > 1:
        if said != taught:
            raise SettingsError(f"the teacher gives {_shaped(taught)}, the student {_shaped(said)}; expected the same")
        return
    if not is_classifier(teacher) or said != taught:
        has = counted(taught[0], "class") if is_classifier(teacher) else "no classes"
        raise SettingsError(f"the teacher has {has}, the student {said[0]}; expected the same ones")
    names, others = _names(student), _names(teacher)
    if names and others and names != others and sorted(names) == sorted(others):
        place = next(i for i, pair in enumerate(zip(names, others, strict=True)) if pair[0] != pair[1])
        raise SettingsError(
            f"the teacher has the student's classes in another order: "
            f"class {place} is {others[place]!r}, expected {names[place]!r}"
        )


def _shaped(said: Sequence[int]) -> str:
    """What is said of a picture, in words."""
    return f"maps of {' × '.join(map(str, said))}" if len(said) > 1 else f"{said[0]} numbers a picture"


def preprocess_or_none(model: nn.Module) -> Preprocess | None:
    """How pictures are prepared for a model, if it can be told."""
    try:
        return preprocess_of(model)
    except ModelError:
        return None


def _names(model: nn.Module) -> tuple[str, ...] | None:
    try:
        found = class_names_of(model)
    except ModelError:
        return None
    return None if found is None else tuple(name.casefold() for name in found)


# ---------------------------------------------------------------- features


def chosen_blocks(words: Sequence[str], teacher: nn.Module) -> tuple[str, ...]:
    """The paths of blocks that ``features`` names: paths, ``all``, or ``every-3`` (the third, the sixth, …).

    Blocks are what the teacher's attention lies in. Raises SettingsError for what is no block.
    """
    try:
        sites = find_sites(teacher).values()
    except ComcatError:
        sites = ()
    blocks = list(dict.fromkeys(block_of(site.path) for site in sites if site.kind in ("qk", "vo")))
    modules = dict(teacher.named_modules())
    chosen: list[str] = []
    for word in words:
        step = re.fullmatch(r"every-([1-9]\d*)", word)
        if step or word == "all":
            found = blocks[int(step.group(1)) - 1 :: int(step.group(1))] if step else blocks
            if not found:
                has = counted(len(blocks), "block")
                raise SettingsError(f"features={word}: the teacher has {has} of attention; name modules by path")
            chosen += found
        elif word in modules:
            chosen.append(word)
        else:
            raise SettingsError(f"features: the teacher has no block {word!r}{nearest(word, blocks or modules)}")
    return tuple(dict.fromkeys(chosen))


class Features:
    """The outputs of blocks, kept from one forward to its loss."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def kept_from(self, model: nn.Module) -> Iterator[None]:
        """While the block lasts, each forward of ``model`` leaves its features here.

        Raises SettingsError for a missing path.
        """
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for path in self.paths:
                if path not in modules:
                    raise SettingsError(f"features: the student has no block {path!r}{nearest(path, modules)}")
                stack.callback(modules[path].register_forward_hook(self._keeper(path)).remove)
            yield

    def _keeper(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if not isinstance(output, Tensor):
                raise DataError(f"features: {path} gives a {type(output).__name__}, expected a tensor")
            self._kept[path] = output

        return keep

    def take(self) -> list[Tensor]:
        """The features of the latest forward, (batch, …) each, in the order of the paths."""
        taken = [self._kept[path] for path in self.paths]
        self._kept.clear()
        return taken

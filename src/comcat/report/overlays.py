"""Pictures for the report: which tokens each block ran as one, and what a dense model's map was and is."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ModelError
from ..hosts.blocks import reduced_blocks
from ..hosts.classes import classes_of
from ..measure.running import call, evaluating
from ..models import preprocess_of
from ..statistics.losses import told
from ..statistics.trunk import find_trunk
from ..tokens import Chosen
from .data import ShownPicture

SIDE = 168
"""Pixels of the longer side of a picture in the report."""
BLOCKS = 6
"""So many blocks of a picture are shown at most, so that the page stays small."""
FINE = 8
"""Tokens of fewer pixels a side get no outline: it would cover them."""
_TINT = 0.55
"""How much of a merged token is its group's colour."""

Pixels = NDArray[np.float32]
"""(height, width, 3), values from 0 to 1."""


def shown_pictures(before: nn.Module, after: nn.Module, pictures: Tensor) -> tuple[ShownPicture, ...]:
    """What the report shows of some pictures (count, channels, height, width), as the models are given them.

    Empty where no block of ``after`` runs on fewer tokens, or where nobody knows how its tokens lie on the picture.
    """
    reduced = reduced_blocks(after)
    if not reduced:
        return ()
    pictures = pictures.to(next(before.parameters()))
    grid = _grid(before, pictures[:1])
    if grid is None:
        return ()
    with _groups_kept(reduced) as groups:
        small = _said(after, pictures)
    classes = classes_of(before)
    maps = [_map(output, classes) for output in (_said(before, pictures), small)]
    chosen = {name: groups[name] for name in _spread_out([n for n in reduced if n in groups])}
    found = []
    for n, seen in enumerate(map(_pixels_of(before), pictures)):
        blocks = {name: (of[n].reshape(grid), rests) for name, (of, rests) in chosen.items()}
        found.append(_shown(seen, blocks, [None if m is None else m[n] for m in maps]))
    return tuple(found)


def _grid(model: nn.Module, picture: Tensor) -> tuple[int, int] | None:
    try:
        sites = find_trunk(model, picture).sites
    except ModelError:
        return None
    return sites[0].grid if sites else None


def _said(model: nn.Module, pictures: Tensor) -> Any:
    """A model's output; models that draw at random draw the same."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return call(model, pictures.to(next(model.parameters())))


@contextmanager
def _groups_kept(reduced: Mapping[str, Any]) -> Iterator[dict[str, tuple[NDArray[np.int64], bool]]]:
    """While the block lasts, a forward leaves the group of every token here (pictures, tokens), block by block.

    Where tokens rest instead of being merged, as the second value says, the groups are 1 for those that run, else 0.
    """
    found: dict[str, tuple[NDArray[np.int64], bool]] = {}

    def keeper(name: str, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def kept(block: Any, x: Tensor) -> Any:
            reduction = reduce(block, x)
            if reduction is not None:
                rests = isinstance(reduction, Chosen)
                numbers = torch.ones(reduction.count) if rests else torch.arange(reduction.count)
                rows = numbers.to(x.device, torch.float64).expand(len(x), -1)[..., None].contiguous()
                of = reduction.spread(rows)[..., 0]
                tokens = x.shape[1] - block.token_reduction.prefix
                found[name] = of[:, -tokens:].round().long().cpu().numpy(), rests
            return reduction

        return kept

    for name, one in reduced.items():
        one.reduction = keeper(name, one.reduction)
    try:
        yield found
    finally:
        for one in reduced.values():
            del one.reduction


def _spread_out(names: Sequence[str]) -> list[str]:
    """At most so many names as are shown, first and last among them."""
    if len(names) <= BLOCKS:
        return list(names)
    return [names[round(n * (len(names) - 1) / (BLOCKS - 1))] for n in range(BLOCKS)]


def _shown(
    seen: Pixels, blocks: Mapping[str, tuple[NDArray[np.int64], bool]], maps: Sequence[Tensor | None]
) -> ShownPicture:
    return ShownPicture(
        picture=_encoded(seen),
        blocks={name: _encoded(_overlaid(seen, *groups)) for name, groups in blocks.items()},
        counts={name: _counted(*groups) for name, groups in blocks.items()},
        maps=_map_images(maps, seen.shape),
    )


def _pixels_of(model: nn.Module) -> Callable[[Tensor], Pixels]:
    """From a picture (channels, height, width), as a model is given it, to pixels of the report's size."""
    try:
        prepared = preprocess_of(model)
    except ModelError:
        prepared = None

    def pixels(picture: Tensor) -> Pixels:
        values = picture.detach().float().cpu()
        if prepared is not None and len(prepared.mean) == len(values):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (prepared.mean, prepared.std))
            values = values * std + mean
        else:  # nobody knows what was black
            low, high = values.quantile(0.005), values.quantile(0.995)
            values = (values - low) / (high - low).clamp_min(1e-6)
        return _resized(values.clamp(0, 1), SIDE / max(values.shape[1:]))

    return pixels


def _resized(values: Tensor, scale: float) -> Pixels:
    values = values.expand(3, -1, -1) if len(values) == 1 else values[:3]
    size = [max(1, round(side * scale)) for side in values.shape[1:]]
    return F.interpolate(values[None], size=size, mode="area" if scale < 1 else "nearest")[0].permute(1, 2, 0).numpy()


def _overlaid(picture: Pixels, groups: NDArray[np.int64], rests: bool) -> Pixels:
    """A picture with the colours of its groups (rows, columns); tokens alone are as they are. Those that rest are
    dark.
    """
    rows, columns = (np.arange(n) * g // n for n, g in zip(picture.shape, groups.shape, strict=False))
    of = groups[rows][:, columns]
    if rests:
        return (picture * np.where(of == 0, 0.2, 1.0)[..., None]).astype(np.float32)
    sizes = np.bincount(groups.flatten())
    merged = (sizes[of] > 1)[..., None]
    edge = np.zeros_like(of, dtype=bool)
    if max(groups.shape) * FINE <= max(picture.shape):
        edge[1:] |= of[1:] != of[:-1]
        edge[:, 1:] |= of[:, 1:] != of[:, :-1]
    tinted = np.where(merged, (1 - _TINT) * picture + _TINT * _hues(len(sizes), 0.75, 1.0)[of], picture)
    return np.where(edge[..., None], 0.45 * tinted, tinted).astype(np.float32)


def _hues(count: int, saturation: float, value: float) -> NDArray[np.float64]:
    """Colours (count, 3), neighbours far apart: hues by the golden section."""
    return np.array([colorsys.hsv_to_rgb(0.618034 * n % 1, saturation, value) for n in range(count)])


def _counted(groups: NDArray[np.int64], rests: bool) -> str:
    run = int(groups.sum()) if rests else len(np.unique(groups))
    return f"{run} of {groups.size}"


def _map(output: Any, classes: frozenset[int]) -> Tensor | None:
    """The map in an output, one value or scores at a place: (pictures, channels, height, width), or None."""
    maps = [t for t in told(output) if t.ndim == 4 and t.is_floating_point() and t.shape[1] in {1, *classes}]
    return maps[0].detach().float().cpu() if maps and min(maps[0].shape[2:]) > 1 else None


def _map_images(maps: Sequence[Tensor | None], shape: tuple[int, ...]) -> dict[str, str]:
    """A map (channels, height, width) before and after as pictures: classes in colours, values in one scale of grey."""
    whole = [m for m in maps if m is not None]
    if len(whole) < 2 or not all(bool(m.isfinite().all()) for m in whole):
        return {}
    if len(whole[0]) > 1:
        colours = _hues(len(whole[0]), 0.7, 0.9)
        colours[0] = 0.1  # the background more often than not
        drawn = [torch.from_numpy(colours[m.argmax(0).numpy()]).permute(2, 0, 1) for m in whole]
    else:
        low, high = float(whole[0].min()), float(whole[0].max())
        if low < 0 < high:  # logits of a mask
            whole, low, high = [m.sigmoid() for m in whole], 0.0, 1.0
        drawn = [((m - low) / max(high - low, 1e-12)).clamp(0, 1).expand(3, -1, -1) for m in whole]
    sized = (F.interpolate(d[None].float(), size=shape[:2])[0].permute(1, 2, 0).numpy() for d in drawn)
    return dict(zip(("before", "after"), map(_encoded, sized), strict=True))


def _encoded(pixels: Pixels) -> str:
    """Pixels as the address of a picture that stands in the page itself."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

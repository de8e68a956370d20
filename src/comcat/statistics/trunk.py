"""The trunk of a model: the blocks through which tokens flow, their grid, and the tokens in front.

All of it is found by running the model, not by names. Blocks are modules of one list that pass tokens (batch, tokens,
channels) on in the same shape. Tokens in front, and at the end, are those that no picture changes. The grid is that of
the convolution that cuts the picture, and proven by changing single patches. That a block may run on fewer tokens is
proven in a copy with random weights: it must commute with any order of the patch tokens and accept fewer of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import ModelError, NumericsError
from ..hosts.blocks import Anatomy, objection_or_anatomy
from ..hosts.symmetry import structure
from ..measure.running import call, evaluating
from ..sites import Refusal, TokenSite, part


@dataclass(frozen=True)
class Trunk:
    """What tokens flow through.

    Attributes:
        sites: the blocks that can run on fewer tokens. refused: those that cannot, with the reason.
        tokens: rows at each block, those in front included. patches: path of the convolution that cuts the picture.
    """

    sites: tuple[TokenSite, ...]
    refused: tuple[Refusal, ...] = ()
    tokens: int = 0
    patches: str | None = None


@dataclass
class _Seen:
    """What a block was called with and gave.

    Attributes:
        others, named: what it was called with beside the tokens. first: the cuts (see :func:`_run`) made before it.
    """

    tokens: Tensor | None = None
    others: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    kept: bool = False
    calls: int = 0


def find_trunk(model: nn.Module, example: Any) -> Trunk:
    """The trunk of a model, found by showing it one picture (1, channels, height, width), or what its forward takes.

    The model is not changed.

    Raises:
        ModelError: where no block passes tokens on; the message says what was found instead.
    """
    blocks, images = _candidates(model), _images(example)
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no trunk: no list of blocks of one kind that pass tokens on")
    seen, cuts = _run(model, example, blocks)
    path = _longest(blocks, seen)
    if path is None:
        raise ModelError(f"{type(model).__name__} has no trunk: {_why_none(blocks, seen)}")
    trunk = [p for p in blocks[path] if _passes(seen[p])]
    rows = seen[trunk[0]].tokens
    if rows is None:
        raise ModelError(f"{type(model).__name__} has no trunk: {trunk[0]} was never called")
    front, suffix = _beside(model, example, images, trunk[0], rows)
    prefix = front + suffix
    tokens = rows.shape[1] - prefix
    before = dict(list(cuts.items())[: seen[trunk[0]].first])
    cut, grid = _grid(model, example, images, trunk[0], front, tokens, before)
    sites, refused, known = [], [], {}
    for block in trunk:
        name, found = f"{block}:tokens", _anatomy(part(model, block), seen[block], rows, front, known)
        if isinstance(found, str):
            refused.append(Refusal(name, found))
            continue
        sites.append(
            TokenSite(
                name,
                block,
                tokens,
                prefix,
                rows.shape[2],
                grid=grid,
                patches=cut,
                stream=found.stream,
                mask=found.mask,
                norm=found.norm,
                suffix=suffix,
            )
        )
    return Trunk(tuple(sites), tuple(refused), rows.shape[1], cut)


def _candidates(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the members of each list of modules of one class with attention-like insides, by the list's path."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = dict(module.named_children())
        if members and all(next(m.children(), None) is not None for m in members.values()):
            found[path] = [f"{path}.{name}" if path else name for name in members]
    return found


def _run(model: nn.Module, example: Any, blocks: Mapping[str, list[str]]) -> tuple[dict[str, _Seen], dict[str, tuple]]:
    """What each block was called with, and the height and width that each convolution put out, in order."""
    seen = {path: _Seen() for paths in blocks.values() for path in paths}
    cuts: dict[str, tuple] = {}
    hooks = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stream = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            said = output[0] if isinstance(output, tuple) and output else output
            s = seen[path]
            s.calls += 1
            s.tokens = stream.detach() if isinstance(stream, Tensor) else None
            s.others, s.named = args[1:], {name: v for name, v in kwargs.items() if v is not stream}
            s.kept = isinstance(said, Tensor) and s.tokens is not None and said.shape == s.tokens.shape

        return hook

    def begin(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[path].first = len(cuts)

        return hook

    def measure(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                cuts[path] = tuple(output.shape[-2:])

        return hook

    try:
        for path in seen:
            hooks.append(part(model, path).register_forward_pre_hook(begin(path), with_kwargs=True))
            hooks.append(part(model, path).register_forward_hook(keep(path), with_kwargs=True))
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                hooks.append(module.register_forward_hook(measure(path)))
        _show(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, cuts


def _show(model: nn.Module, example: Any) -> None:
    state = torch.random.get_rng_state()
    with evaluating(model), torch.no_grad():
        torch.manual_seed(0)  # models that mask tokens at random mask the same ones
        try:
            call(model, example)
        finally:
            torch.random.set_rng_state(state)


def _passes(s: _Seen) -> bool:
    return s.kept and s.calls == 1 and s.tokens is not None and s.tokens.ndim == 3


def _longest(blocks: Mapping[str, list[str]], seen: Mapping[str, _Seen]) -> str | None:
    """The list with the most blocks that pass tokens on; one inside a block of another list does not count."""
    counts = {path: sum(_passes(seen[p]) for p in paths) for path, paths in blocks.items()}
    counts = {path: count for path, count in counts.items() if count}
    return max(counts, key=lambda path: counts[path], default=None)


def _why_none(blocks: Mapping[str, list[str]], seen: Mapping[str, _Seen]) -> str:
    for path, paths in blocks.items():
        tokens = seen[paths[0]].tokens
        if tokens is not None and tokens.ndim == 4:
            shape = " × ".join(map(str, tokens.shape[1:]))
            return f"blocks of {path!r} get a grid of {shape}, expected tokens (tokens, channels)"
    return f"no block of {', '.join(map(repr, list(blocks)[:3]))} passes tokens (batch, tokens, channels) on"


def _images(example: Any) -> Tensor:
    """The picture in an example."""
    for leaf in tree_leaves(example):
        if isinstance(leaf, Tensor) and leaf.ndim == 4:
            return leaf
    raise ModelError("got an example without a picture (batch, channels, height, width)")


def _first_tokens(model: nn.Module, example: Any, images: Tensor, changed: Tensor, block: str) -> Tensor:
    """What the first block gets when the example's picture is another one."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))).detach())

    handle = part(model, block).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _show(model, tree_map_only(Tensor, lambda t: changed if t is images else t, example))
    finally:
        handle.remove()
    return found[0]


def _beside(model: nn.Module, example: Any, images: Tensor, block: str, rows: Tensor) -> tuple[int, int]:
    """Tokens in front and at the end that no picture changes: class tokens and registers; detection tokens."""
    if not rows.isfinite().all():
        raise NumericsError("the tokens of the first block hold NaN or infinite values on the pictures")
    other = _first_tokens(model, example, images, images.flip(-1).roll(1, 0) * -0.7 + 0.3, block)
    if other.shape != rows.shape:
        raise ModelError("the number of tokens depends on what the picture shows")
    same = (other - rows).abs().amax((0, 2)) <= 1e-6 * (1 + rows.abs().amax())
    moved = (~same).nonzero()
    if not len(moved):
        raise ModelError("the tokens of the first block do not depend on the picture")
    return int(moved[0]), rows.shape[1] - 1 - int(moved[-1])


def _grid(
    model: nn.Module, example: Any, images: Tensor, block: str, prefix: int, tokens: int, cuts: Mapping[str, tuple]
) -> tuple[str | None, tuple[int, int] | None]:
    """The convolution whose output has as many places as there are tokens, and its height and width, where tokens lie
    in its order; (None, None) where they do not.
    """
    cut = next((path for path, grid in reversed(list(cuts.items())) if grid[0] * grid[1] == tokens), None)
    if cut is None:
        return None, None
    rows, columns = cuts[cut]
    high, wide = images.shape[-2] // rows, images.shape[-1] // columns
    before = _first_tokens(model, example, images, images, block)
    for i, j in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)}:
        changed = images.clone()
        changed[..., i * high : (i + 1) * high, j * wide : (j + 1) * wide] += 1.0
        after = _first_tokens(model, example, images, changed, block)
        moved = (after - before).abs().sum((0, 2))[prefix:]
        if int(moved.argmax()) != i * columns + j:
            return None, None
    return cut, (rows, columns)


def _anatomy(
    block: nn.Module, seen: _Seen, rows: Tensor, prefix: int, known: dict[tuple, Anatomy | str]
) -> Anatomy | str:
    """What a reduction needs to know of a block, or why it cannot run on fewer tokens; proven once for its like."""
    if seen.tokens is None or seen.tokens.shape != rows.shape:
        return "gets another number of tokens than the first block"
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((seen.others, seen.named))):
        return "gets other tensors beside its tokens, as rotary positions or a mask"
    key = (structure(block), repr(seen.others), repr(sorted(seen.named.items())))
    if key not in known:
        known[key] = objection_or_anatomy(block, rows.shape[2], prefix, seen.others, seen.named)
    return known[key]

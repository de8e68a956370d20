"""Whether a block may run on fewer tokens than the picture has: proven by a trial in a copy with random weights.

It must commute with any order of the patch tokens and accept fewer of them. Rotary positions, relative position biases
and windows break this.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, nearest
from ..sites import TokenSite
from .symmetry import TOLERANCE, random_copy, structure

MASKS = ("attn_mask", "attention_mask", "mask")
"""What blocks call an additive attention mask."""

_FAILURES = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError)


@dataclass(frozen=True)
class Anatomy:
    """What a reduction of tokens needs to know of a block.

    Attributes:
        stream: the name of its first argument, the tokens. mask: the argument by which it takes an additive attention
            mask, None where it takes none. norm: its child that is given the tokens first, as they come, or None.
    """

    stream: str
    mask: str | None
    norm: str | None


def objection_or_anatomy(
    block: nn.Module, channels: int, prefix: int, others: Sequence[Any] = (), named: Mapping[str, Any] | None = None
) -> Anatomy | str:
    """What a reduction needs to know of a block, or why the block cannot run on fewer tokens.

    Args:
        channels: of a token. prefix: tokens in front. others, named: what else the block is called with, by position
            and by name.
    """
    if hasattr(block, "token_reduction"):
        return "it runs on fewer tokens already; take that back by handle.revert() first"
    if "forward" in vars(block):
        return "its forward was replaced by another library"
    generator, named = torch.Generator().manual_seed(0), dict(named or {})
    copied, count = random_copy(block, generator), 9
    x = torch.randn(2, prefix + count, channels, generator=generator, dtype=torch.float64)
    order = torch.cat((torch.arange(prefix), prefix + torch.randperm(count, generator=generator)))
    with torch.no_grad():
        try:
            y = _first(copied(x, *others, **named))
        except _FAILURES:
            return "does not accept fewer tokens than the grid has"
        if y.shape != x.shape:
            return "does not pass on as many tokens as it gets"
        if not _close(_first(copied(x[:, order], *others, **named)), y[:, order]):
            return "its tokens know their places (relative positions or windows), so they cannot be merged"
        return Anatomy(
            next(iter(inspect.signature(block.forward).parameters)),
            _mask(copied, x, y, named),
            _norm(copied, x, others, named),
        )


def reduced_blocks(model: nn.Module) -> dict[str, Any]:
    """The blocks of a model that run on fewer tokens, by path, each with its token reduction."""
    return {n: m.token_reduction for n, m in model.named_modules() if hasattr(m, "token_reduction")}


def check_blocks(model: nn.Module, sites: Iterable[Any]) -> None:
    """Raise PlanError where blocks that shall run on fewer tokens are not there, or must not; one trial a kind."""
    modules, known = dict(model.named_modules()), {}
    for site in sites:
        if not isinstance(site, TokenSite):
            continue
        if site.path not in modules:
            raise PlanError(f"{site.name}: the model has no {site.path!r}{nearest(site.path, modules)}")
        if site.patches is not None and site.patches not in modules:
            raise PlanError(f"{site.name}: the model has no {site.patches!r}{nearest(site.patches, modules)}")
        block = modules[site.path]
        key = (structure(block), site.channels, site.front)
        if key not in known:
            known[key] = objection_or_anatomy(block, site.channels, site.front, named=_asked(block))
        if isinstance(found := known[key], str):
            raise PlanError(f"{site.name}: {found} (tried with {site.front} + 9 tokens of {site.channels} channels)")
        for what in ("stream", "mask", "norm"):
            said, there = getattr(site, what), getattr(found, what)
            if said not in (None, there):
                raise PlanError(f"{site.name}: the plan says {what} {said!r}, the block has {there!r}")


def _asked(block: nn.Module) -> dict[str, None]:
    """None for everything that a block must be given beside its tokens, as CLIP's mask of attention."""
    others = list(inspect.signature(block.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in others if p.default is p.empty and p.kind in kinds}


def _first(said: Any) -> Tensor:
    return said[0] if isinstance(said, tuple) else said


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()))


def _mask(block: nn.Module, x: Tensor, y: Tensor, named: Mapping[str, Any]) -> str | None:
    """The argument by which a block takes an additive mask: −∞ on a token hides it from the others."""
    names = list(inspect.signature(block.forward).parameters)
    for name in (n for n in MASKS if n in names):
        mask = torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype)
        mask[..., -1] = -1e9
        try:
            masked = _first(block(x, **{**named, name: mask}))
            without = _first(block(x[:, :-1], **named))
            zero = _first(block(x, **{**named, name: mask * 0}))
        except _FAILURES:
            continue
        if _close(masked[:, :-1], without) and _close(zero, y):
            return name
    return None


def _norm(block: nn.Module, x: Tensor, others: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """The child that is given the block's tokens as they come and only scales and shifts each: its norm."""
    found: list[str] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args and args[0] is x and isinstance(output, Tensor) and output.shape == x.shape:
                found.append(name)

        return hook

    hooks = [
        m.register_forward_hook(keep(n)) for n, m in block.named_modules() if n and "norm" in type(m).__name__.lower()
    ]
    try:
        block(x, *others, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None

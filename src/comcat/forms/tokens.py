"""A block that runs on fewer tokens: those that look alike merged, neighbours merged, or some of them alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import PlanError
from ..modules.lowrank import LowRankAttention
from ..modules.merging import ChosenTokens, GridTokens, SimilarTokens, TokenReduction, fewer_tokens
from ..plan import SitePlan
from ..sites import TokenSite, Undo, part
from ..tokens import Windows
from .protocol import Flow, Material, Planned

_KEYS = {"prefix", "suffix", "channels", "stream", "residual"}
_MORE: Mapping[str, frozenset[str]] = {
    "similar": frozenset({"mask", "norm"}),
    "grid": frozenset({"window", "grid", "patches"}),
    "drop": frozenset({"by", "query", "key", "heads", "scale", "norm"}),
}


def token_entry(site: TokenSite, form: str, keep: int, *, residual: bool = True, **more: Any) -> SitePlan:
    """A site's entry in a plan, with all that the form needs to know of the block."""
    told: dict[str, Any] = {"prefix": site.prefix, "channels": site.channels, "stream": site.stream}
    if site.suffix:
        told["suffix"] = site.suffix
    if not residual:
        told["residual"] = False
    if form == "similar":
        told |= {"mask": site.mask}
    elif form == "grid":
        told |= {"grid": None if site.grid is None else list(site.grid), "patches": site.patches}
    else:
        told |= {"norm": site.norm}
    told |= more
    return SitePlan(
        form=form, keep=keep, full=site.full, details={"tokens": {k: v for k, v in told.items() if v is not None}}
    )


def grid_entry(site: TokenSite, window: tuple[int, int], *, residual: bool = True) -> SitePlan:
    """Windows of neighbours as an entry. Raises PlanError where the site's grid is not known."""
    if site.grid is None:
        raise PlanError(f"{site.name}: the grid of its tokens is not known, so neighbours cannot be merged")
    keep = Windows(site.grid, window).count
    return token_entry(site, "grid", keep, residual=residual, window=list(window))


def site_of_entry(name: str, entry: SitePlan) -> TokenSite:
    """The token site that an entry of a plan is about, from what the entry says. Raises PlanError where it says too
    little.
    """
    told = entry.details.get("tokens")
    if not isinstance(told, Mapping) or not {"prefix", "channels", "stream"} <= set(told):
        raise PlanError(f"{name}: form {entry.form!r} needs 'tokens' with prefix, channels and stream, got {told!r}")
    for key, least in (("prefix", 0), ("channels", 1)):
        if not isinstance(told[key], int) or isinstance(told[key], bool) or told[key] < least:
            raise PlanError(f"{name}: got {key} {told[key]!r}, expected a whole number from {least}")
    suffix = told.get("suffix", 0)
    if not isinstance(suffix, int) or isinstance(suffix, bool) or not 0 <= suffix <= told["prefix"]:
        raise PlanError(f"{name}: got suffix {suffix!r}, expected a whole number from 0 to prefix, {told['prefix']}")
    grid = told.get("grid")
    return TokenSite(
        name, name.removesuffix(":tokens"), entry.full, told["prefix"], told["channels"],
        grid=None if grid is None else (grid[0], grid[1]), patches=told.get("patches"), stream=told["stream"],
        mask=told.get("mask"), norm=told.get("norm"), suffix=suffix,
    )  # fmt: skip


class Tokens:
    """See :class:`comcat.forms.protocol.Form`."""

    kinds = frozenset({"tokens"})

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, planned: Planned) -> None:
        site, entry = planned.site, planned.entry
        told = entry.details.get("tokens", {})
        site_of_entry(site.name, entry)
        known = _KEYS | _MORE[self.name]
        if unknown := next((key for key in told if key not in known), None):
            raise PlanError(f"{site.name}: got {unknown!r} of tokens, expected {', '.join(sorted(known))}")
        if (told["prefix"], told["channels"]) != (site.prefix, site.channels):
            raise PlanError(
                f"{site.name}: the plan was made for {told['prefix']} tokens in front and {told['channels']} channels, "
                f"the model has {site.prefix} and {site.channels}"
            )
        if self.name == "grid":
            _check_grid(site.name, entry, told)

    def parameters(self, site: TokenSite, entry: SitePlan) -> float:
        return 0.0

    def macs(self, site: TokenSite, entry: SitePlan, flow: Flow) -> float:
        """Of finding look-alikes: half the tokens compared with the other half, once for every halving."""
        if self.name != "similar":
            return 0.0
        tokens, macs = site.full, 0.0
        while tokens > entry.keep:
            macs += (tokens // 2) * (tokens - tokens // 2) * site.channels
            tokens = max(entry.keep, tokens - tokens // 2)
        return macs

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        site, entry = planned[0].site, planned[0].entry
        _check_front(model, site, entry.details["tokens"])
        block = part(model, site.path)
        base, told = type(block), dict(entry.details["tokens"])
        reduction = _BUILDERS[self.name](block, site, entry, told).train(block.training)
        watch = None
        if isinstance(reduction, GridTokens) and told.get("patches"):
            watch = reduction.watch(part(model, told["patches"]))
        block.token_reduction = reduction
        block.__class__ = fewer_tokens(base)

        def undo() -> None:
            block.__class__ = base
            del block.token_reduction
            if watch is not None:
                watch.remove()

        return undo


def _check_front(model: nn.Module, site: TokenSite, told: Mapping[str, Any]) -> None:
    """A plan for fewer class tokens and registers than the model says it has would merge them with the picture's."""
    front, path = told["prefix"] - told.get("suffix", 0), site.path
    while path:
        path = path.rpartition(".")[0]
        stated = _stated_front(part(model, path))  # "": the model itself
        if stated is not None and stated > front:
            raise PlanError(
                f"{site.name}: the plan was made for {front} tokens in front of the picture's, the model has {stated}"
            )


def _stated_front(module: nn.Module) -> int | None:
    """How many tokens a module says it puts in front: as timm says it, or as a config of transformers does."""
    registers = getattr(getattr(module, "config", None), "num_register_tokens", None)
    stated = getattr(module, "num_prefix_tokens", None if registers is None else 1 + registers)
    return stated if isinstance(stated, int) else None


def _check_grid(name: str, entry: SitePlan, told: Mapping[str, Any]) -> None:
    for key in ("grid", "window"):
        value = told.get(key)
        if not (
            isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)
        ):
            raise PlanError(f"{name}: got {key} {value!r}, expected rows and columns")
    if told["grid"][0] * told["grid"][1] != entry.full:
        raise PlanError(f"{name}: got a grid of {told['grid'][0]} × {told['grid'][1]} for {entry.full} tokens")
    count = Windows(tuple(told["grid"]), tuple(told["window"])).count
    if count != entry.keep:
        raise PlanError(f"{name}: got keep {entry.keep}, but windows of {told['window']} leave {count}")


def _similar(block: nn.Module, site: TokenSite, entry: SitePlan, told: Mapping[str, Any]) -> TokenReduction:
    return SimilarTokens(
        **_common(block, entry, told), residual=told.get("residual", True), mask=told.get("mask"),
        norm=told.get("norm"),
    )  # fmt: skip


def _grid(block: nn.Module, site: TokenSite, entry: SitePlan, told: Mapping[str, Any]) -> TokenReduction:
    return GridTokens(
        **_common(block, entry, told),
        residual=told.get("residual", True),
        window=tuple(told["window"]),
        grid=tuple(told["grid"]),
    )


def _drop(block: nn.Module, site: TokenSite, entry: SitePlan, told: Mapping[str, Any]) -> TokenReduction:
    common = _common(block, entry, told)
    if told.get("by", "class") == "random":
        return ChosenTokens(**common)
    for key in ("query", "key"):
        path, _, stop = told[key]
        layer = block.get_submodule(path)
        holder = block.get_submodule(path.rpartition(".")[0])
        if not isinstance(layer, nn.Linear) or layer.out_features < stop or isinstance(holder, LowRankAttention):
            raise PlanError(f"{site.name}: {path} is not the projection that it was when the plan was made")
    return ChosenTokens(
        **common, query=tuple(told["query"]), key=tuple(told["key"]), heads=told["heads"], scale=told["scale"],
        norm=told.get("norm"),
    )  # fmt: skip


def _names(block: nn.Module) -> list[str]:
    """The block's arguments behind its tokens."""
    return list(inspect.signature(block.forward).parameters)[1:]


def _common(block: nn.Module, entry: SitePlan, told: Mapping[str, Any]) -> dict[str, Any]:
    beside = {"prefix": told["prefix"], "suffix": told.get("suffix", 0)}
    return {"keep": entry.keep, "full": entry.full, **beside, "stream": told["stream"], "names": _names(block)}


_BUILDERS: Mapping[str, Callable[..., TokenReduction]] = {"similar": _similar, "grid": _grid, "drop": _drop}

"""Putting adapters into a pipeline and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from ...errors import ModelError, SettingsError, UnsupportedSite, listed, nearest
from ...grad_mode import outside_inference_mode
from ...modules.adapters import ExtraChannels, Init, LowRankTerms
from ...settings import expect_one_of
from ..pipeline.components import Component, components_of, denoiser_of, text_encoders_of
from ..pipeline.offloading import check_newcomers
from .find import narrowed
from .guard import refresh_guard
from .hosts import AdaptableAttention, RefusedAttention, host_of
from .places import Place, find_places, place_at
from .records import Adapter, Record, adapters, check_unfused, check_whole, forget, located, records, remember, strays
from .tokenizers import refresh_tokens

LARGEST_ALPHA = 1e6
"""Of an adapter: the terms are multiplied by alpha / rank, and what is so large is a mistake, or a damaged file."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What factors are held in, and computed with."""
WhereToAttach = Literal["cross", "self", "all", "joint"]


@outside_inference_mode
def attach(
    target: Any,
    *,
    rank: int = 2,
    where: WhereToAttach | None = None,
    only: str | Sequence[str] = (),
    text_encoder: bool = False,
    name: str = "default",
    init: Init = "zero",
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Adapter:
    """Add trainable low-rank terms to the products of frozen attention (Xiao et al. 2023, Eq. 8).

    Args:
        target: a diffusers pipeline, or its unet or transformer alone. Its own weights are left as they are,
            ``requires_grad`` included.
        rank: extra channels of each head.
        where: ``"cross"`` (from picture to text, as in the paper), ``"self"``, ``"all"``, or ``"joint"`` where text and
            picture share one attention (SD 3, Flux, Qwen-Image …). Left out, where the picture meets the text: cross or
            joint.
        only: what of that attention, by product (``"vo"``), path prefix (``"transformer_blocks.3"``), or both
            (``"transformer_blocks:vo"``); all of it by default.
        text_encoder: the pipeline's CLIP text encoders as well.
        name: what the adapter is called in this pipeline.
        init: ``"zero"``: it changes nothing until it is trained; ``"random"``: as in the paper.
        alpha: the terms are multiplied by ``alpha / rank``; the rank if not given.
        dtype: of the factors, whatever the model's own is. seed: of their random values.

    Returns:
        The adapter, whose parameters are to be trained. They are part of the model: they move with it, and
        ``requires_grad_(False)`` on the model freezes them as well. For ``save_pretrained`` unload first.

    Raises:
        ModelError: if ``target`` is nothing that can be adapted. UnsupportedSite: if it has no attention of that kind,
            or something else computes it. SettingsError: if a setting is out of range or the name is taken. In either
            case nothing has changed.
    """
    _check_settings(rank, where, init, alpha)
    if dtype is not None:
        check_dtype(dtype)
    check_new(target, name)
    where = where or default_where(target)
    chosen = narrowed(_choose(denoiser_of(target), where), only)
    if text_encoder:
        chosen += _choose_text(target)
    widest = max(width for found in chosen for width in found.widths.values())
    if rank > widest:
        raise SettingsError(f"got rank {rank}, expected at most {widest}, the width of what it reads")
    generator = torch.Generator().manual_seed(seed)
    components = components_of(target)
    terms: dict[str, LowRankTerms] = {}
    for found in chosen:
        device = place_at(components, found.path).device
        one = LowRankTerms(found.widths, found.heads, rank, alpha=alpha, device=device, dtype=dtype)
        one.reset(init, generator)
        terms[found.path] = one
    return install(target, name, terms, Record(paths=tuple(terms)))


def default_where(target: Any) -> WhereToAttach:
    """The kind of attention in which pictures meet the text: cross in a UNet, joint in a transformer of SD3 or Flux.

    Raises as :func:`attach`.
    """
    found, refused = find_places(denoiser_of(target))
    kinds = {a.where for a in (*found, *refused)}
    return "joint" if "joint" in kinds and "cross" not in kinds else "cross"


@outside_inference_mode
def unload(target: Any, name: str | None = None) -> None:
    """Take an adapter out of a pipeline, or all of them. With the last one the model's own processors come back:
    outputs are bit for bit as before. What acts in a text encoder goes as well where the denoiser that came with it has
    been exchanged since.

    Raises:
        SettingsError: if there is no adapter of that name, adapters are fused into the weights, or ``target`` is but
            one model of several that the adapter acts in.
    """
    held, left_behind = records(target), strays(target)
    if name is not None and name not in held and name not in left_behind:
        raise SettingsError(unknown(name, {**held, **left_behind}))
    chosen = [*held, *left_behind] if name is None else [name]
    for one in chosen:
        if one in held:
            check_whole(target, one, held[one])
        elif any(place.fused is not None for place in left_behind[one]):
            raise SettingsError(f"adapter {one!r} is fused into the weights; put the old denoiser back and unfuse()")
    check_unfused(target)
    components = components_of(target)
    for one in chosen:
        for place in located(components, held[one]) if one in held else left_behind[one]:
            _remove(place, one)
        if one in held:
            forget(target, one)
    for component in components.values():
        if (host := host_of(component.model)) is not None:
            host.sweep(component.model)
    refresh_tokens(target)
    refresh_guard(target)


def install(target: Any, name: str, terms: Mapping[str, LowRankTerms], record: Record) -> Adapter:
    """Put terms that are complete and fit into their places. Nothing in here can fail for a reason of the user's."""
    components = components_of(target)
    for place in located(components, record):
        channels = place.mounted
        if channels is None:
            channels = ExtraChannels()
            place.mount(channels)
        channels.add(name, terms[place.path])
        place.refresh()
    remember(target, name, record)
    refresh_tokens(target)
    refresh_guard(target)
    return adapters(target)[name]


def _remove(place: Place, name: str) -> None:
    channels = place.mounted
    if channels is None or channels.named(name) is None:
        return
    channels.remove(name)
    if channels.names:
        place.refresh()
    else:
        place.unmount()


def check_new(target: Any, name: str) -> None:
    """Raise SettingsError unless a new adapter of this name may come now, ModelError where one that is there has been
    displaced, and where offloading would leave it out.
    """
    if not isinstance(name, str) or not name.strip():
        raise SettingsError(f"got {name!r} as an adapter's name, expected a word")
    if name in adapters(target):
        raise SettingsError(
            f"there is an adapter called {name!r} already; name this one otherwise, or unload(…, {name!r}) first"
        )
    check_unfused(target)
    for component in components_of(target).values():
        check_newcomers(component.name, component.model)


def check_dtype(dtype: object) -> None:
    """Raise SettingsError unless factors can be held, and computed with, in this dtype."""
    if dtype not in DTYPES:
        raise SettingsError(f"got dtype {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")


def bad_alpha(alpha: float) -> str | None:
    """What is wrong with an ``alpha``, or None."""
    fits = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha <= LARGEST_ALPHA
    return None if fits else f"got {alpha}, expected a number above 0 and up to {LARGEST_ALPHA:g}"


def unknown(name: str, held: Mapping[str, Any]) -> str:
    """That there is no adapter of a name, and which there are."""
    there = f"there are {', '.join(map(repr, held))}" if held else "there are none"
    return f"there is no adapter called {name!r}{nearest(name, held) or f'; {there}'}"


def refusal(refused: list[RefusedAttention], model: object) -> UnsupportedSite:
    """The error that says which attention cannot carry terms, and why."""
    return UnsupportedSite(f"{type(model).__name__} cannot be adapted: {listed([str(r) for r in refused])}")


def _check_settings(rank: int, where: str | None, init: str, alpha: float | None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SettingsError(f"got rank {rank!r}, expected a whole number from 1")
    if where is not None:
        expect_one_of("where", where, get_args(WhereToAttach))
    expect_one_of("init", init, get_args(Init))
    if alpha is not None and (why := bad_alpha(alpha)) is not None:
        raise SettingsError(f"alpha: {why}")


def _choose(component: Component, where: str) -> list[AdaptableAttention]:
    found, refused = find_places(component)
    if wanted := [r for r in refused if where in ("all", r.where) or not found]:
        raise refusal(wanted, component.model)
    chosen = [a for a in found if where in ("all", a.where)]
    if not chosen:
        kinds = sorted({a.where for a in found})
        has = f"its attention is {' and '.join(kinds)}: where={kinds[0]!r}" if kinds else "it has none that is known"
        raise UnsupportedSite(f"{type(component.model).__name__} has no {where} attention; {has}")
    return chosen


def _choose_text(target: Any) -> list[AdaptableAttention]:
    chosen: list[AdaptableAttention] = []
    refused: list[RefusedAttention] = []
    encoders = text_encoders_of(target)
    for component in encoders:
        found, why_not = find_places(component)
        chosen += found
        refused += why_not
    if not encoders:
        raise ModelError(f"got a {type(target).__name__} without a text encoder, but text_encoder=True")
    if not chosen:
        raise refusal(refused, target)
    return chosen

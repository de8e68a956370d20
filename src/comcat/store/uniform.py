"""The one rank and the one width that a plan gives a model, which is what another library's config can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import StoreError
from ..plan import Plan
from ..sites import Attention, HiddenSite, ProductSite, Sites


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a plan makes of all attention and of all feed-forwards alike.

    Attributes:
        rank: of QK and VO in every attention layer; None where attention stays. attentions: these layers.
        feedforwards: the feed-forwards whose hidden units are fewer, by name. units: how many each keeps.
    """

    rank: int | None
    attentions: tuple[Attention, ...]
    feedforwards: Mapping[str, HiddenSite]
    units: Mapping[str, int]


def shape_of(plan: Plan, sites: Sites) -> Shape:
    """The shape that a plan gives a model, given all sites it had.

    Raises StoreError that says which site breaks it, and how to compress so that none does.
    """
    if not plan.sites:
        raise StoreError("no stock export: the plan shrinks nothing")
    if other := next((n for n in plan.sites if n.endswith(":tokens")), None):
        raise StoreError(
            f"no stock export: {other} is a block that runs on fewer tokens, which no config says; "
            "compress without tokens"
        )
    if other := next((n for n in plan.sites if sites[n].kind == "linear"), None):
        raise StoreError(
            f"no stock export: {other} is a linear layer at low rank, which takes two layers; "
            "compress with ranks='equal' and forms='units', or with only=('qk', 'vo', 'units')"
        )
    products = {n: s for n, s in sites.items() if isinstance(s, ProductSite)}
    ranked = any(name in products for name in plan.sites)
    rank, attentions = _one_rank(plan, sites, products) if ranked else (None, ())
    found = {n: s for n in plan.sites if isinstance(s := sites[n], HiddenSite)}
    if found:
        _check_one_width(plan, sites)
    return Shape(
        rank=rank, attentions=attentions, feedforwards=found, units={name: plan.sites[name].keep for name in found}
    )


def _one_rank(plan: Plan, sites: Sites, products: Mapping[str, ProductSite]) -> tuple[int, tuple[Attention, ...]]:
    first = next(name for name in plan.sites if name in products)
    rank = plan.sites[first].keep
    attentions: dict[str, Attention] = {}
    for name, site in products.items():
        entry = plan.sites.get(name)
        if entry is None:
            raise StoreError(
                f"no stock export: {name} stays at its full rank {site.full}; every QK and VO must have one rank"
            )
        if entry.form != "product":
            raise StoreError(f"no stock export: {name} has the form {entry.form!r}, expected 'product'")
        if entry.keep != rank:
            raise StoreError(
                f"no stock export: {name} has rank {entry.keep}, but {first} has {rank}; every QK and VO must have "
                "one rank: compress with ranks='equal'"
            )
        attentions[site.path] = site.attention
    for path in attentions:
        for kind in ("qk", "vo"):
            if f"{path}:{kind}" not in products:
                reason = next((r.reason for r in sites.refused if r.name == f"{path}:{kind}"), "it cannot shrink")
                raise StoreError(f"no stock export: {path}:{kind} keeps its width: {reason}")
    return rank, tuple(attentions.values())


def _check_one_width(plan: Plan, sites: Sites) -> None:
    """Feed-forwards that were alike must stay alike: a config has no widths by layer."""
    firsts: dict[tuple[int, int], tuple[str, int]] = {}
    for name, site in sites.items():
        if not isinstance(site, HiddenSite):
            continue
        keep = plan.sites[name].keep if name in plan.sites else site.full
        first, width = firsts.setdefault((site.full, site.in_features), (name, keep))
        if keep != width:
            raise StoreError(
                f"no stock export: {name} keeps {keep} hidden units, but {first} keeps {width}; "
                "a config knows one width for all layers: compress with ranks='equal'"
            )

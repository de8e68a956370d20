"""Ladders: for every decision, what a part of a model can become, from little to all of it.

A product or a linear layer has ranks. A feed-forward is one decision over exclusive options: fewer hidden units, both
layers at low rank, or as it stands. Sites that must have one rank (QK and VO of a layer, where asked) are one decision
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..factors import Spectrum
from ..linalg import Elimination
from ..plan import SitePlan
from ..sites import HiddenSite, Site, Sites
from .choose import Table, in_step
from .costs import Cost

Order = Literal["price", "share", "energy"]


@dataclass(frozen=True)
class Choice:
    """One option: what the sites it changes become, what that is predicted to lose, and the share of singular values
    that stays.
    """

    entries: Mapping[str, SitePlan]
    loss: float
    kept: float


@dataclass(frozen=True)
class Ladder:
    """One decision: the sites it is about, and its options, of which the last leaves them as they are.

    ``whole`` are sites that cover all of it once (a feed-forward's hidden units stand for both its layers).
    """

    name: str
    sites: Mapping[str, Site]
    whole: tuple[Site, ...]
    choices: tuple[Choice, ...]

    def table(self, cost: Cost) -> tuple[Table, tuple[Choice, ...]]:
        """The options that cost less than leaving it, and that one, rising in cost, with their numbers."""
        dense = sum(cost(site, None) for site in self.whole)
        as_it_is = {name: cost(site, None) for name, site in self.sites.items()}

        def of(choice: Choice) -> float:
            return dense + sum(cost(self.sites[n], entry) - as_it_is[n] for n, entry in choice.entries.items())

        priced = [(of(choice), choice) for choice in self.choices[:-1]]
        priced = sorted(((c, o) for c, o in priced if c < dense), key=lambda pair: (pair[0], -pair[1].loss))
        priced.append((dense, self.choices[-1]))
        costs, losses, kept = (
            np.array([f(pair) for pair in priced], dtype=float)
            for f in (lambda p: p[0], lambda p: p[1].loss, lambda p: p[1].kept)
        )
        return Table(costs, losses, kept, dense), tuple(choice for _, choice in priced)


AS_IT_IS = Choice({}, 0.0, 1.0)


def tail_loss(spectrum: Spectrum, *, relative: bool = False) -> Tensor:
    """Predicted loss of every size 0…n, (n + 1).

    Of a product ``½ Σ_{i ≥ r} σ_i²``, summed over heads; of hidden units the sum of the prices of those that go. Under
    the loss-aware statistic this is the predicted rise of the loss (nats a picture). Other statistics have no common
    unit, so there it is divided by the site's whole, ``relative``.
    """
    if isinstance(spectrum, Elimination):
        parts = spectrum.prices
    else:
        square = spectrum.singular_values.double().square()
        parts = (square.sum(0) if square.ndim > 1 else square) / 2
    tail = torch.cat([parts.flip(0).cumsum(0).flip(0), parts.new_zeros(1)])
    return tail / tail[0].clamp_min(1e-300) if relative else tail


def kept_share(spectrum: Spectrum) -> Tensor:
    """The share of the sum of singular values (over heads) that every size 0…n keeps, (n + 1).

    A hidden unit's price stands for half the square of a singular value. Where nothing ever flows one column keeps all
    there is.
    """
    if isinstance(spectrum, Elimination):
        values = (2 * spectrum.prices).sqrt()
    else:
        values = spectrum.singular_values.double()
        values = values.sum(0) if values.ndim > 1 else values
    whole = values.sum()
    shares = values.cumsum(0) / whole if whole > 0 else torch.ones_like(values)
    return torch.cat([values.new_zeros(1), shares])


def sizes_of(site: Site, multiple: int) -> Iterator[int]:
    """Multiples up to the full size; of hidden units less than that, since all of them are the site as it stands."""
    yield from range(multiple, site.full, multiple)
    if not isinstance(site, HiddenSite):
        yield site.full


def entry_of(site: Site, size: int) -> SitePlan:
    """A site at a size of its own kind: a product at a rank, or hidden units."""
    return SitePlan(form="units" if isinstance(site, HiddenSite) else "product", keep=size, full=site.full)


def searchable(sites: Sites) -> Sites:
    """Sites of which each is a decision of its own: where hidden units are among them, without the layers that make
    and read them.
    """
    layers = {path for site in sites.values() if isinstance(site, HiddenSite) for path in site.modules}
    return sites.without(layers)


def options_of(site: Site, spectrum: Spectrum, multiple: int, relative: bool) -> list[Choice]:
    """A site's own options, from small to large, without leaving it as it is."""
    tail, kept = tail_loss(spectrum, relative=relative).tolist(), kept_share(spectrum).tolist()
    return [Choice({site.name: entry_of(site, n)}, tail[n], kept[n]) for n in sizes_of(site, multiple)]


def ladders(
    sites: Sites,
    spectra: Mapping[str, Spectrum],
    cost: Cost,
    *,
    multiple: int = 1,
    relative: bool = False,
    tie: Literal["none", "layer", "all"] = "none",
    order: Order = "price",
) -> list[Ladder]:
    """One ladder a decision.

    Args:
        sites: those that may shrink. A feed-forward whose hidden units and layers are both among them is one decision.
        spectra: of every site. multiple: sizes are multiples of it, or the full rank.
        tie: sites that must have one size: QK and VO of a layer, or everything alike in the model (for stock
            checkpoints).
        order: how the ranks of a feed-forward's layers go together; see :func:`comcat.methods.choose.in_step`.
    """
    own = {name: options_of(site, spectra[name], multiple, relative) for name, site in sites.items()}
    taken = set()
    found: list[tuple[int, Ladder]] = []
    place = {name: i for i, name in enumerate(sites)}
    for name, site in sites.items():
        if isinstance(site, HiddenSite):
            layers = {path: sites[path] for path in site.modules if path in sites} if tie != "all" else {}
            taken |= {name, *site.modules} if tie == "all" else {name, *layers}
            if tie != "all":
                found.append((min(place[n] for n in (name, *layers)), _feedforward(site, layers, own, cost, order)))
    groups: dict[str, list[str]] = {}
    for name, site in sites.items():
        if isinstance(site, HiddenSite) and tie == "all":
            groups.setdefault(f"units {site.full} of {site.in_features}", []).append(name)
        elif name not in taken:
            groups.setdefault(_tied(site, tie), []).append(name)
    for names in groups.values():
        found.append((place[names[0]], _alike({n: sites[n] for n in names}, own)))
    return [ladder for _, ladder in sorted(found, key=lambda pair: pair[0])]


def covered_by(sites: Iterable[Site]) -> set[str]:
    """Names of sites that are told by some sites: themselves, and the layers of a feed-forward by its hidden units."""
    return {name for s in sites for name in (s.name, *(s.modules if isinstance(s, HiddenSite) else ()))}


def idle(sites: Sites, shrinking: Sites) -> list[Ladder]:
    """Decisions without a choice: sites that stay as they are beside those that may shrink."""
    told = covered_by(shrinking.values())
    rest = {name: site for name, site in searchable(sites).items() if told.isdisjoint(covered_by([site]))}
    return [Ladder(name, {name: site}, (site,), (AS_IT_IS,)) for name, site in rest.items()]


def _tied(site: Site, tie: Literal["none", "layer", "all"]) -> str:
    if tie == "none" or site.kind == "linear":
        return site.name
    return f"{site.path} (products)" if tie == "layer" else f"width {site.full}"


def _alike(sites: Mapping[str, Site], own: Mapping[str, list[Choice]]) -> Ladder:
    """Sites that share one size; usually just one."""
    if len(sites) == 1:
        name, site = next(iter(sites.items()))
        return Ladder(name, sites, (site,), (*own[name], AS_IT_IS))
    by_size = [{next(iter(c.entries.values())).keep: c for c in own[name]} for name in sites]
    choices = [joined([table[size] for table in by_size]) for size in by_size[0] if all(size in t for t in by_size)]
    return Ladder(" and ".join(sites), sites, tuple(sites.values()), (*choices, AS_IT_IS))


def _feedforward(
    site: HiddenSite, layers: Mapping[str, Site], own: Mapping[str, list[Choice]], cost: Cost, order: Order
) -> Ladder:
    """Hidden units, or the layers at low rank, or as it stands."""
    choices = list(own[site.name])
    if layers:
        alone = [Ladder(name, {name: layer}, (layer,), (*own[name], AS_IT_IS)) for name, layer in layers.items()]
        tables = [ladder.table(cost) for ladder in alone]
        for places in in_step([table for table, _ in tables], order):
            together = joined([options[i] for (_, options), i in zip(tables, places, strict=True)])
            if together.entries:
                choices.append(together)
    return Ladder(site.name, {site.name: site, **layers}, (site,), (*choices, AS_IT_IS))


def joined(choices: Sequence[Choice]) -> Choice:
    """Several options as one."""
    entries = {name: entry for choice in choices for name, entry in choice.entries.items()}
    return Choice(entries, sum(c.loss for c in choices), min(c.kept for c in choices))

"""Every site as a row of the report: what became of it, what that cost, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..factors import Spectrum
from ..forms import parameters_of
from ..linalg import Elimination
from ..methods.costs import Macs
from ..methods.ladders import Ladder, ladders, tail_loss
from ..methods.prepare import Prepared
from ..plan import Plan, SitePlan
from ..sites import HiddenSite, LinearSite, ProductSite, Refusal, Site, Sites, block_of
from .data import Kind, Role, SiteRow

_BY_KIND: Mapping[str, tuple[Kind, Role]] = {
    "qk": ("qk", "attention"),
    "vo": ("vo", "attention"),
    "units": ("units", "feed-forward"),
    "tokens": ("tokens", "tokens"),
}
"""Kind and role of what is refused, by what its name ends in."""
_TOKENS = ":tokens"
"""What the names of blocks that run on fewer tokens end in."""


def site_rows(plan: Plan, whole: Sites, prepared: Prepared | None = None) -> tuple[SiteRow, ...]:
    """A row for every site of a model, so that no parameter is counted twice, and one for all that was refused.

    A feed-forward is told by its hidden units, or by its layers where these came to low rank.

    Args:
        whole: all sites of the model. prepared: what the plan was made from, for what it was predicted to lose and why.
    """
    holders = {path: site for site in whole.values() if isinstance(site, HiddenSite) for path in site.modules}
    hidden, rivals = _told_by_others(plan, whole), _rivals(plan, prepared)
    rows = []
    for name, site in whole.items():
        if name in hidden:
            continue
        entry = plan.sites.get(name)
        block, role = _place(site, holders.get(name))
        macs = _macs(site, plan, prepared)
        rows.append(
            SiteRow(
                name=name, kind=site.kind, block=block, role=role, full=site.full,
                form=None if entry is None else entry.form, keep=None if entry is None else entry.keep,
                parameters_before=site.parameters(), parameters_after=round(parameters_of(site, entry)),
                macs_before=macs[0], macs_after=macs[1],
                predicted_loss=_predicted(name, entry, prepared), rival_loss=rivals.get(name),
                note=_why_it_stays(site, plan, prepared) if entry is None else "",
            )
        )  # fmt: skip
    return (*rows, *_tokens(plan), *(_refused(r) for r in whole.refused if r.name not in holders))


def _tokens(plan: Plan) -> Iterator[SiteRow]:
    """A row for every block that runs on fewer tokens. Tokens have no parameters; what they save is saved elsewhere."""
    for name, entry in plan.sites.items():
        if name.endswith(_TOKENS):
            yield SiteRow(
                name=name, kind="tokens", role="tokens", block=name.removesuffix(_TOKENS), form=entry.form,
                keep=entry.keep, full=entry.full, parameters_before=0, parameters_after=0, predicted_loss=None,
            )  # fmt: skip


def _told_by_others(plan: Plan, sites: Sites) -> set[str]:
    """Sites without a row of their own: of a feed-forward either its units or its layers."""
    left = set()
    for name, site in sites.items():
        if isinstance(site, HiddenSite):
            ranked = any(path in plan.sites for path in site.modules)
            left |= {name} if ranked else set(site.modules)
    return left


def _place(site: Site, holder: HiddenSite | None) -> tuple[str, Role]:
    """The block of a site and its role there. ``holder`` is the feed-forward that a layer belongs to."""
    if isinstance(site, ProductSite):
        return block_of(site.path), "attention"
    feedforward = site if isinstance(site, HiddenSite) else holder
    return ("", "") if feedforward is None else (block_of(feedforward.path), "feed-forward")


def _macs(site: Site, plan: Plan, prepared: Prepared | None) -> tuple[float | None, float | None]:
    """MACs of a site before and after, where these were the budget and it was seen."""
    cost = None if prepared is None else prepared.cost
    if not isinstance(cost, Macs) or site.name not in cost.flows:
        return None, None
    now = next((cost.on_fewer_tokens(s) for block, s in _shares(plan) if site.path.startswith(f"{block}.")), cost)
    return float(cost(site, None)), float(now(site, plan.sites.get(site.name)))


def _shares(plan: Plan) -> Iterator[tuple[str, float]]:
    """Blocks that run on fewer tokens, and the share of their rows that is left."""
    for name, entry in plan.sites.items():
        if name.endswith(_TOKENS):
            prefix = entry.details["tokens"]["prefix"]
            yield name.removesuffix(_TOKENS), (prefix + entry.keep) / (prefix + entry.full)


def _predicted(name: str, entry: SitePlan | None, prepared: Prepared | None) -> float | None:
    """Nats a picture; None where the statistic or the form knows no such number."""
    if prepared is None or prepared.statistic.name != "loss":
        return None
    if entry is None:
        return 0.0
    known = entry.form in ("product", "units") and name in prepared.factorizations
    return _loss_of(prepared.factorizations[name], entry) if known else None


def _loss_of(spectrum: Spectrum, entry: SitePlan) -> float:
    if entry.head_ranks is None or isinstance(spectrum, Elimination):
        return float(tail_loss(spectrum)[entry.keep])
    square = spectrum.singular_values.double().square()  # (heads, rank)
    cut = torch.arange(square.shape[1]) >= torch.tensor(entry.head_ranks)[:, None]
    return float(square.cpu()[cut].sum() / 2)


def _rivals(plan: Plan, prepared: Prepared | None) -> dict[str, float]:
    """By the first site of every feed-forward that shrank: what its other form was predicted to lose for as much."""
    if prepared is None or prepared.statistic.name != "loss":
        return {}
    found = {}
    for name, site in prepared.sites.items():
        if not isinstance(site, HiddenSite):
            continue
        known = prepared.sites.by_name.keys() & prepared.factorizations.keys()  # those of the forms that were asked for
        parts = Sites({n: prepared.sites[n] for n in (name, *site.modules) if n in known})
        entries = {n: plan.sites[n] for n in parts if n in plan.sites}
        if entries:
            ladder = ladders(parts, prepared.factorizations, prepared.cost, multiple=_multiple(plan))[0]
            least = min(_losses_of_others(ladder, entries, prepared), default=None)
            if least is not None:
                found[next(iter(entries))] = least
    return found


def _multiple(plan: Plan) -> int:
    multiple = plan.made_by.get("multiple")
    return multiple if isinstance(multiple, int) and multiple > 0 else 1


def _losses_of_others(ladder: Ladder, entries: Mapping[str, SitePlan], prepared: Prepared) -> Iterator[float]:
    """Losses of the options of another form than the entries, at no higher cost."""
    cost, units = prepared.cost, ladder.name in entries
    table, options = ladder.table(cost)
    saved = sum(cost(ladder.sites[n], None) - cost(ladder.sites[n], e) for n, e in entries.items())
    for price, loss, option in zip(table.costs, table.losses, options, strict=True):
        if option.entries and (ladder.name in option.entries) != units and price <= table.dense - saved + 1e-9:
            yield float(loss)


def _why_it_stays(site: Site, plan: Plan, prepared: Prepared | None) -> str:
    if prepared is not None and site.name in getattr(prepared.statistic, "unreached", ()):
        return "stays as it is: no calibration picture reached it"
    if plan.made_for is None:
        return "stays as it is: the plan does not name it"
    chosen, parts = plan.made_for.chosen, {site.name, *site.modules}
    if chosen is not None and not parts & set(chosen):
        if isinstance(site, LinearSite) and site.classifies:
            return "a classifier head keeps its size by default (--head lets it shrink)"
        return "stays as it is: it was not among what may shrink (--only, --forms)"
    if isinstance(site, LinearSite):
        most = f"factors cost less only up to rank {site.break_even} of {site.full}"
        return f"stays as it is: {most}, and the budget was met where less is lost"
    return "stays as it is: the budget was met where less is lost for as much"


def _refused(refusal: Refusal) -> SiteRow:
    path, _, ending = refusal.name.rpartition(":")
    kind, role = _BY_KIND.get(ending, ("linear", ""))
    return SiteRow(
        name=refusal.name, kind=kind, role=role, block=block_of(path) if role else "", form=None, keep=None, full=0,
        parameters_before=0, parameters_after=0, predicted_loss=None, note=refusal.reason,
    )  # fmt: skip

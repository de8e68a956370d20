"""What a plan saves of any cost, whatever cost it was chosen by."""

from __future__ import annotations

from collections.abc import Mapping

from ...forms import site_for
from ...plan import SitePlan
from ..costs import Cost
from ..ladders import covered_by
from ..prepare import Prepared


def saved_share(entries: Mapping[str, SitePlan], prepared: Prepared, cost: Cost, whole: float) -> float:
    """The share of a cost that entries save. What is saved where tokens become fewer is counted at those tokens."""
    shares = {}
    for name, entry in entries.items():
        site = site_for(name, entry, prepared.sites)
        if site.kind == "tokens":
            shares[site.path] = site.share(entry.keep)
    saved, covered = 0.0, set()
    for name, entry in entries.items():
        site = site_for(name, entry, prepared.sites)
        if site.kind == "tokens":
            saved -= cost(site, entry)
            continue
        share = next((s for path, s in shares.items() if site.path.startswith(f"{path}.")), 1.0)
        saved += cost(site, None) - cost.on_fewer_tokens(share)(site, entry)
        covered |= covered_by([site])
    for site in prepared.sites.values():  # what stays as it is costs less on fewer tokens as well
        share = next((s for path, s in shares.items() if site.path.startswith(f"{path}.")), 1.0)
        if share < 1.0 and covered.isdisjoint(covered_by([site])):
            covered |= covered_by([site])
            saved += cost(site, None) - cost.on_fewer_tokens(share)(site, None)
    return saved / whole

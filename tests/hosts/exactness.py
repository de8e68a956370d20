"""What must hold for attention however it is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan
from comcat.sites import Sites

from .test_apply import full_plan
from .zoo import relative_error


@torch.no_grad()
def changes_nothing_at_full_rank(model: nn.Module, images: Tensor, sites: Sites, chosen: Iterable[tuple]) -> None:
    """At full rank the output stays, for each choice of kinds, and taken back it is the same bit for bit."""
    before = model(images)
    for kinds in chosen:
        handle = apply_(model, full_plan(sites.only(*kinds)))
        assert relative_error(model(images), before) < 1e-5
        handle.revert()
        assert model(images).equal(before)


def costs_what_it_says(model: nn.Module) -> None:
    """The parameters that are left are those that the sites tell."""
    sites = find_sites(model).only("qk", "vo")

    def size() -> int:
        return sum(p.numel() for p in model.parameters())

    whole = size()
    entries = {n: SitePlan(keep=3 if s.kind == "qk" else 2, full=s.full) for n, s in sites.items()}
    apply_(model, Plan(sites=entries))
    assert size() == whole - sum(s.parameters() - s.parameters(entries[n].keep) for n, s in sites.items())

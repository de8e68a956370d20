"""A model's structure again, from its origin and its plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import PlanError, StoreError, UnknownSite, UnsupportedSite
from ..hosts import find_sites
from ..models import Origin
from ..plan import Plan, apply_
from ..sites import Sites


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A compressed structure without its weights; sites and number of parameters are those before compression."""

    model: nn.Module
    sites: Sites
    parameters: int


def rebuild(origin: Origin, plan: Plan) -> Rebuilt:
    """Build ``origin``'s architecture, in eval mode, and make of it what ``plan`` says. Random numbers are left alone.

    Raises ModelError if the architecture cannot be built, StoreError if the plan does not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        model = origin.build()
        sites = find_sites(model)
        parameters = sum(p.numel() for p in model.parameters())
        try:
            apply_(model, plan, sites=sites, weights=False)
        except (PlanError, UnknownSite, UnsupportedSite) as error:
            raise StoreError(f"the plan does not fit {origin.name}: {error}") from error
    return Rebuilt(model=model.eval(), sites=sites, parameters=parameters)

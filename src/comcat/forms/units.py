"""Fewer hidden units in a feed-forward, with what reads them refitted: plain linear layers of another width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import PlanError
from ..factors import narrow_site
from ..hosts.mounting import all_of, exchange
from ..hosts.narrowing import layer_of, narrowed
from ..plan import SitePlan
from ..sites import HiddenSite, Undo, part
from .protocol import Flow, Material, Planned, fill


class Units:
    """See :class:`comcat.forms.protocol.Form`."""

    name = "units"
    kinds = frozenset({"units"})

    def check(self, planned: Planned) -> None:
        if planned.entry.details:
            raise PlanError(f"{planned.site.name}: form 'units' takes no {', '.join(planned.entry.details)}")

    def parameters(self, site: HiddenSite, entry: SitePlan) -> float:
        return site.parameters(entry.keep)

    def macs(self, site: HiddenSite, entry: SitePlan, flow: Flow) -> float:
        return site.macs(entry.keep, flow.rows)

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        site, keep = planned[0].site, planned[0].entry.keep
        down = part(model, site.down)
        if material.fill:
            thin = narrow_site(model, site, material.spectrum(model, site), keep, material.statistic)
            kept = thin.kept.to(down.weight.device)
        else:
            thin, kept = None, torch.arange(keep, device=down.weight.device)
        layers = narrowed(model, site.ups, site.down, kept, site.between)
        # refitting may need a bias where there was none
        reader = layer_of(down, down.weight[:, :keep], down.weight.new_zeros(site.out_features))
        if thin is not None:
            fill(reader.weight, thin.out)
            fill(reader.bias, thin.out_bias)
        return all_of([exchange(model, path, layer) for path, layer in {**layers, site.down: reader}.items()])

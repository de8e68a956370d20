"""Linear layers as decomposed tensors, Tucker and tensor train: baselines (Xiao et al. 2023, Table 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import PlanError
from ..hosts.mounting import exchange
from ..modules.tensor import TENSOR_FORMS
from ..modules.tensor_shapes import check_shape, shape_macs, shape_parameters
from ..plan import SitePlan
from ..sites import LinearSite, Undo, part
from .protocol import Flow, Material, Planned


class Tensor:
    """See :class:`comcat.forms.protocol.Form`. ``details["shape"]`` says how the weight is seen, and its ranks."""

    kinds = frozenset({"linear"})

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, planned: Planned) -> None:
        site, entry = planned.site, planned.entry
        if site.over_maps:
            raise PlanError(f"{site.name}: form {self.name!r} expects a linear layer, got a convolution")
        try:
            check_shape(self.name, entry.shape, site.in_features, site.out_features)
        except PlanError as error:
            raise PlanError(f"{site.name}: {error}") from None

    def parameters(self, site: LinearSite, entry: SitePlan) -> float:
        return shape_parameters(self.name, entry.shape) + site.biases

    def macs(self, site: LinearSite, entry: SitePlan, flow: Flow) -> float:
        return flow.rows * shape_macs(self.name, entry.shape)

    def apply(self, model: nn.Module, planned: Sequence[Planned], material: Material) -> Undo:
        site, entry = planned[0].site, planned[0].entry
        made = TENSOR_FORMS[self.name](part(model, site.path), dict(entry.shape), material.fill)
        return exchange(model, site.path, made)

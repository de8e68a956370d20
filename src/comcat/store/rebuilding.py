"""A model's structure again, from its origin and its plan, and its weights put into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..apply import apply_
from ..errors import PlanError, StoreError, UnknownSite, UnsupportedSite, listed
from ..hosts import find_sites
from ..models import Origin
from ..plan import Plan
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


def unlike(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts differ in names and shapes, a phrase each."""
    found = [f"{k} is missing" for k in expected if k not in state]
    found += [f"{k} is unexpected" for k in state if k not in expected]
    pairs = ((k, tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state)
    return found + [f"{k} is {got}, expected {want}" for k, got, want in pairs if got != want]


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, in the dtypes it has. Raises StoreError if it does not fit."""
    tensors = _upgraded(model, tensors)
    if found := unlike(tensors, model.state_dict()):
        raise StoreError(f"the weights do not fit: {listed(found)}")
    floating = Counter[torch.dtype]()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            floating[tensor.dtype] += tensor.numel()
    if floating:
        model.to(floating.most_common(1)[0][0])  # buffers that are not in the file go with the rest
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            if own.dtype != tensors[name].dtype:
                own.data = own.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors), strict=True)


def _upgraded(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that our modules have today; each knows what it was called before."""
    state = dict(tensors)
    for path, module in model.named_modules():
        if getattr(module, "comcat_module", False) and hasattr(module, "upgrade_state_dict"):
            module.upgrade_state_dict(state, f"{path}." if path else "")  # type: ignore[operator]
    return state

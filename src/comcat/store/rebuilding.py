"""A model's structure again, from its origin and its plan, and its weights put into it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..apply import Handle, apply_
from ..errors import ModelError, PlanError, StoreError, UnknownSite, UnsupportedSite, listed
from ..hosts import find_sites
from ..models import Origin, origin_of
from ..models.bounded import at_most, check_arguments, check_room
from ..models.origins import OWN, own_origin
from ..plan import Plan
from ..record import Record
from ..sites import Sites

_log = logging.getLogger(__name__)

INTO = "load it by comcat.load(folder, into=model), where model is a new one as it was before compression"


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A compressed structure without its weights; sites and number of parameters are those before compression."""

    model: nn.Module
    sites: Sites
    parameters: int


def rebuild(origin: Origin, plan: Plan, *, parameters: int | None = None) -> Rebuilt:
    """Build ``origin``'s architecture, in eval mode, and make of it what ``plan`` says. Random numbers are left alone.

    parameters: how many the architecture is said to have, where a file says it: one that is far larger is not built.

    Raises ModelError if the architecture cannot be built, StoreError if the plan does not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        model = origin.build() if parameters is None else built_within(origin, parameters)
        sites = find_sites(model)
        whole = sum(p.numel() for p in model.parameters())
        try:
            apply_(model, plan, sites=sites, weights=False)
        except (PlanError, UnknownSite, UnsupportedSite) as error:
            raise StoreError(f"the plan does not fit {origin.name}: {error}") from error
    return Rebuilt(model=model.eval(), sites=sites, parameters=whole)


def built_within(origin: Origin, parameters: int) -> nn.Module:
    """``origin``'s architecture, unless it is far larger than so many parameters, or these than this machine's memory.

    Raises ModelError, before memory is taken.
    """
    check_room(parameters)
    check_arguments(origin.arguments)
    with at_most(parameters):
        return origin.build()


def outlined(origin: Origin, plan: Plan) -> Rebuilt:
    """As :func:`rebuild` for a plan that changes nothing, but without values and sites. Raises ModelError as well."""
    assert not plan.sites, "what a plan makes of a model is told by its sites"
    model = origin.outline()
    return Rebuilt(model=model, sites=Sites({}), parameters=sum(p.numel() for p in model.parameters()))


def rebuild_into(model: nn.Module, plan: Plan) -> Handle:
    """Make of a model that was built elsewhere what ``plan`` says, in place; on an error it stays as it was.

    Raises StoreError if the plan does not fit it.
    """
    try:
        return apply_(model, plan, weights=False)
    except (PlanError, UnknownSite, UnsupportedSite) as error:
        raise StoreError(f"the plan does not fit this {type(model).__name__}: {error}") from error


def structure_of(
    model: nn.Module,
    given: Origin | None,
    record: Record,
    build: Callable[[Origin, Plan], Rebuilt] = rebuild,
) -> tuple[Origin, Rebuilt | None]:
    """The origin from which ``record``'s plan makes a structure that holds the model's weights, and that structure.

    Where nothing that can be built is like the model, its origin is its class alone, without a structure.
    """
    noted = None if record.origin is None else Origin.from_dict(record.origin)
    found: list[str] = []
    for candidate in [given] if given is not None else _candidates(model, noted, record.plan, found):
        try:
            rebuilt = build(candidate, record.plan)
        except (StoreError, ModelError) as error:
            found.append(str(error))
            continue
        phrases = unlike(model.state_dict(), rebuilt.model.state_dict())
        if not phrases:
            return candidate, rebuilt
        found += phrases
    if given is not None:
        raise StoreError(
            f"this {type(model).__name__} is not what its plan makes of {given.name}, "
            f"so it could not be loaded again: {listed(found)}"
        )
    _check_applied(model, record.plan)
    origin = own_origin(model)
    _log.warning("comcat cannot build a %s by itself (%s): %s", origin.name, listed(found[:1]), INTO)
    return origin, None


def _candidates(model: nn.Module, noted: Origin | None, plan: Plan, found: list[str]) -> Iterator[Origin]:
    """Origins that may be the model's. Why one cannot be told is added to ``found``.

    What is known of it is brought up to date with the model's classes and picture size.
    """
    try:
        yield origin_of(model, changed=[name.partition(":")[0] for name in plan.sites], noted=noted)
    except ModelError as error:
        found.append(str(error))
    if noted is not None and noted.library != OWN:
        yield noted


def _check_applied(model: nn.Module, plan: Plan) -> None:
    """Raise where a model still is what it was before its plan."""
    try:
        sites = find_sites(model)
    except ModelError:  # nothing is left that could shrink
        return
    for name, entry in plan.sites.items():
        if name in sites and entry.keep < entry.full == sites[name].full:
            raise StoreError(
                f"this {type(model).__name__} is not what its plan makes of it: {name} stands as it was before. "
                "A model whose compression was taken back cannot be saved as compressed"
            )


def unlike(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts differ in names, shapes and kinds of numbers, a phrase each."""
    found = [f"{k} is missing" for k in expected if k not in state]
    found += [f"{k} is unexpected" for k in state if k not in expected]
    both = ((k, state[k], v) for k, v in expected.items() if k in state)
    kinds = [(k, got, want) for k, got, want in both if got.is_floating_point() != want.is_floating_point()]
    found += [f"{k} is {got.dtype}, expected {want.dtype}" for k, got, want in kinds]
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

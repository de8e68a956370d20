"""What a model must not be for its weights to be read and replaced, and the way out where it is.

Other libraries wrap layers, move weights away, quantise them or compute them from others at every call. All of that
shows in what a module holds. It is said with the layer's path before anything is tried on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ModelError

_COMPUTED = {
    ("orig", "mask"): ("pruned", "torch.nn.utils.prune.remove(layer, {name!r})"),
    ("g", "v"): ("weight-normed", "torch.nn.utils.remove_weight_norm(layer)"),
    ("orig", "u"): ("spectral-normed", "torch.nn.utils.remove_spectral_norm(layer)"),
}
"""What torch calls the tensors that a weight is computed from, and what makes it an ordinary one."""

_PLACED = "is placed by accelerate's hooks: call accelerate.hooks.remove_hook_from_submodules(model) first"
_ADAPTED = "carries an adapter of PEFT: merge it first, model = model.merge_and_unload()"
_DETACH = "detach it, or set it to None"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_ordinary(model: nn.Module) -> None:
    """Raise ModelError where a module's weights are not its own to read: the message says which, and what to do."""
    for path, module in model.named_modules():
        for reason in _extraordinary(module):
            raise ModelError(f"{path or type(module).__name__} {reason}")


def check_storable(model: nn.Module, replaced: Iterable[str] = ()) -> None:
    """Raise ModelError where a state dict would not hold the model: the message says which module, and what to do.

    Args:
        replaced: paths of what a plan replaces or names. Weights that are computed from others come back elsewhere, in
            a model made alike; there they cannot, since a plan is carried out on ordinary layers.
    """
    within = tuple(f"{path}." for path in replaced)
    for path, module in model.named_modules():
        for reason in _not_storable(module, computed=f"{path}.".startswith(within)):
            raise ModelError(f"{path or type(module).__name__} {reason}")


def _not_storable(module: Any, *, computed: bool) -> Iterator[str]:
    if _adapted(module):
        yield _ADAPTED
    if _quantised(module):
        yield "is quantised: save the model before that, and quantise what comcat.load gives"
    for name, value in module._parameters.items():
        if value is None:
            continue
        if value.is_meta and hasattr(module, "_hf_hook"):
            yield _PLACED
        elif value.is_meta or nn.parameter.is_lazy(value):
            yield from _unusual(name, value)
        elif hasattr(value, "__tensor_flatten__"):
            kind = type(value).__name__
            yield f"has a {kind} for its {name}, expected an ordinary parameter: save first, then quantise or shard"
    if computed:
        yield from (reason for name in list(vars(module)) for reason in _computed(module, name))
        if parametrize.is_parametrized(module):
            name, way = _parametrised(module)
            yield f"has a {name} that is computed from others at every call: {way}"


def not_replaceable(layer: nn.Linear) -> str | None:
    """Why one linear layer must stay as it is while the others shrink, or None."""
    if parametrize.is_parametrized(layer):
        name, way = _parametrised(layer)
        return f"its {name} is computed from others at every call: {way}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}, expected floating point of 16 bits or more"
    return None


def _extraordinary(module: Any) -> Iterator[str]:
    if isinstance(module, torch.jit.ScriptModule):
        yield "is compiled by TorchScript: take the model that it was made from"
    if hasattr(module, "_hf_hook"):
        yield _PLACED
    if _adapted(module):
        yield _ADAPTED
    if _quantised(module):
        yield "is quantised: compress the model first, then quantise what comes out"
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield from _computed(module, name)
            if not value.is_leaf:
                yield f"keeps {name!r}, a tensor with a gradient history, which cannot be copied: {_DETACH}"
    for name, value in module._parameters.items():
        if value is not None:
            yield from _unusual(name, value)


def _adapted(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module) and callable(getattr(module, "merge", None))


def _quantised(module: Any) -> bool:
    return callable(getattr(type(module), "weight", None)) or hasattr(module, "weight_fake_quant")


def _parametrised(module: Any) -> tuple[str, str]:
    """What is computed from others, and the way out."""
    name = next(iter(module.parametrizations))
    return name, f"make it ordinary by torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"


def _computed(module: nn.Module, name: str) -> Iterator[str]:
    for parts, (what, way) in _COMPUTED.items():
        if all(hasattr(module, f"{name}_{part}") for part in parts):
            yield f"is {what}: make its {name} ordinary by {way.format(name=name)}"


def _unusual(name: str, value: Any) -> Iterator[str]:
    if nn.parameter.is_lazy(value):
        yield f"is lazy and has no {name} yet: call the model once on a batch"
    elif value.is_meta:
        yield f"has its {name} on the meta device, without values: load the weights first"
    elif type(value) is not nn.Parameter:
        kind = type(value).__name__
        yield f"has a {kind} for its {name}, expected an ordinary parameter: compress first, then quantise or shard"
    elif value.layout is not torch.strided:
        yield f"has a sparse {name}: make it dense first, by to_dense()"

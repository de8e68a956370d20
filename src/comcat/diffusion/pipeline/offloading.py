"""Weights that accelerate or diffusers keep elsewhere and bring to a device when they compute.

``enable_model_cpu_offload`` brings a model as a whole when it is called. ``enable_sequential_cpu_offload`` brings its
layers one by one, ``enable_group_offload`` its blocks or layers, and they leave again after their own forward. A
backward needs a layer's weights once more: autograd must hold those that it met, and gradient checkpointing keeps them
from gathering, as it brings each block anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ...errors import ModelError


def computing_device(model: nn.Module) -> torch.device:
    """The device that a model computes on, wherever its weights wait."""
    return next(_devices(model), None) or next(model.parameters()).device


def comes_in_parts(model: nn.Module) -> bool:
    """Whether weights come for a layer or a block at a time, so that the model cannot be moved."""
    return next(_groups(model), None) is not None or (
        is_offloaded(model) and any(p.is_meta for p in model.parameters())
    )


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers may bring a model's weights; a quantised one that is in place has such
    hooks too.
    """
    return next(_devices(model), None) is not None


def waits_elsewhere(model: nn.Module) -> bool:
    """Whether a model's weights are not all where it computes."""
    return comes_in_parts(model) or computing_device(model).type != next(model.parameters()).device.type


def check_offloading(name: str, model: nn.Module) -> None:
    """Raises ModelError for a model on several devices, for one whose blocks are fetched ahead, and for a VAE whose
    statistics are read from where files leave nothing.
    """
    devices = {(device.type, device.index or 0): str(device) for device in _devices(model)}
    if len(devices) > 1:
        raise ModelError(
            f"the {name} is spread over {', '.join(devices.values())}, expected one device: load the pipeline without "
            "device_map"
        )
    if any(group.config.stream is not None for group in _groups(model)):
        raise ModelError(
            f"the {name} fetches its blocks ahead in the order of the forward (group offloading with use_stream), and "
            "gradients need them in the reverse order: enable_group_offload(…) without use_stream"
        )
    if hasattr(model, "bn") and any(group.config.offload_to_disk_path is not None for group in _groups(model)):
        raise ModelError(
            f"the {name} keeps its weights in files (offload_to_disk_path), and the mean and variance of its latents "
            "are read without calling it: offload it to memory, or not at all"
        )


def check_newcomers(name: str, model: nn.Module) -> None:
    """Raises ModelError where a model that fetches its blocks ahead would meet parameters it has made no copies of."""
    blocks = (g for g in _groups(model) if g.config.stream is not None and g.config.offload_type.value == "block_level")
    if next(blocks, None) is not None:
        raise ModelError(
            f"the {name} fetches its blocks ahead (group offloading with use_stream) from copies made when that was "
            "enabled, in which a new adapter is missing: attach or load the adapter first, then enable_group_offload(…)"
        )


def cannot_recompute(model: nn.Module) -> str | None:
    """Why gradient checkpointing would meet weights that are not there, or None: it calls blocks one by one, from the
    last to the first, and in a UNet the layers in them.
    """
    for group in _groups(model):
        if group.config.offload_type.value != "block_level" or group.group.offload_leader is model:
            continue
        if len(group.group.modules) > 1:
            return "several blocks come together: num_blocks_per_group=1"
        if any(hasattr(m, "gradient_checkpointing") for one in group.group.modules for m in one.modules()):
            return "a block's weights come when that is called, and its layers are called: offload_type='leaf_level'"
    return None


def kept_for_gradients() -> Any:
    """A context in which autograd holds the values that a layer computed with, not the parameter that had them:
    offloading exchanges what is behind a parameter after its layer's forward.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda held: held)


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """Gradient checkpointing of a block whose weights come and go. What torch recomputes without reentrance would hold
    frozen parameters, not their values. The anchor lets gradients pass where no input has any.
    """

    def run(anchor: Tensor, *given: Any) -> Any:
        with kept_for_gradients():
            return block(*given)

    learning = any(isinstance(x, Tensor) and x.requires_grad for x in (*tree_leaves(inputs), *block.parameters()))
    if not learning:
        return block(*inputs)
    return checkpoint(run, torch.empty(0, requires_grad=True), *inputs, use_reentrant=True)


def _groups(model: nn.Module) -> Iterator[Any]:
    """The hooks of diffusers' group offloading in a model."""
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
            yield hook


def _devices(model: nn.Module) -> Iterator[torch.device]:
    """Where hooks of diffusers and accelerate let a model compute."""
    for group in _groups(model):
        yield torch.device(group.config.onload_device)
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                yield torch.device(device)

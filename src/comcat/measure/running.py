"""Running somebody else's model: in evaluation mode, on whatever its forward takes, with errors that name it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ComcatError, DataError, ModelError

AUTOCAST = (torch.bfloat16, torch.float16)
"""Types that a forward may be run in under autocast."""


def unwrap(model: nn.Module) -> nn.Module:
    """The caller's own module inside ``torch.compile``'s and the data-parallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards the training flag of each of their modules is what it was."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        # train() first, parents before children: some modules drop what they cached for evaluation there.
        for module, flag in flags:
            if module.training is not flag:
                module.train(flag)
        for module, flag in flags:
            module.training = flag


def eagerly(model: nn.Module) -> AbstractContextManager:
    """Compiled parts run as they were written, for modes that look at every operation.

    Compiled code hides its operations from them, and torch 2.11 never again compiles what it once met under one.
    """
    parts = model.modules()
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def entry(model: nn.Module) -> Callable[[Tensor], Any]:
    """How to hand pictures to the model: by position, as ``pixel_values``, or to the image half of two towers."""
    inner = unwrap(model)
    if getattr(inner, "main_input_name", None) == "pixel_values":
        return lambda images: model(pixel_values=images)
    if callable(tower := getattr(inner, "get_image_features", None)):
        return lambda images: tower(pixel_values=images)
    try:
        by_keyword = "pixel_values" in inspect.signature(inner.forward).parameters
    except (TypeError, ValueError):  # a forward without a Python signature
        by_keyword = False
    return (lambda images: model(pixel_values=images)) if by_keyword else model


def tensors_in(example: Any) -> list[Tensor]:
    """All tensors of an example, however nested."""
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


def describe(example: Any) -> str:
    """Shapes, types and devices of an example's tensors, for messages."""
    texts = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors_in(example))
    return ", ".join(texts) or "no tensors"


def call(model: nn.Module, example: Any, name: str | None = None) -> Any:
    """One forward of ``example``: a tensor is pictures, a tuple positional arguments, a mapping keyword arguments."""
    try:
        if isinstance(example, Tensor):
            return entry(model)(example)
        return model(**example) if isinstance(example, Mapping) else model(*example)
    except (ComcatError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        label = type(unwrap(model)).__name__ if name is None else repr(name)
        raise ModelError(
            f"model {label} cannot run on an input of {describe(example)}: {type(error).__name__}: {error}"
        ) from error


def checked(example: Any) -> Any:
    """The example as :func:`call` takes it; raises DataError where there is no picture in it."""
    example = dict(example) if isinstance(example, Mapping) else example  # a processor's output is no dict
    if not isinstance(example, Tensor | tuple | list | dict) or not tensors_in(example):
        raise DataError(f"example: got {type(example).__name__}, expected a tensor, tuple or mapping of pictures")
    for tensor in tensors_in(example):
        if tensor.dim() and not tensor.shape[0]:
            raise DataError(f"example: got a tensor of shape {tuple(tensor.shape)}, expected at least one picture")
    return example

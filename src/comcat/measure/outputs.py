"""What a model says of pictures, whichever library it is from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ModelError, counted
from ..hosts.classes import classes_of
from .running import call, describe, unwrap

_TOLD = ("logits", "predicted_depth", "image_embeds", "pooler_output", "last_hidden_state")
"""What models of transformers call what they say, the first that is there."""


def model_output(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of pictures, as one tensor: class logits where it gives any, else features.

    ``images`` is (batch, channels, height, width); the result is (batch, classes or features). The model's mode and the
    gradients are the caller's business. Models of transformers are called with ``pixel_values=`` and give ``logits``,
    else ``predicted_depth``, ``image_embeds``, ``pooler_output``, or ``last_hidden_state`` averaged over tokens; a
    model of images and text gives its image features. A tuple or list of equal (batch, classes) tensors, as distilled
    models in training mode return for their two heads, is averaged. Plain tokens (batch, tokens, features) are averaged
    over tokens; tensors with more dimensions, as maps, are flattened to one row a picture (:func:`whole_output` gives
    them as they are).

    Raises ModelError where the model fails on these pictures or returns something else.
    """
    return as_rows(whole_output(model, images))


def as_rows(output: Tensor) -> Tensor:
    """An output (batch, …) as one row a picture; tokens are averaged."""
    if output.dim() == 3:
        return output.mean(1)
    return output.unsqueeze(1) if output.dim() == 1 else output.flatten(1)


def whole_output(model: nn.Module, images: Tensor) -> Tensor:
    """The tensor of :func:`model_output` in its own shape: (batch, classes), (batch, channels, height, width), …

    Depths (batch, height, width) of transformers are a map of one channel.
    """
    output = call(model, images)
    label = type(unwrap(model)).__name__
    if isinstance(output, Mapping):
        depth = output.get("predicted_depth")
        output = {**output, "predicted_depth": depth.unsqueeze(1)} if isinstance(depth, Tensor) else output
        keys = [key for key in _TOLD if key in output]
        said = next((output[key] for key in keys if output[key] is not None), None)
        if said is None:
            raise ModelError(
                f"model {label} returns {sorted(map(str, output))}; expected {', '.join(_TOLD[:-1])} or {_TOLD[-1]}"
            )
        output = said
    if isinstance(output, tuple | list) and output and all(isinstance(part, Tensor) for part in output):
        if len({part.shape for part in output}) == 1 and output[0].dim() == 2:
            output = torch.stack(tuple(output)).mean(0)
    if not isinstance(output, Tensor):
        inside = f" of {describe(output)}" if isinstance(output, tuple | list) else ""
        raise ModelError(
            f"model {label} returns a {type(output).__name__}{inside}; expected a tensor, a transformers output, "
            "or a tuple of equal (batch, classes) tensors"
        )
    if not output.dim() or output.shape[0] != images.shape[0]:
        raise ModelError(
            f"model {label} returns shape {tuple(output.shape)} for {counted(images.shape[0], 'picture')}; "
            "expected one row a picture"
        )
    return output


def is_classifier(model: nn.Module) -> bool:
    """Whether the model's output is class logits, of two classes at least.

    Models of transformers: an image-classification class or one with a ``classifier``, and at least two labels. Others:
    whether anything inside says how many classes there are (:func:`comcat.hosts.classes.classes_of`), so that a module
    around a classifier is one too.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if hasattr(inner, "main_input_name") and config is not None:
        head = getattr(inner, "classifier", None)
        named = any("ForImageClassification" in kind.__name__ for kind in type(inner).__mro__)
        has_head = not isinstance(head, nn.Identity) and (named or isinstance(head, nn.Module))
        return has_head and getattr(config, "num_labels", 0) > 1
    return bool(classes_of(inner))

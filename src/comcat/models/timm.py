"""Models of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, nearest
from ..files import home_path
from .failures import RANDOM_WEIGHTS, loading_failure, required
from .origins import remember_origin
from .stored import stored_in, stored_in_file, stored_on_hub


def load_timm(name: str, spec: str, pretrained: bool, dtype: torch.dtype, model_args: Mapping[str, Any]) -> nn.Module:
    """The model that ``timm.create_model`` makes of ``name``, which may start with ``hf-hub:`` or ``local-dir:``.

    Raises ModelError if timm does not know the name or has no weights for it, or if loading fails; ``spec`` is what
    the user typed.
    """
    timm = required("timm")
    local = name.startswith("local-dir:")
    if not local and not name.startswith("hf-hub:"):
        elsewhere = {"pretrained_cfg", "pretrained_cfg_overlay"} & set(model_args)  # says where the weights are
        _check_name(name, pretrained and not elsewhere)
    try:
        model = timm.create_model(name, pretrained=pretrained, **model_args)
    except Exception as error:  # timm raises anything here, from AssertionError to KeyError
        needs_hub = name.startswith("hf-hub:") or (pretrained and not local)
        raise loading_failure(spec, error, local=not needs_hub) from error
    remember_origin(model, spec, given=model_args, stored=_stored(model, name) if pretrained else None)
    return model.to(dtype)


def _stored(model: Any, name: str) -> Mapping[str, Any]:
    """How the weights that timm has loaded are stored, as far as it says where they are."""
    if name.startswith("local-dir:"):
        return stored_in(home_path(name.removeprefix("local-dir:")))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    place, repo = cfg.get("file"), cfg.get("hf_hub_id")
    if place:
        return stored_in_file(place)
    return stored_on_hub(repo) if repo else {}


def _check_name(name: str, pretrained: bool) -> None:
    timm = required("timm")
    if ":" in name or "/" in name:
        raise ModelError(
            f"timm has no architecture {name!r}, and there is no such folder; the hub's is 'timm:hf-hub:{name}'"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        names = timm.list_models()
        raise ModelError(
            f"timm has no architecture {architecture!r} among its {len(names)}{nearest(architecture, names)}"
        )
    full_names = timm.list_models(f"{architecture}.*", pretrained=True)
    tags = [n.partition(".")[2] for n in full_names]
    try:
        weights = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        known = f"expected {', '.join(tags)}" if tags else "and no others either"
        raise ModelError(f"timm has no weights {tag!r} of {architecture}, {known}{nearest(tag, tags)}") from None
    if pretrained and not (weights and weights.has_weights):
        raise ModelError(f"timm has no pretrained weights of {name}; {RANDOM_WEIGHTS}")

"""Models of transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, nearest
from .failures import NOT_BY_PRETRAINED, first_line, loading_failure, required
from .origins import remember_origin
from .stored import stored_in, stored_on_hub
from .timm import load_timm

_log = logging.getLogger(__name__)


def load_transformers(
    name: str, spec: str, pretrained: bool, dtype: torch.dtype, model_args: Mapping[str, Any]
) -> nn.Module:
    """The vision model, or the vision tower, that transformers finds at ``name``: a folder or the hub's name.

    Raises ModelError if it is not found, takes no pictures, or its weights are not all there; ``spec`` is what the
    user typed.
    """
    hub = {k: model_args[k] for k in ("revision", "cache_dir") if k in model_args}
    rest = {k: v for k, v in model_args.items() if k not in hub}
    config = _config(name, spec, hub)
    if config.model_type == "timm_wrapper" and not Path(name).is_dir():
        return load_timm(f"hf-hub:{name}", spec, pretrained, dtype, model_args)
    config, classes = _vision_classes(config, spec)
    saved_size = getattr(config, "image_size", None)
    try:
        config, extra = type(config).from_dict(config.to_dict(), return_unused_kwargs=True, **rest)
    except Exception as error:
        raise loading_failure(spec, error, local=True) from error
    for cls in classes:
        model, unfit = _make(cls, name, spec, config, pretrained, dtype, rest, {**hub, **extra})
        if not unfit:
            break
    else:
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        said = f"the weights of {spec} do not fit {cls.__name__}: {', '.join(unfit[:4])}{more}"
        raise ModelError(f"{said}; {NOT_BY_PRETRAINED}")
    preprocessor = image_processor(name, hub)
    if "image_size" in rest and rest["image_size"] != saved_size:
        preprocessor = _resized(preprocessor, rest["image_size"])
    stored = (stored_in(name) if Path(name).is_dir() else stored_on_hub(name, **hub)) if pretrained else None
    remember_origin(model, spec, preprocessor=preprocessor, stored=stored)
    return model


def _config(name: str, spec: str, hub: Mapping[str, Any]) -> Any:
    transformers = required("transformers")
    local = Path(name).is_dir()
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except Exception as error:
        found = json.loads((Path(name) / "config.json").read_text())["model_type"] if local else None
        if local and found not in transformers.CONFIG_MAPPING:
            types = list(transformers.CONFIG_MAPPING)
            raise ModelError(f"transformers has no model type {found!r}{nearest(str(found), types)}") from None
        raise loading_failure(spec, error, local=local) from error


def _vision_classes(config: Any, spec: str) -> tuple[Any, list[Any]]:
    """The config of what sees, and the classes to try for it, the likeliest first."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    def mapped(config: Any, *mappings: Any) -> list[Any]:
        found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        return [cls for cls in (f[0] if isinstance(f, tuple) else f for f in found) if _takes_pictures(cls)]

    named = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, named, None) if named else None
    if cls is not None and _takes_pictures(cls):
        return config, [cls]
    tower = getattr(config, "vision_config", None)
    generates = named.endswith(("ForConditionalGeneration", "ForCausalLM"))  # its tower cannot be had without it
    if isinstance(tower, transformers.PreTrainedConfig) and not generates and (classes := mapped(tower, MODEL_MAPPING)):
        return tower, classes
    if cls is None and (classes := mapped(config, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING)):
        return config, classes
    main_input = getattr(cls, "main_input_name", None)
    takes = f" takes {main_input!r}," if main_input else ""
    kind = named or config.model_type
    raise ModelError(
        f"{spec} is no vision model: {kind}{takes} expected one that takes 'pixel_values' of single pictures"
    )


def _takes_pictures(cls: Any) -> bool:
    modalities = getattr(cls, "input_modalities", ("image",))
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    return getattr(cls, "main_input_name", None) == "pixel_values" and "video" not in modalities


def _make(
    cls: Any, name: str, spec: str, config: Any, pretrained: bool, dtype: torch.dtype, asked: Any, extra: Any
) -> tuple[nn.Module, list[str]]:
    """The model and what of its weights the checkpoint does not have."""
    try:
        if not pretrained:
            extra = {k: v for k, v in extra.items() if k not in ("revision", "cache_dir")}
            return cls(config, **extra).to(dtype), []
        with _quiet():  # what does not fit is judged below
            model, info = cls.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **extra,
            )
    except Exception as error:
        raise loading_failure(spec, error, local=Path(name).is_dir() or not pretrained) from error
    lacking = {key: f"{key} is missing" for key in info["missing_keys"]}
    new = {key for key in lacking if "pooler" in key.split(".")}  # which many checkpoints never trained
    lacking |= {key: f"{key} is {tuple(a)}, expected {tuple(b)}" for key, a, b in info["mismatched_keys"]}
    if {"num_labels", "id2label"} & set(asked):
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        heads = {k for k in lacking if not k.startswith(f"{cls.base_model_prefix}.")}
        new |= {key for key in heads if shapes.get(key, ())[:1] == (config.num_labels,)}
    if new:
        _log.warning("%s: not in the checkpoint, so with random weights: %s", spec, ", ".join(sorted(new)))
    return model, [text for key, text in sorted(lacking.items()) if key not in new] + list(info["error_msgs"])


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


# ------------------------------------------------------------------------------------------ image processors


def image_processor(name: str, hub: Mapping[str, Any] | None = None, *, only_local: bool = False) -> dict[str, Any]:
    """The image processor's config at ``name`` (a folder, or the hub's name of a model), or ``{}`` if there is none.

    only_local: look in folders and in the hub's cache alone.
    """
    hub = dict(hub or {})
    found = _processor_file(name, hub, only_local=True)
    if not found and not only_local and not Path(name).is_dir():
        found = _processor_file(name, hub, only_local=False)
    if {"size", "image_mean", "image_std", "resample"} <= set(found) and isinstance(found["size"], dict):
        return found
    if found:  # an old file that leaves things to its class
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False, local_files_only=only_local, **hub
            )
            return json.loads(processor.to_json_string())
        except Exception as error:
            _log.info("%s: its image processor's config is incomplete: %s", name, first_line(error))
    return found


def _processor_file(name: str, hub: dict[str, Any], *, only_local: bool) -> dict[str, Any]:
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    for file in ("preprocessor_config.json", "processor_config.json") if name else ():
        try:
            path = cached_file(name, file, local_files_only=only_local, **quiet, **hub)
            found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError) as error:
            _log.info("%s: its %s cannot be read: %s", name, file, first_line(error))
            return {}
        found = found.get("image_processor", found) if isinstance(found, dict) else {}
        if isinstance(found, dict) and found:
            return found
    return {}


def _resized(preprocessor: dict[str, Any], size: Any) -> dict[str, Any]:
    """The image processor for a model made for another picture size (pixels; one side, or height and width)."""
    height = size if isinstance(size, int) else size[0]
    resized = dict(preprocessor)
    old = None
    for key in ("crop_size", "size"):  # the crop, where there is one, is what the model gets
        value = preprocessor.get(key)
        if isinstance(value, dict) and (old := old or value.get("height") or value.get("shortest_edge")):
            resized[key] = {k: round(v * height / old) for k, v in value.items()}
    return resized

"""What a model says of its input and of its classes."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelError, counted, nearest
from ..wrappers import bare
from .architecture import nominal_size
from .origins import library_of, remembered_origin
from .transformers import image_processor

if TYPE_CHECKING:
    from ..data import Pictures, Preprocess

_log = logging.getLogger(__name__)

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess_of(model: nn.Module) -> Preprocess:
    """How pictures become ``model``'s input tensors, as the model's own data config says.

    timm: its data config, at the size the model was built for. transformers: the image processor saved with it, or
    where there is none the config's picture size (or its backbone's) with ImageNet's mean and standard deviation, and a
    logged warning.

    Raises ModelError if the model is of another library, or says nothing of its picture size.
    """
    from ..data import Preprocess

    model = bare(model)
    if library_of(model) == "timm":
        return Preprocess(**_timm_settings(model))
    origin = remembered_origin(model)
    processor = origin.preprocessor if origin else {}
    processor = processor or image_processor(getattr(model.config, "_name_or_path", ""), only_local=True)
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None) or getattr(getattr(config, "backbone_config", None), "image_size", None)
    size = (size, size) if isinstance(size, int) else size and tuple(size)
    channels = getattr(config, "num_channels", 3)
    settings = processor_settings(processor, size, channels)
    if settings is not None:
        return Preprocess(**settings)
    if size is None:
        raise ModelError(f"{type(model).__name__} has neither an image processor nor a picture size: give a Preprocess")
    _log.warning(
        "%s has no image processor: taking its size %s with ImageNet's mean and standard deviation",
        type(model).__name__, "x".join(map(str, size)),
    )  # fmt: skip
    mean, std = _for_channels(_IMAGENET_MEAN, channels), _for_channels(_IMAGENET_STD, channels)
    return Preprocess(size=size, mean=mean, std=std, channels=channels)


def class_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes that ``model`` tells apart, in the order of its outputs, or None if it has none.

    Raises ModelError if the model is of neither timm nor transformers.
    """
    model = bare(model)
    if library_of(model) == "timm":
        names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
        count = getattr(model, "num_classes", None)
    else:
        names, count = getattr(model.config, "id2label", None) or {}, getattr(model.config, "num_labels", None)
    if isinstance(names, Mapping):
        by_id = {str(k): v for k, v in names.items()}  # JSON makes text of the ids
        names = [by_id.get(str(i)) for i in range(len(by_id))]
        names = () if None in names else names
    names = tuple(str(n) for n in names)
    if not names or len(names) != count or names == tuple(f"LABEL_{i}" for i in range(len(names))):
        return None
    return names


def in_classes_of(model: nn.Module, source: Pictures | str | os.PathLike[str]) -> tuple[Pictures, str | None]:
    """Pictures, or what :func:`comcat.open_pictures` takes, labelled as a model counts its classes, and what there is
    to say about it.

    Labels that have no names are the model's numbers. Classes with names are matched

    - by name where the model names its own, exactly or but for case, spaces, ``-``, ``_`` and ``/``: a folder with two
      of a model's ten classes has other places for them;
    - by WordNet's numbers (``n01440764``) where the model has the classes of an ImageNet that timm knows;
    - by place where the model names none and has as many;
    - by number where it names none and has more, and the classes are numbers among its own.

    Otherwise labels would be wrong, and are left out; so they are where there are more classes than the model has.
    Raises what :func:`comcat.open_pictures` raises.
    """
    from ..data import Pictures
    from ..data.opening import find_pictures

    opened = source if isinstance(source, Pictures) else find_pictures(source)
    pictures, note = _matched(model, opened)
    said = [f"{line}." for line in pictures.notes if opened is not source and line != note]
    return pictures, " ".join([*said, *([note] if note else [])]) or None


def _matched(model: nn.Module, pictures: Pictures) -> tuple[Pictures, str | None]:
    theirs = pictures.class_names
    if not pictures.has_labels:
        return pictures, None
    try:
        ours = class_names_of(model)
    except ModelError:
        ours = None
    count = len(ours) if ours else getattr(bare(model), "num_classes", None)
    if not isinstance(count, int) or not count:
        return pictures, None
    if theirs is None:
        largest = pictures.largest_label
        if largest is None or largest < count:
            return pictures, None
        return _unlabelled(pictures, f"has the label {largest}, the model {counted(count, 'class')}, 0 to {count - 1}")
    if len(theirs) > count:
        return _unlabelled(pictures, f"has {counted(len(theirs), 'class')}, the model {count}")
    if ours is not None:
        return _matched_by_name(pictures, theirs, ours)
    if (places := _imagenet_places(theirs, None, count)) is not None:
        return pictures.relabelled(places, None, "matched by WordNet's numbers"), None
    if len(theirs) == count:
        return pictures.relabelled(range(count), theirs, "matched by place", by_order=True), None
    numbers = [int(name) if re.fullmatch("[0-9]{1,9}", name) else count for name in theirs]
    several = f"has {counted(len(theirs), 'class')}, the model {count} without names"
    if len(set(numbers)) == len(numbers) and max(numbers) < count:
        note = f"{pictures.name} {several}: they are taken for the model's by the numbers that they are called by"
        return pictures.relabelled(numbers, None, "matched by number"), note
    return _unlabelled(
        pictures, f"{several}, so nothing says which of them {theirs[0]!r} is; the model's numbers as names would"
    )


def _matched_by_name(pictures: Pictures, theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[Pictures, str | None]:
    """Pictures matched to a model that names its classes."""
    how = "matched by name"
    if ours == theirs:
        return pictures.relabelled(range(len(ours)), ours, how), None
    counts, loose_counts = Counter(ours), Counter(map(_loosely, ours))
    ambiguous = next((name for name in theirs if counts[name] > 1), None)
    if ambiguous is not None:
        return _unlabelled(pictures, f"has the class {ambiguous!r}, which the model has twice")
    exact = {name: place for place, name in enumerate(ours)}
    loose = {key: place for name, place in exact.items() if loose_counts[key := _loosely(name)] == 1}
    places = [exact.get(name, loose.get(_loosely(name))) for name in theirs]
    found = [place for place in places if place is not None]
    if len(found) == len(theirs) and len(set(found)) == len(found):
        return pictures.relabelled(found, ours, how), None
    if (numbered := _imagenet_places(theirs, ours, len(ours))) is not None:
        return pictures.relabelled(numbered, ours, "matched by WordNet's numbers"), None
    if not found:
        way_out = (
            "; if they are the model's numbers, write class_order=number" if all(map(str.isdecimal, theirs)) else ""
        )
        return _unlabelled(
            pictures,
            f"has none of the model's classes: its own are {_some(theirs)}, the model's {_some(ours)}{way_out}",
        )
    strange = next((name for name, place in zip(theirs, places, strict=True) if place is None), None)
    if strange is None:
        twice = next(place for place in found if found.count(place) > 1)
        return _unlabelled(pictures, f"has several classes that may be the model's {ours[twice]!r}")
    return _unlabelled(
        pictures,
        f"has {counted(len(theirs), 'class')}, but the model has none called {strange!r}{nearest(strange, ours)}",
    )


def _unlabelled(pictures: Pictures, reason: str) -> tuple[Pictures, str]:
    because = f"{pictures.name} {reason}: the labels were left out, since they would be wrong"
    return pictures.without_labels(because), because


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def _loosely(name: str) -> str:
    """A name without what people and file systems write differently: case, spaces, hyphens, underscores, slashes."""
    return re.sub(r"[\s_/-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _imagenet_places(theirs: tuple[str, ...], ours: tuple[str, ...] | None, count: int) -> list[int] | None:
    """Places of classes called by their WordNet numbers among the ``count`` classes of an ImageNet, or None.

    A model that names its classes must use the names of that ImageNet for nine in ten of them.
    """
    if not all(re.fullmatch(r"n[0-9]{8}", name) for name in theirs):
        return None
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ImportError:
        return None
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    places = {name: place for place, name in enumerate(info.label_names())}
    if ours is not None:
        known = [_loosely(text.partition(",")[0]) for text in info.label_descriptions()]
        same = sum(_loosely(name.partition(",")[0]) == text for name, text in zip(ours, known, strict=True))
        if same < 0.9 * count:
            return None
    return [places[name] for name in theirs] if all(name in places for name in theirs) else None


def _for_channels(values: Any, channels: int) -> tuple[float, ...]:
    values = (values,) if isinstance(values, int | float) else tuple(values)
    return values if len(values) in (1, channels) else (sum(values) / len(values),)


def _timm_settings(model: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    return {
        "size": nominal_size(model) or tuple(config["input_size"][1:]),
        "mean": _for_channels(config["mean"], channels),
        "std": _for_channels(config["std"], channels),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "channels": channels,
    }


def processor_settings(
    processor: Mapping[str, Any], size: tuple[int, int] | None, channels: int
) -> dict[str, Any] | None:
    """The settings of a Preprocess that does what a transformers image processor's config says, or None if it says
    too little. ``size`` (height, width) is the model's own, for processors that do not resize.

    With f the processor's rescale factor, (f·p − m) / s of a pixel p in 0…255 is (p/255 − m/(255 f)) / (s/(255 f)).
    """
    from PIL.Image import Resampling

    if not processor:
        return None
    resized = _edges(processor.get("size")) if processor.get("do_resize", True) else None
    crop = _edges(processor.get("crop_size")) if processor.get("do_center_crop") else None
    target = crop or resized or size
    if target is None:
        return None
    mode, share = "center", 1.0
    if resized is not None:
        keeps_shape = "shortest_edge" in processor["size"]
        percent = processor.get("crop_pct") if keeps_shape and min(resized) < 384 and crop is None else None
        share = percent or min(min(target) / min(resized), 1.0)
        mode = "center" if keeps_shape and ("crop_pct" not in processor or percent) else "squash"
    resample = Resampling.BICUBIC if processor.get("resample") is None else processor["resample"]
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    normalised = processor.get("do_normalize", True)
    mean = processor.get("image_mean", _IMAGENET_MEAN) if normalised else (0.0,)
    std = processor.get("image_std", _IMAGENET_STD) if normalised else (1.0,)
    return {
        "size": target,
        "mean": tuple(m / scale for m in _for_channels(mean, channels)),
        "std": tuple(s / scale for s in _for_channels(std, channels)),
        "interpolation": Resampling(int(resample)).name.lower(),
        "crop_pct": share,
        "crop_mode": mode,
        "channels": channels,
    }


def _edges(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size as image processors write it; of a shortest edge, the square it stands for."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    return None

"""Where a model came from: enough plain data to build the same architecture again, without its weights."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, nearest
from ..wrappers import bare
from .architecture import changeable_arguments, differences, plain, read_arguments, tuples
from .failures import first_line, required

_log = logging.getLogger(__name__)

_ATTRIBUTE = "comcat_origin"
_CONSTRUCTOR = "constructor"
OWN = "own"
_EXPLICIT = "give it explicitly, comcat.save(..., origin=Origin(...)), or make the model with comcat.load_model"

# What timm knows about a checkpoint and that still holds when its weights have been compressed: no addresses.
_TIMM_KEPT = (
    "architecture tag input_size test_input_size min_input_size fixed_input_size interpolation crop_pct test_crop_pct "
    "crop_mode mean std num_classes label_names label_descriptions pool_size first_conv classifier license"
).split()
_TIMM_NOT_ARCHITECTURE = ("device", "dtype", "pretrained_model_args", "cache_dir", "checkpoint_path")
# For models made by calling a class of timm, which do not say their architecture: one that leaves all to arguments.
_TIMM_CLASSES = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
    "SwinTransformer": "swin_base_patch4_window7_224",
    "Beit": "beit_base_patch16_224",
    "Eva": "eva02_base_patch14_224",
}
# Facts about a file or a run, in a transformers config.
_CONFIG_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How to build an architecture again. Plain data, stored as JSON beside compressed weights.

    library: ``"timm"``, ``"transformers"``, or ``"own"`` for a model that only its user can build.
    name: timm's architecture name, the transformers class name (``"ViTForImageClassification"``), or of ``"own"`` that
        of the class with its module.
    arguments: timm: keyword arguments of ``create_model``; transformers: the whole config as a dict, and under
        ``"constructor"`` what the class takes beside its config (``{"add_pooling_layer": False}``), if anything.
    source: what the user typed (``"timm:deit_small_patch16_224"``, a folder), or ``""`` for a model made in Python.
    pretrained_cfg: timm's data config (input size, mean, interpolation, label names, ...); ``{}`` for transformers.
    preprocessor: the transformers image processor's config if known; ``{}`` otherwise.
    stored: how the source's weights are stored, where they come from safetensors: ``dtype`` (``"float16"``, that of
        most numbers), ``bytes`` of the files and ``numbers`` in them; ``{}`` otherwise.

    Raises ModelError for another library, and for values that JSON cannot hold.
    """

    library: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library not in ("timm", "transformers", OWN):
            raise ModelError(f"the origin's library is {self.library!r}, expected 'timm', 'transformers' or {OWN!r}")
        for key in ("name", "source"):
            if not isinstance(getattr(self, key), str):
                raise ModelError(f"the origin's {key} is {getattr(self, key)!r}, expected text")
        for key in ("arguments", "pretrained_cfg", "preprocessor", "stored"):
            value = getattr(self, key)
            if not isinstance(value, Mapping):
                raise ModelError(f"the origin's {key} is {value!r}, expected names and values")
            object.__setattr__(self, key, plain(value, f"the origin's {key}"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal to what JSON gives back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """The inverse of ``to_dict``. Raises ModelError for missing or unknown keys."""
        if not isinstance(data, Mapping):
            raise ModelError(f"an origin is {data!r}, expected names and values")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ModelError(f"an origin has no {key!r}, expected {', '.join(known)}{nearest(str(key), known)}")
        if missing := [key for key in ("library", "name") if key not in data]:
            raise ModelError(f"an origin lacks {' and '.join(missing)}; it has {', '.join(data) or 'nothing'}")
        return cls(**data)

    def build(self, *, device: str | torch.device = "cpu") -> nn.Module:
        """The architecture with random weights (of torch's default dtype), in eval mode on ``device``.

        Buffers that no checkpoint holds (position indices, attention masks, rotary tables) are the library's own, so
        that the old state dict, loaded strictly, gives the old model. The model remembers this origin.
        Raises ModelError if the installed library does not know the name or refuses the arguments, and for ``"own"``.
        """
        if self.library == OWN:
            raise ModelError(f"comcat cannot build a {self.name} by itself")
        model = _construct(self).eval().to(device)
        attach_origin(model, self)
        return model

    def outline(self) -> nn.Module:
        """The architecture without values, on the meta device where its constructor allows that. Raises as
        :meth:`build`."""
        return _twin(self)


def attach_origin(model: nn.Module, origin: Origin) -> None:
    """Let ``model`` remember ``origin``, as plain data that survives deepcopy and pickle.

    Done before a model's parts are replaced, it spares ``origin_of`` from guessing what they were.
    """
    setattr(model, _ATTRIBUTE, origin.to_dict())


def remembered_origin(model: nn.Module) -> Origin | None:
    """The origin attached to ``model``, as it was when attached, or None."""
    stored = getattr(model, _ATTRIBUTE, None)
    return None if stored is None else Origin.from_dict(stored)


def remember_origin(
    model: nn.Module,
    source: str,
    *,
    given: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Attach the origin of a model just made.

    ``given`` and ``source`` are as for ``verified_origin``, the others as :class:`Origin` has them.
    Where it cannot be told, nothing is attached: the model can still be used, and ``origin_of`` will say why.
    """
    try:
        origin = verified_origin(model, source=source, given=given)
    except ModelError as error:
        _log.info("%s: %s", source, error)
    else:
        attach_origin(model, replace(origin, preprocessor=dict(preprocessor or {}), stored=dict(stored or {})))


def name_of(model: nn.Module) -> str:
    """What a person calls a model: where it was loaded from, as far as it remembers that, or its class."""
    origin = remembered_origin(model)
    return type(model).__name__ if origin is None else origin.source or origin.name


def origin_of(model: nn.Module, *, changed: Collection[str] = (), noted: Origin | None = None) -> Origin:
    """How to build ``model``'s architecture again.

    A model of ``load_model`` or ``Origin.build`` remembers it. For any other model of timm or transformers it is read
    off the model and its config, then verified: the architecture is built on the meta device and compared in the
    names and shapes of its state dict, and in the class and the plain settings (head counts, window sizes, epsilons)
    of every module. What comcat has put in place or narrowed is not compared.

    changed: paths of modules that comcat narrowed, where the caller knows them.
    noted: what somebody else knew of the origin, for a model that remembers none. Number of classes and picture size
        are brought up to date.

    Raises ModelError if the model is of another library, or if nothing that can be built fits; the message says what
    differs and how to give the origin explicitly.
    """
    model = bare(model)
    origin = remembered_origin(model) or noted
    if origin is None:
        return verified_origin(model, changed=changed)
    if origin.library == "transformers":
        live = _config(model)
        names = {k: live[k] for k in ("id2label", "label2id") if k in live}  # often renamed after loading
        return replace(origin, arguments={**origin.arguments, **names})
    if origin.library != "timm":
        return origin
    live = changeable_arguments(model)
    if all(origin.arguments.get(k, v) == v for k, v in live.items()):
        return origin
    try:  # reset_classifier or set_input_size since loading
        return replace(verified_origin(model, changed=changed), source=origin.source, stored=origin.stored)
    except ModelError:  # layers were narrowed too, so that nothing is left to compare with
        return replace(origin, arguments={**origin.arguments, **live})


def own_origin(model: nn.Module) -> Origin:
    """The origin of a model that nothing can build again but its user: the name of its class."""
    cls = type(bare(model))
    return Origin(library=OWN, name=f"{cls.__module__}.{cls.__qualname__}")


def verified_origin(
    model: nn.Module, *, source: str = "", given: Mapping[str, Any] | None = None, changed: Collection[str] = ()
) -> Origin:
    """``model``'s origin, read off it and verified as ``origin_of`` says, whatever it remembers.

    given: the keyword arguments it was created with, where the caller knows them. changed: as for ``origin_of``.
    Raises ModelError as ``origin_of``.
    """
    library = library_of(model)
    candidates = _timm_candidates(model, given or {}) if library == "timm" else _transformers_candidates(model)
    best: list[str] | None = None
    for origin in candidates:
        try:
            found = differences(model, _twin(origin), config_known=library == "transformers", changed=changed)
        except ModelError as error:
            found = [str(error)]
        if not found:
            return replace(origin, source=source)
        if best is None or len(found) < len(best):
            best = found
    kind = type(model).__name__
    if best is None:
        raise ModelError(f"this {kind} does not say which architecture of timm it is; {_EXPLICIT}")
    made_with = getattr(model, "_model_args", None) or given or {}
    if hidden := sorted(k for k, v in made_with.items() if v is not None and not _is_plain(v)):
        best.insert(0, f"its argument {', '.join(hidden)} is not plain data")
    more = f"; and {len(best) - 4} more" if len(best) > 4 else ""
    raise ModelError(
        f"this {kind} cannot be built again from what it says of itself: {'; '.join(best[:4])}{more}. "
        f"If its architecture was changed by hand, {_EXPLICIT}"
    )


def library_of(model: nn.Module) -> str:
    """``"timm"`` or ``"transformers"``, by where its class is defined. Raises ModelError for other models."""
    for cls in type(model).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in ("timm", "transformers"):
            return library
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ModelError(f"{kind} is a model of neither timm nor transformers, so its origin is unknown; {_EXPLICIT}")


# ------------------------------------------------------------------------------------------------- building


def _construct(origin: Origin) -> nn.Module:
    """``origin``'s architecture on the current default device, with whatever weights its library starts from."""
    try:
        return (_construct_timm if origin.library == "timm" else _construct_transformers)(origin)
    except ModelError:
        raise
    except Exception as error:  # the libraries raise anything here, from TypeError to AssertionError
        raise ModelError(f"{origin.library} cannot build {origin.name!r}: {first_line(error)}") from error


def _construct_timm(origin: Origin) -> nn.Module:
    timm = required("timm")
    if not timm.is_model(origin.name):
        names = timm.list_models()
        raise ModelError(
            f"timm {timm.__version__} has no architecture {origin.name!r} among its {len(names)}"
            f"{nearest(origin.name, names)}"
        )
    known = {f.name for f in fields(timm.models.PretrainedCfg)}
    cfg = {k: tuples(v) for k, v in origin.pretrained_cfg.items() if k in known}
    arguments = {k: tuples(v) for k, v in origin.arguments.items()}  # by timm's convention; JSON has only lists
    return timm.create_model(origin.name, pretrained=False, pretrained_cfg=cfg or None, **arguments)


def _construct_transformers(origin: Origin) -> nn.Module:
    transformers = required("transformers")
    cls = getattr(transformers, origin.name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        names = [n for n in dir(transformers) if n[:1].isupper()]
        raise ModelError(
            f"transformers {transformers.__version__} has no model class {origin.name!r}{nearest(origin.name, names)}"
        )
    config = json.loads(json.dumps(origin.arguments))  # a copy, since from_dict may change what it is given
    constructor = config.pop(_CONSTRUCTOR, {})
    return cls(cls.config_class.from_dict(config), **constructor)


def _twin(origin: Origin) -> nn.Module:
    try:
        with torch.device("meta"):
            return _construct(origin)
    except ModelError:  # some constructors read their tensors; if the arguments are wrong, this fails again
        with torch.random.fork_rng(devices=[]):
            return _construct(origin)


# -------------------------------------------------------------------------------------------------- reading


def _config(model: Any) -> dict[str, Any]:
    """A transformers model's whole config (defaults too: they may change with the library), as plain data."""

    def cleaned(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: cleaned(v) for k, v in value.items() if k not in _CONFIG_NOT_ARCHITECTURE}

    config = cleaned(json.loads(model.config.to_json_string(use_diff=False)))
    head = getattr(model, "classifier", None)
    if isinstance(head, nn.Linear) and len(config.get("id2label") or ()) not in (0, head.out_features):
        names = {i: f"LABEL_{i}" for i in range(head.out_features)}  # exchanged by hand, so the old names do not fit
        config |= {"id2label": {str(i): n for i, n in names.items()}, "label2id": {n: i for i, n in names.items()}}
    return config


def _transformers_candidates(model: Any) -> Iterator[Origin]:
    arguments = _config(model)
    accepted = inspect.signature(type(model).__init__).parameters
    if "add_pooling_layer" in accepted and getattr(model, "pooler", ...) is None:
        arguments[_CONSTRUCTOR] = {"add_pooling_layer": False}
    origin = Origin(library="transformers", name=type(model).__name__, arguments=arguments)
    attention = getattr(model.config, "_attn_implementation", None)
    if attention in ("eager", "sdpa"):  # the others depend on the machine
        yield replace(origin, arguments={**arguments, "attn_implementation": attention})
    yield origin  # a convolutional backbone takes no implementation of attention


def _timm_candidates(model: nn.Module, given: Mapping[str, Any]) -> Iterator[Origin]:
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    cfg = cfg if isinstance(cfg, Mapping) else asdict(cfg)
    name = cfg.get("architecture") or _TIMM_CLASSES.get(type(model).__name__)
    if name is None:
        return
    kept = {k: v for k, v in cfg.items() if k in _TIMM_KEPT}
    if len(kept.get("label_names") or ()) != getattr(model, "num_classes", None):
        kept = {k: v for k, v in kept.items() if not k.startswith("label_")}  # the checkpoint's, not this model's
    made_with = getattr(model, "_model_args", None) or given
    made_with = {k: v for k, v in made_with.items() if k not in _TIMM_NOT_ARCHITECTURE and _is_plain(v)}
    made_with = plain(made_with, "arguments")
    live = changeable_arguments(model)
    tried: list[dict[str, Any]] = []
    for arguments in ({**made_with, **live}, {**made_with, **live, **read_arguments(model)}, made_with):
        if arguments not in tried:
            tried.append(arguments)
            yield Origin(library="timm", name=name, arguments=arguments, pretrained_cfg=kept)


def _is_plain(value: Any) -> bool:
    try:
        return plain(value, "") is not None  # timm takes None for an argument not given
    except ModelError:
        return False

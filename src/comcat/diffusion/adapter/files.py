"""An adapter as one safetensors file: factors under names, what else is known of it as metadata.

Keys are ``<component>.<path>.<factor>``, the component being the pipeline's own name for the model (``unet``,
``transformer``, ``text_encoder``…) and the factors those of :mod:`comcat.modules.adapters`; beside them lies each
module's ``.alpha``. Embeddings of learned tokens are ``<component>.token_embeddings.<token>``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ...errors import SettingsError, StoreError, counted, listed, printable
from ...files import HASH, home_path, parsed, read_tensors_and_metadata, write_tensors
from ...modules.adapters import CONTEXT, SIDES
from ..pipeline.components import TEXT_ENCODERS
from .attach import DTYPES, bad_alpha, check_dtype, unknown
from .records import Record, adapters, remember

FORMAT, _FIRST = "2", "1"
"""The format of files, and the one before it, which had neither hash nor heads."""
_MARK, _HEADS = "comcat_adapter", "heads"
_OWN = (_MARK, "comcat_version", "torch_version", "rank", _HEADS, "identifier", "prompt", "base", "format", HASH)
_TOKENS = "token_embeddings"
_FACTORS = tuple(prefix + name for prefix in ("", CONTEXT) for name in SIDES.values())


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, checked.

    Attributes:
        path: of the file. factors: by module (``unet.<path>``) and name. alphas: by module.
        token_embeddings: by ``component.token``, each (width,). metadata: all of it, as text; what could steer a
            terminal is shown by its number. heads: of the attention, by module; what it does not say is not there.
    """

    path: Path
    factors: Mapping[str, Mapping[str, Tensor]]
    alphas: Mapping[str, float]
    token_embeddings: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def identifier(self) -> str | None:
        """The word of a prompt that calls the concept."""
        return self.metadata.get("identifier")

    @property
    def prompt(self) -> str | None:
        return self.metadata.get("prompt")

    @property
    def base(self) -> str | None:
        """Name of the model that it was trained on."""
        return self.metadata.get("base")

    @property
    def rank(self) -> int:
        """As the file says; the most where modules differ."""
        return int(self.metadata["rank"])

    @property
    def own_metadata(self) -> dict[str, str]:
        """What whoever saved it added."""
        return {k: v for k, v in self.metadata.items() if k not in _OWN}

    @property
    def parameters(self) -> int:
        """How many numbers its factors have."""
        return sum(t.numel() for factors in self.factors.values() for t in factors.values())


def save(
    target: Any,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    dtype: torch.dtype = torch.float16,
    identifier: str | None = None,
    prompt: str | None = None,
    base: str | None = None,
    token_embeddings: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter to a file, whole or not at all. What was loaded or saved with it before is kept where it is not
    given anew. The scale that :func:`set_scale` has set is no part of it.

    Args:
        target: a pipeline, or its unet or transformer alone. path: where to; what is there is replaced. name: of the
            adapter.
        dtype: of the factors in the file.
        identifier: the word of a prompt that calls the concept. prompt: of the training pictures. base: name of the
            model, the pipeline's own if it has one.
        token_embeddings: embeddings of learned tokens, (width,) each, by token, or by ``text_encoder_2.<token>`` where
            there are several text encoders.
        metadata: anything else, as text.

    Raises:
        SettingsError: if there is no such adapter, or a setting is malformed. StoreError: if the file cannot be
            written, or a factor cannot be held in ``dtype``.
    """
    held = adapters(target)
    if name not in held:
        raise SettingsError(unknown(name, held))
    check_dtype(dtype)
    adapter = held[name]
    if gone := sorted(set(adapter.record.paths) - set(adapter.terms)):
        raise SettingsError(f"adapter {name!r} has lost {gone[0].partition('.')[0]}, which the pipeline no longer has")
    record = _updated(adapter.record, target, identifier, prompt, base, token_embeddings, metadata)
    tensors = {key: _held_in(dtype, key, value) for key, value in adapter.named_parameters().items()}
    tensors |= {f"{path}.alpha": torch.tensor(terms.alpha) for path, terms in adapter.terms.items()}
    for key, value in record.token_embeddings.items():
        component, token = key.split(".", 1)
        # as they are: a word is one row, and its direction matters
        tensors[f"{component}.{_TOKENS}.{token}"] = _held_in(value.dtype, key, value)
    known = {"identifier": record.identifier, "prompt": record.prompt, "base": record.base}
    text = {k: v for k, v in known.items() if v is not None}
    versions = {_MARK: FORMAT, "comcat_version": __version__, "torch_version": torch.__version__, "format": "pt"}
    heads = json.dumps({path: terms.heads for path, terms in adapter.terms.items()}, separators=(",", ":"))
    path = home_path(path)
    write_tensors(path, tensors, {**record.metadata, **text, **versions, "rank": str(adapter.rank), _HEADS: heads})
    remember(target, name, record)
    return path


def read(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter's file and check that it is whole. Nothing in it can run code.

    Raises:
        StoreError: if it is missing, damaged, or no adapter of comcat's; a LoRA is told as one.
    """
    path = home_path(path)
    if not path.is_file():
        raise StoreError(f"there is no adapter {str(path)!r}, expected a .safetensors file that comcat has saved")
    tensors, metadata = read_tensors_and_metadata(path)
    metadata = {printable(key): printable(value) for key, value in metadata.items()}
    _check_kind(path, metadata, tensors)
    _check_values(path, tensors)
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    words: dict[str, Tensor] = {}
    foreign: list[str] = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        module, _, last = key.rpartition(".")
        if component in TEXT_ENCODERS and rest.startswith(f"{_TOKENS}."):
            words[f"{component}.{rest.removeprefix(f'{_TOKENS}.')}"] = tensor
        elif last == "alpha" and tensor.numel() == 1:
            alphas[module] = float(tensor)
        elif last in _FACTORS and tensor.ndim == 2:
            factors.setdefault(module, {})[last] = tensor
        else:
            foreign.append(f"{printable(key)} {tuple(tensor.shape)}")
    damaged = [f"{key} is unexpected" for key in foreign]
    damaged += [f"{key} is {tuple(t.shape)}, expected one row" for key, t in words.items() if t.ndim != 1]
    damaged += [f"{module}.alpha is missing" for module in factors if module not in alphas]
    damaged += [f"{module} has an alpha, but no factors" for module in alphas if module not in factors]
    damaged += [f"{module}.alpha: {why}" for module, alpha in alphas.items() if (why := bad_alpha(alpha)) is not None]
    damaged += [f"{module}: {problem}" for module, held in factors.items() for problem in _incomplete(held)]
    if not metadata.get("rank", "").isdecimal() or len(metadata["rank"]) > 9:
        damaged.append(f"its rank is {metadata.get('rank')!r}, expected a number")
    heads = _heads_in(metadata)
    if factors and metadata[_MARK] != _FIRST and (heads is None or set(heads) != set(factors)):
        damaged.append("it does not say how many heads each attention has")
    if damaged or not factors:
        raise StoreError(f"{path} is damaged: {listed(damaged) if damaged else 'it holds no factors'}")
    return AdapterFile(path, factors, alphas, words, metadata, heads or {})


def is_adapter(path: Path) -> bool:
    """Whether a file says that it is an adapter of comcat's. Nothing else of it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _MARK in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _heads_in(metadata: Mapping[str, str]) -> dict[str, int] | None:
    """The heads by module, None if they are not told or not as they should be."""
    try:
        heads = parsed(metadata[_HEADS])
    except (KeyError, ValueError):
        return None
    fits = isinstance(heads, dict) and all(isinstance(n, int) and n > 0 for n in heads.values())
    return heads if fits else None


def _check_kind(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    if _MARK in metadata:
        if metadata[_MARK] not in (_FIRST, FORMAT):
            raise StoreError(
                f"{path} is of format {metadata[_MARK]}, expected {FORMAT}; it was written by comcat "
                f"{metadata.get('comcat_version')}"
            )
        if metadata[_MARK] != _FIRST and HASH not in metadata:
            raise StoreError(f"{path} is damaged: its hash is missing")
        return
    kinds = {
        "a LoRA": ("lora_", ".lora", "_lora"),
        "a LoKr or LoHa": ("lokr_", "hada_"),
        "Custom Diffusion's": ("custom_diffusion",),
    }
    for kind, marks in kinds.items():
        if any(mark in key for key in tensors for mark in marks):
            raise StoreError(
                f"{path} is {kind}, not an adapter of comcat's; diffusers loads those with load_lora_weights or "
                "load_attn_procs"
            )
    first = printable(", ".join(list(tensors)[:3]))
    raise StoreError(
        f"{path} is no adapter of comcat's: it holds {counted(len(tensors), 'tensor')}, {first or 'none at all'}"
    )


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{printable(key)} "
        f"{f'is {t.dtype}, expected a floating type' if t.dtype not in DTYPES else 'holds NaN or infinity'}"
        for key, t in tensors.items()
        if t.dtype not in DTYPES or not t.isfinite().all()
    ]
    if wrong:
        raise StoreError(f"{path} is damaged: {listed(wrong)}")


def _incomplete(factors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the factors of one module, whatever model it is for."""
    missing = [
        f"{one} has no {other}"
        for one, other in (("q_up", "k_down"), ("k_down", "q_up"), ("v_down", "out_up"), ("out_up", "v_down"))
        if one in factors and other not in factors
    ]
    if missing:
        return missing
    channels = {f.shape[1 if name.endswith(SIDES["out"]) else 0] for name, f in factors.items()}
    return (
        []
        if len(channels) == 1
        else [f"its factors have {' and '.join(map(str, sorted(channels)))} channels, expected one number"]
    )


def _updated(
    record: Record,
    target: Any,
    identifier: str | None,
    prompt: str | None,
    base: str | None,
    token_embeddings: Mapping[str, Tensor] | None,
    metadata: Mapping[str, str] | None,
) -> Record:
    for what, text in (("identifier", identifier), ("prompt", prompt), ("base", base)):
        if text is not None and (not isinstance(text, str) or not text.strip() or printable(text) != text):
            raise SettingsError(f"got {what} {text!r}, expected text without control characters")
    for key, value in (metadata or {}).items():
        if key in _OWN:
            raise SettingsError(f"metadata: {key!r} is comcat's own")
        if not isinstance(value, str):
            raise SettingsError(f"metadata: {key!r} is a {type(value).__name__}, expected text")
        if printable(key + value) != key + value:
            raise SettingsError(f"metadata: {key!r} holds control characters, expected text without")
    words = dict(record.token_embeddings)
    for key, value in (token_embeddings or {}).items():
        component, _, token = key.partition(".")
        named = key if component in TEXT_ENCODERS and token else f"{TEXT_ENCODERS[0]}.{key}"
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise SettingsError(f"token_embeddings: {key!r} is a {kind}, expected a tensor of a floating type")
        row = value.detach().cpu().squeeze(0) if value.ndim == 2 else value.detach().cpu()
        if row.ndim != 1 or not key.strip():
            raise SettingsError(f"token_embeddings: {key!r} is {tuple(value.shape)}, expected one row, (width,)")
        words[named] = row.clone()
    return Record(
        paths=record.paths,
        identifier=identifier or record.identifier,
        prompt=prompt or record.prompt,
        base=base or record.base or name_of(target),
        metadata={**record.metadata, **(metadata or {})},
        token_embeddings=words,
        brought_tokens=record.brought_tokens,
    )


def name_of(target: Any) -> str | None:
    """The name or folder that a pipeline or model was loaded from, if it was."""
    name = (getattr(target, "config", None) or {}).get("_name_or_path")
    return str(name) if name else None


def _held_in(dtype: torch.dtype, key: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise StoreError(f"{key} cannot be saved: it is on the meta device and has no values")
    held = value.detach().to("cpu", dtype).contiguous().clone()
    if not held.isfinite().all():
        whole = bool(value.isfinite().all())
        raise StoreError(
            f"{key} holds {f'what {dtype} cannot; choose dtype=torch.float32' if whole else 'NaN or infinity'}"
        )
    return held

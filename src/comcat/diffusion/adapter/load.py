"""Loading an adapter's file into a pipeline: everything is checked before anything changes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SettingsError, StoreError, counted, listed
from ...files import parsed
from ...grad_mode import outside_inference_mode
from ...modules.adapters import PRODUCTS, SIDES, LowRankTerms
from ..pipeline.components import components_of, denoiser_of
from .attach import DTYPES, check_new, install
from .files import AdapterFile, read
from .hosts import AdaptableAttention
from .places import Place, find_places, place_at
from .records import Adapter, Record, answering, calling
from .scale import check_scale
from .tokenizers import check_tokens


@outside_inference_mode
def load(
    target: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    scale: float = 1.0,
    rename_identifier: str | None = None,
) -> Adapter:
    """Load an adapter into a pipeline, beside those that it carries.

    Its factors come frozen and in the dtype of the weights beside them. A token that was learned with it joins the
    pipeline's tokenizer and text encoder until it is unloaded.

    Args:
        target: a pipeline, or its unet or transformer alone. path: the file. name: what it is called here, the file's
            name without its ending if not given. scale: how strongly it acts.
        rename_identifier: call the concept by this word instead; possible where its token was learned.

    Raises:
        StoreError: if the file is damaged, no adapter of comcat's, or does not fit the pipeline. SettingsError: if the
            name is taken, or another adapter answers to the same identifier. In either case nothing has changed.
    """
    file = read(path)
    name = Path(path).stem if name is None else name
    check_new(target, name)
    check_scale(scale)
    terms = fitting(target, file)
    record = _record(target, file, tuple(terms), rename_identifier)
    _warn_of_the_rest(target, file)
    check_tokens(target, record.token_embeddings)
    for one in terms.values():
        one.scale = float(scale)
        one.requires_grad_(False)
    return install(target, name, terms, record)


def _warn_of_the_rest(target: Any, file: AdapterFile) -> None:
    """Warns where a model has attention of the same kind that an adapter, though taught on all of it, knows nothing of:
    it was taught on a smaller model whose names are the same.
    """
    try:
        chosen = parsed(file.metadata["settings"])["only"]
    except (KeyError, TypeError, ValueError):  # saved without them, or by somebody else
        return
    there = [one for component in components_of(target).values() for one in find_places(component)[0]]
    kinds = {one.where for one in there if one.path in file.factors}
    rest = [one.path for one in there if one.where in kinds and one.path not in file.factors]
    if rest and not chosen:
        warnings.warn(
            f"{file.path} was taught on a model with less attention: it acts in {len(file.factors)} of "
            f"{len(file.factors) + len(rest)}, and not in {listed(rest)}",
            stacklevel=4,  # of whoever calls load()
        )


def fitting(target: Any, file: AdapterFile) -> dict[str, LowRankTerms]:
    """The terms of a file, built for the places of a pipeline that they belong to.

    Raises:
        StoreError: if a name or a shape does not fit; the message lists the first few, and how many there are.
    """
    components = components_of(target)
    places: dict[str, AdaptableAttention] = {}
    refused: dict[str, str] = {}
    for component in components.values():
        found, not_found = find_places(component)
        places |= {a.path: a for a in found}
        refused |= {r.name: r.reason for r in not_found}
    misfits: list[str] = []
    terms: dict[str, LowRankTerms] = {}
    for path, factors in file.factors.items():
        if path.partition(".")[0] not in components:
            misfits.append(f"{path}: the {_kind_of(target)} has no {path.partition('.')[0]}")
        elif path in refused:
            misfits.append(f"{path}: {refused[path]}")
        elif path not in places:
            misfits.append(f"{path}: there is no such attention")
        elif problem := _misfit(places[path], factors, file.heads.get(path)):
            misfits.append(f"{path}{problem}")
        else:
            terms[path] = _build(place_at(components, path), places[path], factors, file.alphas[path])
    if misfits:
        base = f", which was trained on {file.base}," if file.base else ""
        raise StoreError(
            f"{file.path}{base} does not fit this {_kind_of(target)} with a {type(denoiser_of(target).model).__name__} "
            f"({len(misfits)} of its {counted(len(file.factors), 'module')}): {listed(misfits)}"
        )
    rank = max(one.rank for one in terms.values())
    if not file.heads and file.metadata and rank != file.rank:
        raise StoreError(
            f"{file.path} does not fit this {_kind_of(target)}: its rank is {file.rank}, and with the heads here it "
            f"would be {rank}"
        )
    return {path: terms[path] for path in places if path in terms}  # in the model's order; a file has none


def _misfit(place: AdaptableAttention, factors: Mapping[str, Tensor], heads: int | None) -> str | None:
    """How the factors of one module differ from what its attention can carry, as the end of a sentence that starts with
    its path.
    """
    ways = {name for p, first in PRODUCTS.items() if first in factors for name in _names(p)}
    expected = {name: width for name, width in place.widths.items() if name in ways}
    lacking = sorted(set(expected) - set(factors))
    expected |= {name: width for name, width in place.unread.items() if name in factors}
    if lacking:
        return f".{lacking[0]} is missing"
    if unexpected := sorted(set(factors) - set(expected)):
        return f".{unexpected[0]} has no place there"
    channels = factors[next(iter(factors))]
    count = channels.shape[1 if next(iter(factors)).endswith(SIDES["out"]) else 0]
    if heads is not None and heads != place.heads:
        return f" is for {heads} heads, and there are {place.heads}"
    if count == 0 or count % place.heads:
        return f" has {count} channels, which are no multiple of the {place.heads} heads"
    for name, factor in factors.items():
        shape = (expected[name], count) if name.endswith(SIDES["out"]) else (count, expected[name])
        if tuple(factor.shape) != shape:
            return f".{name} is {tuple(factor.shape)}, expected {shape}"
    return None


def _names(product: str) -> tuple[str, ...]:
    sides = ("q", "k") if product == "qk" else ("v", "out")
    return tuple(prefix + SIDES[side] for prefix in ("", "add_") for side in sides)  # type: ignore[index]


def _build(place: Place, found: AdaptableAttention, factors: Mapping[str, Tensor], alpha: float) -> LowRankTerms:
    first, factor = next(iter(factors.items()))
    rank = factor.shape[1 if first.endswith(SIDES["out"]) else 0] // found.heads
    widths = {name: width for name, width in found.widths.items() if name in factors}
    dtype = place.dtype if place.dtype in DTYPES else torch.float32  # quantised weights
    terms = LowRankTerms(widths, found.heads, rank, alpha=alpha, device=place.device, dtype=dtype)
    terms.load_state_dict({name: factors[name] for name in widths})  # what nothing reads stays behind
    return terms


def _record(target: Any, file: AdapterFile, paths: tuple[str, ...], renamed: str | None) -> Record:
    identifier, prompt, words = file.identifier, file.prompt, dict(file.token_embeddings)
    if renamed is not None:
        mine = [key for key in words if key.split(".", 1)[1] == identifier]
        if not mine:
            raise SettingsError(
                f"{file.path} cannot be called {renamed!r}: no token was learned with it, the model knows it as "
                f"{identifier!r}"
            )
        if not renamed.strip():
            raise SettingsError(f"got rename_identifier {renamed!r}, expected a word")
        words = {k if k not in mine else f"{k.split('.', 1)[0]}.{renamed}": v for k, v in words.items()}
        if prompt and identifier:
            prompt = calling(identifier).sub(lambda _: renamed, prompt)
        identifier = renamed
    if (other := answering(target, identifier)) is not None:
        learned = any(key.split(".", 1)[1] == file.identifier for key in file.token_embeddings)
        way_out = "load it with rename_identifier='…'" if learned else "train one of them with another identifier"
        raise SettingsError(
            f"adapter {other!r} answers to {identifier!r} already, and so would {file.path}: prompts could not tell "
            f"them apart; {way_out}"
        )
    return Record(
        paths=paths,
        identifier=identifier,
        prompt=prompt,
        base=file.base,
        metadata=file.own_metadata,
        token_embeddings=words,
        brought_tokens=bool(words),
    )


def _kind_of(target: Any) -> str:
    return "model" if isinstance(target, torch.nn.Module) else "pipeline"

"""Adapters as they stand in a pipeline: what each is made of, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, SettingsError
from ...modules.adapters import LowRankTerms
from ..pipeline.components import Component, components_of, denoiser_of, text_encoders_of, tokenizer_of
from .hosts import CHANNELS
from .places import FUSED, Place, places_at

_RECORDS = "comcat_adapters"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a model remembers of an adapter that it carries, beside the weights."""

    paths: tuple[str, ...]
    """Where its terms are, with the component's name in front:
    ``unet.mid_block.attentions.0.transformer_blocks.0.attn2``.
    """
    identifier: str | None = None
    """The word of a prompt that calls the concept, ``V*``."""
    prompt: str | None = None
    base: str | None = None
    """Name of the model that it was trained on."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    token_embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    """Learned embeddings by ``component.token``, each (width,)."""
    brought_tokens: bool = False
    """Whether loading it has put these tokens into the tokenizer."""


def calling(identifier: str) -> re.Pattern[str]:
    """Where a prompt has an identifier as a word of its own, in the same spelling."""
    return re.compile(rf"(?<!\w){re.escape(identifier)}(?!\w)")


def answering(target: Any, identifier: str | None) -> str | None:
    """The name of the adapter that answers to an identifier in whatever case, None if there is none."""
    for name, record in records(target).items():
        if identifier is not None and identifier.casefold() == (record.identifier or "").casefold():
            return name
    return None


@dataclass(frozen=True)
class Adapter:
    """One adapter in a pipeline.

    Attributes:
        name: what it is called there. terms: its low-rank terms by path, the component's name in front. record: what
            else is known of it.
    """

    name: str
    terms: Mapping[str, LowRankTerms]
    record: Record

    @property
    def rank(self) -> int:
        """Extra channels of each head; the most where modules differ."""
        return max(t.rank for t in self.terms.values())

    @property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """What it carries by path: ``("qk", "vo")``, or one of them."""
        return {path: terms.products for path, terms in self.terms.items()}

    @property
    def scale(self) -> float:
        """What :func:`set_scale` set."""
        return next(iter(self.terms.values())).scale

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its factors under their keys in a file: ``unet.<path>.q_up``, ``.k_down``, ``.v_down``, ``.out_up``;
        ``.add_…`` for a second stream.
        """
        return {f"{path}.{name}": p for path, terms in self.terms.items() for name, p in terms.named_parameters()}

    def parameters(self) -> list[nn.Parameter]:
        """Its factors, in the order of :meth:`named_parameters`."""
        return list(self.named_parameters().values())

    def bytes(self, dtype: torch.dtype = torch.float16) -> int:
        """Size of its factors in a dtype, without the file's header (about 200 bytes a factor)."""
        return sum(p.numel() for p in self.parameters()) * dtype.itemsize


def adapters(target: Any) -> dict[str, Adapter]:
    """The adapters that a pipeline (or its unet or transformer alone) carries, by name, in the order in which they
    came.

    Raises:
        ModelError: if something else computes an adapter's attention meanwhile, so that it cannot act, its token is
            gone from a tokenizer, or a text encoder carries an adapter that this denoiser knows nothing of.
        SettingsError: if ``target`` is a model alone, and an adapter acts in other parts of its pipeline as well.
    """
    components = components_of(target)
    for name, places in strays(target).items():
        encoder, own = places[0].path.partition(".")[0], denoiser_of(target).name
        raise ModelError(
            f"adapter {name!r} acts in the {encoder}, and this {own} does not know it: the {own} has been exchanged "
            f"since, or another pipeline with the same {encoder} has loaded it; unload() takes it out"
        )
    found: dict[str, Adapter] = {}
    for name, record in records(target).items():
        check_whole(target, name, record)
        _check_tokens(target, name, record)
        found[name] = Adapter(name, _terms(components, name, record), record)
    return found


def records(target: Any) -> dict[str, Record]:
    """What the denoiser remembers, by name. Changes go through :func:`remember` and :func:`forget`."""
    return getattr(denoiser_of(target).model, _RECORDS, {})


def strays(target: Any) -> dict[str, list[Place]]:
    """Where adapters act in text encoders that the denoiser remembers nothing of, by name."""
    known, found = records(target), dict[str, list[Place]]()
    for component in text_encoders_of(target):
        paths = [f"{component.name}.{path}" for path, m in component.model.named_modules() if _carries(m)]
        for place in places_at(component, paths):
            channels = place.channels
            for name in () if channels is None else channels.names:
                if name not in known:
                    found.setdefault(name, []).append(place)
    return found


def _carries(module: nn.Module) -> bool:
    return CHANNELS in module._modules or FUSED in vars(module)


def remember(target: Any, name: str, record: Record) -> None:
    model: Any = denoiser_of(target).model
    setattr(model, _RECORDS, {**records(target), name: record})


def forget(target: Any, name: str) -> None:
    model: Any = denoiser_of(target).model
    left = {n: r for n, r in records(target).items() if n != name}
    if left:
        setattr(model, _RECORDS, left)
    else:
        delattr(model, _RECORDS)


def check_whole(target: Any, name: str, record: Record) -> None:
    """Raise SettingsError if ``target`` is one model of the several that an adapter acts in."""
    if isinstance(target, nn.Module):
        own = denoiser_of(target).name
        everywhere = {*record.paths, *(record.token_embeddings if record.brought_tokens else ())}
        if others := sorted({path.partition(".")[0] for path in everywhere} - {own}):
            raise SettingsError(
                f"adapter {name!r} acts in the {' and the '.join(others)} as well: give the pipeline, not its {own} "
                "alone"
            )


def check_unfused(target: Any) -> None:
    """Raise SettingsError while adapters are fused into the weights: what they are cannot change then."""
    components = components_of(target)
    for name, record in records(target).items():
        if any(place.fused is not None for place in located(components, record)):
            raise SettingsError(f"adapter {name!r} is fused into the weights; unfuse() first")


def located(components: Mapping[str, Component], record: Record) -> Iterator[Place]:
    """Every place of an adapter that lies in these components."""
    for component in components.values():
        yield from places_at(component, record.paths)


def _check_tokens(target: Any, name: str, record: Record) -> None:
    for key in record.token_embeddings if record.brought_tokens else ():
        component, token = key.split(".", 1)
        tokenizer = tokenizer_of(target, component)
        if tokenizer is not None and tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ModelError(
                f"adapter {name!r} has lost its token {token!r}: something has taken it out of the {component}'s "
                "tokenizer, as unload_textual_inversion() does; unload() the adapter, and load it again"
            )


def settle(place: Place) -> None:
    """See to it that the adapters of a place act.

    Raises:
        ModelError: if something else computes its attention now, so that they cannot.
    """
    channels = place.channels
    if channels is None:
        raise ModelError(f"the adapters at {place.path} are gone: the attention there is another since they came")
    if place.fused is None:
        reason = place.host.reclaim(place.attention)
    else:
        reason = place.host.why_not(place.attention) or place.host.shared(place.attention)
    if reason is not None:
        names = " and ".join(map(repr, channels.names))
        raise ModelError(f"adapter {names} cannot act at {place.path}: {reason}, or unload() the adapter")


def _terms(components: Mapping[str, Component], name: str, record: Record) -> dict[str, LowRankTerms]:
    found: dict[str, LowRankTerms] = {}
    for place in located(components, record):
        settle(place)
        terms = None if place.channels is None else place.channels.named(name)
        if terms is None:
            raise ModelError(f"adapter {name!r} is gone from {place.path}; unload() it, and load it again")
        found[place.path] = terms
    return found

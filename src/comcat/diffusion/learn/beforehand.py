"""What is said of a run and checked before it begins: what it holds in memory throughout, what it cannot adapt, what
is not read of its prompts, which settings change nothing, and what does not go with offloading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ...errors import MemoryShortage, SettingsError, listed
from ...runs.processes import Processes
from ..adapter.find import narrowed
from ..adapter.places import find_places
from ..draw.prompts import calls, check_heard, notes_on_lengths, splitting_notes
from ..pipeline.components import Component, denoiser_of, text_encoders_of
from ..pipeline.families import Family
from ..pipeline.offloading import cannot_recompute, comes_in_parts, waits_elsewhere
from .settings import CustomizeSettings

MOMENTS = 4 * 4
"""Bytes for each number that learns, in float32: itself, its gradient, and AdamW's two moments."""

IDLE_WITHOUT = {
    "sample_prompt": ("sample_every",), "sample_count": ("sample_every",), "prior_count": ("prior_prompt",),
    "prior_weight": ("prior_prompt",), "sample_steps": ("sample_every", "prior_prompt"),
    "sample_guidance": ("sample_every", "prior_prompt"),
}  # fmt: skip
"""Settings, and those without which they change nothing."""


@dataclass(frozen=True)
class Holdings:
    """Bytes of frozen weights that a device holds throughout, how many numbers learn, and bytes of weights that come
    and go as they compute. Activations come on top: they grow with the picture's area and the batch.
    """

    weights: int
    learned: int
    passing: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + MOMENTS * self.learned

    def note(self) -> str:
        return (
            f"Held throughout: {self.weights / 1e9:.2f} GB of weights and {MOMENTS * self.learned / 1e6:.1f} MB for "
            f"the {self.learned:,} numbers that learn, with gradients and moments; activations come on top."
        )

    def passing_note(self, checkpointing: bool) -> str:
        how = (
            "one block's at a time (gradient_checkpointing)"
            if checkpointing
            else "but a step gathers all of them for its gradients; gradient_checkpointing holds one block's at a time"
        )
        return f"{self.passing / 1e9:.2f} GB of weights come to the device as they compute, {how}."


def notes_before(family: Family, where: str, settings: CustomizeSettings) -> list[str]:
    """What to say before a run: attention in the denoiser that no adapter can act in, and the memory that is held.

    Raises:
        MemoryShortage: where a card is smaller than that.
    """
    _, refused = find_places(denoiser_of(family.pipe))
    holdings = holdings_of(family, where, settings)
    check_fits(holdings, family.device)
    left = [f"What is left as it is, and why: {listed([str(one) for one in refused])}"] if refused else []
    passing = [holdings.passing_note(settings.gradient_checkpointing)] if holdings.passing else []
    return [*left, holdings.note(), *passing]


def check_offloaded(family: Family, settings: CustomizeSettings, processes: Processes) -> None:
    """Raises SettingsError for what cannot be learned while weights come and go: a token's row, which must be there to
    be read and replaced, and anything by several processes at once.
    """
    for name, (_, encoder) in family.text_encoders().items():
        if settings.new_token is not None and comes_in_parts(encoder):
            raise SettingsError(
                f"new_token: the {name}'s weights come a layer at a time, so that its embedding cannot get a row; "
                f"offload the other parts alone, or use the words that the {name} knows"
            )
    checkpointing = settings.gradient_checkpointing or getattr(family.denoiser, "is_gradient_checkpointing", False)
    if checkpointing and (reason := cannot_recompute(family.denoiser)) is not None:
        raise SettingsError(
            f"gradient_checkpointing does not go with how the {family.component} is offloaded, since {reason}"
        )
    if processes.count > 1 and waits_elsewhere(family.denoiser):
        raise SettingsError(
            f"{processes.count} processes share a batch, and the {family.component} is offloaded: expected one "
            "process, or a pipeline without offloading"
        )


def notes_on_idle_settings(settings: CustomizeSettings, *, out: bool) -> list[str]:
    """A sentence for each setting that was given and changes nothing, since another that it needs was not. ``out``:
    whether the run has a file to save to.
    """
    used = {field.name for field in fields(settings) if getattr(settings, field.name) != field.default}
    notes = [
        f"{setting} changes nothing without {' or '.join(needs)}."
        for setting, needs in IDLE_WITHOUT.items()
        if setting in used and not used & {*needs}
    ]
    if settings.prior_images is not None and "prior_count" in used:
        notes.append("prior_count changes nothing with prior_images, all of which are used.")
    if settings.sample_every and not out:
        notes.append("sample_every changes nothing without out, beside which the samples go.")
    return notes


def notes_on_prompts(family: Family, prompts: Sequence[str], identifier: str, settings: CustomizeSettings) -> list[str]:
    """What to say before a run of its prompts: where the identifier or the end of a prompt is not read, how the
    tokenizers split it, and samples that do not call it.

    Raises:
        SettingsError: if no text encoder reads the identifier.
    """
    notes: list[str] = []
    for prompt in dict.fromkeys(prompts):
        notes += check_heard(family, prompt, identifier, one_token=settings.new_token is not None)
    if settings.new_token is None:
        notes += splitting_notes(family, identifier)
    sampled = settings.sample_prompt if settings.sample_every else None
    others = [prompt for prompt in (settings.prior_prompt, sampled) if prompt is not None]
    own_token = identifier if settings.new_token is not None else None
    notes += notes_on_lengths(family, [*prompts, *settings.protect, *others], one_token=own_token)
    if sampled is not None and not calls(sampled, identifier):
        notes.append(f"The samples' prompt {sampled!r} does not call {identifier!r}, so that they do not show it.")
    return notes


def holdings_of(family: Family, where: str, settings: CustomizeSettings) -> Holdings:
    """What a run with these settings holds on the denoiser's device; nothing is made for it."""
    components: list[Component] = [denoiser_of(family.pipe)]
    kept: list[nn.Module] = [family.denoiser]
    if settings.text_encoder:
        components += text_encoders_of(family.pipe)
    if settings.text_encoder or settings.new_token is not None:
        kept += [encoder for _, encoder in family.text_encoders().values()]
    learned = 0
    for number, component in enumerate(components):
        found = find_places(component)[0]
        if not number:
            found = narrowed([one for one in found if where in ("all", one.where)], settings.only)
        learned += sum(one.parameters(settings.rank) for one in found)
    held = {m: _bytes(m.parameters()) + _bytes(m.buffers()) for m in kept}
    passing = sum(size for module, size in held.items() if comes_in_parts(module))
    return Holdings(sum(held.values()) - passing, learned, passing)


def check_fits(holdings: Holdings, device: torch.device) -> None:
    """Raises MemoryShortage where a card is smaller than what is held before the first activation."""
    if device.type != "cuda":
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    if holdings.bytes > whole:
        raise MemoryShortage(
            f"the run holds {holdings.bytes / 1e9:.1f} GB throughout, before any activation, and {device} has "
            f"{whole / 1e9:.1f} GB; what needs less: a base in 16 bit (dtype bfloat16) or in 8 bit, a lower rank, "
            "leaving the text encoder as it is"
        )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(_stored(tensor) for tensor in tensors)


def _stored(tensor: torch.Tensor) -> int:
    """Bytes in memory. A quantised tensor claims the type that it computes in, and holds smaller ones."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return sum(_stored(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()

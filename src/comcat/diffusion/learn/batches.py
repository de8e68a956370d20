"""What each step sees: pictures of the concept under its prompt, and of its class under theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import NumericsError, SettingsError
from ..pipeline.families import Conditions, Family
from .latents import Latents, Rotation
from .optimisation import Batch


class Texts:
    """The conditions of a few prompts: encoded once, or anew at every step where the text encoders learn."""

    def __init__(self, family: Family, prompts: Sequence[str], *, live: bool) -> None:
        self.family, self.prompts = family, list(prompts)
        with torch.no_grad():
            encoded = family.encode(self.prompts)
        for name, value in encoded.items():
            if not value.isfinite().all():
                kind = str(value.dtype).removeprefix("torch.")
                raise NumericsError(
                    f"the pipeline's text encoders make NaN or infinity ({name}, {kind}) of the prompts "
                    f"{', '.join(map(repr, self.prompts))}; their weights may be damaged"
                )
        self.kept: Conditions | None = None if live else encoded

    def of(self, which: Sequence[int]) -> Conditions:
        """The conditions of prompt number ``which[i]`` for picture i."""
        encoded = self.family.encode(self.prompts) if self.kept is None else self.kept
        index = torch.tensor(which, device=next(iter(encoded.values())).device)
        return {name: value[index] for name, value in encoded.items()}


@dataclass(frozen=True)
class Stream:
    """Pictures under one prompt, or each under its own: how many a step takes, what their loss weighs, what share of
    them is shown under the empty prompt instead.
    """

    latents: Latents
    rotation: Rotation
    prompts: Sequence[str]
    count: int
    weight: float
    dropout: float = 0.0

    def prompt_of(self) -> list[str]:
        """The prompt of each frame."""
        found = [""] * len(self.latents.mean)
        for picture, own in enumerate(self.latents.frames_of):
            for frame in own:
                found[frame] = self.prompts[picture if len(self.prompts) > 1 else 0]
        return found


class CachedSource:
    """Draws from latents that were computed once. The pictures take turns, so a step needs no state but its number.

    ``live``: prompts are encoded anew at every step, since the text encoders learn.
    """

    def __init__(self, family: Family, streams: Sequence[Stream], *, live: bool) -> None:
        self.streams = streams
        empty = [""] if any(stream.dropout for stream in streams) else []
        prompts = list(dict.fromkeys([*(prompt for stream in streams for prompt in stream.prompts), *empty]))
        self.texts, self.empty = Texts(family, prompts, live=live), len(prompts) - 1
        self.numbers = [[prompts.index(prompt) for prompt in stream.prompt_of()] for stream in streams]

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        latents, framings, masks, weights, which = [], [], [], [], []
        for numbers, stream in zip(self.numbers, self.streams, strict=True):
            places = range(step * stream.count, (step + 1) * stream.count)
            frames = [stream.rotation.frame(p, generator) for p in places]
            drawn, framing = stream.latents.draw(frames, generator)
            latents.append(drawn)
            framings.append(framing)
            masks.append(stream.latents.masks[frames])
            weights += [stream.weight / stream.count] * stream.count
            shown = torch.tensor([numbers[frame] for frame in frames])
            if stream.dropout:
                shown[torch.rand(stream.count, generator=generator) < stream.dropout] = self.empty
            which += shown.tolist()
        conditions = self.texts.of(which) | {k: torch.cat([f[k] for f in framings]) for k in framings[0]}
        return Batch(torch.cat(latents), conditions, torch.tensor(weights), torch.cat(masks))


def check_dropout(family: Family, where: str, dropout: float) -> None:
    """Raises SettingsError if pictures shown under the empty prompt would teach the adapter nothing."""
    if dropout and where == "cross":
        with torch.no_grad():
            empty = family.encode([""])["prompt"]
        if not empty.any():
            raise SettingsError(
                "caption_dropout: this pipeline's empty prompt is all zeros, of which cross-attention's terms read "
                "nothing; leave it out, or learn where='all'"
            )

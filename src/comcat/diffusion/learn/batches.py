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
        index = torch.tensor(which, device=self.family.device)
        return {name: value[index] for name, value in encoded.items()}


@dataclass(frozen=True)
class Stream:
    """Pictures under one prompt: how many a step takes, what their loss weighs, what share of them is shown under the
    empty prompt instead.
    """

    latents: Latents
    rotation: Rotation
    prompt: str
    count: int
    weight: float
    dropout: float = 0.0


class CachedSource:
    """Draws from latents that were computed once. The pictures take turns, so a step needs no state but its number.

    ``live``: prompts are encoded anew at every step, since the text encoders learn.
    """

    def __init__(self, family: Family, streams: Sequence[Stream], *, live: bool) -> None:
        self.streams = streams
        empty = [""] if any(stream.dropout for stream in streams) else []
        self.texts = Texts(family, [*(stream.prompt for stream in streams), *empty], live=live)

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        latents, framings, weights, which = [], [], [], []
        for number, stream in enumerate(self.streams):
            places = range(step * stream.count, (step + 1) * stream.count)
            drawn, framing = stream.latents.draw([stream.rotation.frame(p, generator) for p in places], generator)
            latents.append(drawn)
            framings.append(framing)
            weights += [stream.weight / stream.count] * stream.count
            shown = torch.full((stream.count,), number)
            if stream.dropout:
                shown[torch.rand(stream.count, generator=generator) < stream.dropout] = len(self.streams)
            which += shown.tolist()
        conditions = self.texts.of(which) | {k: torch.cat([f[k] for f in framings]) for k in framings[0]}
        return Batch(torch.cat(latents), conditions, torch.tensor(weights))


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

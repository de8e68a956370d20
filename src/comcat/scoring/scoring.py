"""Scores of generated pictures: which can be had of what there is, and what each was measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Pictures, open_pictures
from ..errors import DataError, ModelError, SettingsError, counted
from .clip import Clip
from .distances import FEW_FOR_FID, fid, kid, paired_cosine, pairwise_cosine
from .features import Opening, distance_extractor, embed, similarity_extractor
from .settings import INCEPTION, METRICS, ScoreSettings

_LEAST = {"kid": 2, "fid": 2, "clip-i": 1, "dino": 1}
"""Pictures on either side that a metric cannot do without."""


@dataclass(frozen=True)
class Scores:
    """The values by metric (KID as mean, std, subsets and subset size), the network behind each, how many pictures,
    what else to know.
    """

    values: dict[str, dict[str, float]]
    extractors: dict[str, str]
    count: int
    reference_count: int
    notes: list[str] = field(default_factory=list)


def score(
    pictures: str | Path | Pictures,
    against: str | Path | Pictures | None = None,
    settings: ScoreSettings | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    pretrained: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Score generated ``pictures``, all metrics but CLIP-T by comparison with real ones (``against``).

    KID and FID: how far the features' distributions lie apart (:func:`kid`, :func:`fid`); 0 is best. CLIP-I and DINO:
    the mean cosine between a generated and a real picture, CLIP-T: between a picture and its prompt (Ruiz et al. 2023);
    1 is best. Unreadable pictures are left out and counted in the notes.

    Args:
        pictures, against: whatever :func:`comcat.open_pictures` takes.
        device, dtype: where, and in what, the networks compute. pretrained: with False they have random weights, and
            the scores mean nothing.
        seed: of random weights and of KID's subsets.

    Raises:
        DataError: if there are no pictures, too few for a metric asked for by name, or no prompts for CLIP-T.
        ModelError: if a network cannot be had; says which option names another.
        SettingsError: if a metric asked for by name needs ``against``.
    """
    settings = settings or ScoreSettings()
    made = _Side(pictures)
    real = None if against is None else _Side(against)
    prompts = _prompts(made, settings)
    notes = [note for side in (made, real) if side is not None for note in side.notes]
    metrics = []
    for metric in settings.metrics or METRICS:
        if (error := _obstacle(metric, made, real, prompts)) is None:
            metrics.append(metric)
        elif settings.metrics is not None:
            raise error
        else:
            notes.append(f"Without {metric}: {error}")
    if not metrics:
        raise DataError("nothing can be scored. " + " ".join(n for n in notes if n.startswith("Without")))
    if not pretrained:
        notes.append("The networks have random weights: these numbers say nothing of the pictures.")
    opening = Opening(device=device, dtype=dtype, pretrained=pretrained, seed=seed)
    run = _Run(made, real, settings, opening, progress)
    values, extractors = run.distances({"kid", "fid"} & set(metrics), notes)
    for found in (run.clip({"clip-i", "clip-t"} & set(metrics), prompts), run.dino({"dino"} & set(metrics))):
        values |= found[0]
        extractors |= found[1]
    ordered = [m for m in METRICS if m in values]
    return Scores(
        {m: values[m] for m in ordered}, {m: extractors[m] for m in ordered}, len(made.keys),
        len(real.keys) if real else 0, notes
    )  # fmt: skip


class _Side:
    """One set of pictures, looked through once: which can be read, and with which prompts."""

    def __init__(self, source: str | Path | Pictures) -> None:
        self.pictures = source if isinstance(source, Pictures) else open_pictures(source, max_unreadable=1.0)
        self.stored = {sample.key: sample.image.info.get("prompt") for sample in self.pictures}
        self.keys = list(self.stored)
        skipped = self.pictures.skipped
        self.notes = (
            [f"{counted(len(skipped), 'unreadable picture')} of {self.pictures.name} left out, the first: {skipped[0]}"]
            if skipped
            else []
        )


def _prompts(side: _Side, settings: ScoreSettings) -> dict[str, str] | DataError:
    """The prompt of each readable picture, or why there is none."""
    if settings.prompts is None:
        found = {key: prompt for key, prompt in side.stored.items() if isinstance(prompt, str)}
        if len(found) < len(side.keys):
            return DataError(
                f"no prompt for {len(side.keys) - len(found)} of {counted(len(side.keys), 'picture')} in "
                f"{side.pictures.name}; give a file (--prompts)"
            )
    else:
        found = _read_prompts(settings.prompts, [entry.key for _, entry in side.pictures.entries()])
    if settings.without:
        found = {key: " ".join(prompt.replace(settings.without, " ").split()) for key, prompt in found.items()}
    return found


def _read_prompts(path: Path, keys: list[str]) -> dict[str, str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {str(path)!r} cannot be read: {error}") from None
    lines = [line for line in lines if line]
    if len(lines) not in (1, len(keys)):
        raise DataError(f"{path} holds {len(lines)} prompts, expected 1 for all pictures, or {len(keys)}, one for each")
    return dict(zip(keys, lines * len(keys) if len(lines) == 1 else lines, strict=False))


def _obstacle(
    metric: str, made: _Side, real: _Side | None, prompts: dict[str, str] | DataError
) -> DataError | SettingsError | None:
    """What keeps a metric from being computed."""
    if metric == "clip-t":
        return prompts if isinstance(prompts, DataError) else None
    if real is None:
        return SettingsError(f"{metric} compares with real pictures; name them (--against)")
    least, counts = _LEAST[metric], (len(made.keys), len(real.keys))
    if min(counts) < least:
        return DataError(f"{metric} needs at least {least} pictures on either side; got {counts[0]} and {counts[1]}")
    return None


@dataclass(frozen=True)
class _Run:
    """Each method gives the values of the metrics asked for, and the extractors they come from."""

    made: _Side
    real: _Side | None
    settings: ScoreSettings
    opening: Opening
    progress: bool

    def distances(self, wanted: set[str], notes: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
        if not wanted:
            return {}, {}
        spec = self.settings.features
        with _option("--features", wanted):
            extractor = distance_extractor(spec, self.opening)
        x, y = self._embed(self.made, extractor), self._embed(self._reference(), extractor)
        values: dict[str, Any] = {}
        if "kid" in wanted:
            values["kid"] = asdict(kid(x, y, seed=self.opening.seed))
        if "fid" in wanted:
            values["fid"] = {"value": fid(x, y)}
            if min(len(x), len(y)) < FEW_FOR_FID:
                notes.append(
                    f"FID from {len(x)} and {len(y)} pictures is biased upwards; below {FEW_FOR_FID} on either side "
                    "compare it only "
                    "between sets of these very sizes, or use KID, which is unbiased."
                )
        notes.append(
            f"KID and FID compare {x.shape[1]} features of {spec}, pictures resized as clean-fid does. They can be "
            "compared only with "
            "numbers from the same network."
        )
        if spec == INCEPTION:
            notes.append(
                "It is Inception v3 as TensorFlow's authors trained it for ImageNet, not the network of 2015 behind "
                "published "
                "FID and KID, so these numbers are not those of clean-fid."
            )
        return values, dict.fromkeys(wanted, spec)

    def clip(self, wanted: set[str], prompts: dict[str, str] | DataError) -> tuple[dict[str, Any], dict[str, str]]:
        if not wanted:
            return {}, {}
        with _option("--clip", wanted):
            clip = Clip(self.settings.clip, self.opening)
        x, keys = embed(self.made.pictures, clip.images, batch_size=self.settings.batch_size, progress=self.progress)
        values: dict[str, Any] = {}
        if "clip-i" in wanted:
            values["clip-i"] = {"value": pairwise_cosine(x, self._embed(self._reference(), clip.images))}
        if "clip-t" in wanted:
            assert isinstance(prompts, Mapping)  # else it would have been refused
            values["clip-t"] = {"value": paired_cosine(x, clip.texts([prompts[key] for key in keys]))}
        return values, dict.fromkeys(wanted, self.settings.clip)

    def dino(self, wanted: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
        if not wanted:
            return {}, {}
        with _option("--dino", wanted):
            extractor = similarity_extractor(self.settings.dino, self.opening)
        similarity = pairwise_cosine(self._embed(self.made, extractor), self._embed(self._reference(), extractor))
        return {"dino": {"value": similarity}}, {"dino": self.settings.dino}

    def _embed(self, side: _Side, extractor: Any) -> Tensor:
        return embed(side.pictures, extractor, batch_size=self.settings.batch_size, progress=self.progress)[0]

    def _reference(self) -> _Side:
        assert self.real is not None  # metrics that need it were refused without it
        return self.real


@contextmanager
def _option(name: str, wanted: set[str]) -> Iterator[None]:
    """Say, where a network cannot be had, which option names another."""
    try:
        yield
    except ModelError as error:
        metrics = " and ".join(sorted(wanted))
        raise ModelError(
            f"{error}. Name another network for {metrics} ({name}), or leave out {metrics} (--metrics)"
        ) from None

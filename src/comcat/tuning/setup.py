"""What a tuning run works with, and whether it fits together: checked before anything is computed."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Pictures, Preprocess, batches
from ..errors import DataError, SettingsError
from ..hosts.classes import classes_of
from ..measure import is_classifier
from ..measure.maps import Kind, kind_of
from ..measure.running import evaluating
from ..models import preprocess_of
from ..runs.processes import Processes
from ..runs.state import fingerprint
from ..wrappers import bare
from .augmentation import Augment, crop_scale
from .data import TrainingData
from .learner import freeze_but, freeze_unused
from .losses import Objective
from .settings import TuneSettings
from .stochastic_depth import set_stochastic_depth
from .teachers import Features, Teacher, check_teacher, chosen_blocks, rows_or_maps

CHECKPOINTS, LOG, TRACKERS = "checkpoints", "log.jsonl", "trackers"
"""What a run puts into its folder."""
LOOKED_AT = 4
"""So many pictures are shown to a teacher to see what its maps say."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run works with.

    Attributes:
        folder: where its checkpoints and log go, if anywhere. model: what is trained, a copy of the student.
        steps: updates in all. classes: the model's, or the width of its features. features: the student's and the
            teacher's.
        identity: what a checkpoint to go on from must agree with.
    """

    settings: TuneSettings
    processes: Processes
    folder: Path | None
    model: nn.Module
    preprocess: Preprocess
    data: TrainingData
    steps: int
    classes: int
    objective: Objective
    teacher: Teacher | None
    features: tuple[Features, Features]
    evaluation: Pictures | None
    identity: dict[str, Any]

    def place(self, name: str) -> Path | None:
        """Where something lies in the run's folder, if it has one."""
        return None if self.folder is None else self.folder / name


def set_up(
    student: nn.Module,
    data: Pictures,
    settings: TuneSettings,
    *,
    teacher: nn.Module | None,
    evaluation: Pictures | None,
    folder: Path | None,
    preprocess: Preprocess | None,
    processes: Processes,
) -> Setup:
    """Check what a run is given and set it up. Raises what :func:`comcat.tune` raises for what does not fit."""
    _check_types(student)
    if teacher is not None:
        bare(teacher)  # raises for what is no module
    preprocess = preprocess_of(student) if preprocess is None else preprocess
    maps = _tried(student, preprocess, Features(()))[0].dim() == 4
    classifies = is_classifier(student) and not maps
    labelled = classifies and data.has_labels
    distillation = _distillation(settings, teacher, classifies=classifies, maps=maps)
    _check_something_to_learn(settings, data, teacher, distillation, classifies=classifies, maps=maps)
    if classifies and evaluation is not None and not evaluation.has_labels:
        raise DataError(f"evaluation: {evaluation.unlabelled}, so there is no top-1")
    settings = replace(settings, crop_scale=crop_scale(settings, preprocess))
    training = TrainingData(
        pictures=data,
        transform=Augment(preprocess, settings),
        batch_size=_batch_size(settings, processes.count),
        seed=settings.seed,
        repeats=settings.repeats,
        processes=processes.count,
        process=processes.index,
        workers=settings.workers,
        count=settings.epoch_size,
    )
    steps = settings.steps
    if steps is None:
        steps = math.ceil((1 if settings.epochs is None else settings.epochs) * training.steps())

    model = copy.deepcopy(student)
    if settings.drop_path is not None:
        set_stochastic_depth(model, settings.drop_path)
    freeze_but(model, settings.only)
    paths = chosen_blocks(settings.features, teacher) if teacher is not None else ()
    ours, theirs = Features(paths), Features(paths)
    output, features = _tried(model, preprocess, ours)
    classes = output.shape[1]
    freeze_unused(model, [*([output] if labelled or distillation != "none" else []), *features])
    prepared = None
    if teacher is not None:
        check_teacher(teacher, student, preprocess, tuple(output.shape[1:]), logits=distillation != "none")
        prepared = Teacher(teacher, preprocess, processes.device)
        _check_features(paths, features, _tried(prepared.model, preprocess, theirs)[1])
    kind = _kind_of_maps(prepared, data, preprocess) if maps and prepared is not None else None
    return Setup(
        settings=settings,
        processes=processes,
        folder=folder,
        model=model,
        preprocess=preprocess,
        data=training,
        steps=steps,
        classes=classes,
        objective=Objective(settings, labelled, distillation, kind),
        teacher=prepared,
        features=(ours, theirs),
        evaluation=evaluation,
        identity={
            **settings.lasting(),
            "data": data.name,
            "samples": training.samples,
            "student": fingerprint(student),
            "teacher": None if teacher is None else fingerprint(teacher),
        },
    )


def _check_types(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise SettingsError(
                f"{name} is in {kind}, too coarse for small updates: "
                "tune the model in float32 and compute in 16 bits by precision=bf16"
            )


def _kind_of_maps(teacher: Teacher, data: Pictures, preprocess: Preprocess) -> Kind:
    """What the teacher's maps say, by a few of the pictures: that they are logits of a mask is seen by their signs."""
    home = next(teacher.parameters()).device
    with torch.no_grad():
        said = [teacher(images.to(home)) for images, _ in batches(data, preprocess, batch_size=1, limit=LOOKED_AT)]
    if not said:
        raise DataError(f"{data.name}: no pictures")
    return kind_of(torch.cat(said), classes_of(teacher.model))


def _distillation(settings: TuneSettings, teacher: nn.Module | None, *, classifies: bool, maps: bool) -> str:
    """What is learnt of the teacher's logits, the default filled in."""
    if teacher is None:
        asked = (
            "distillation" if settings.distillation in ("hard", "soft") else "features" if settings.features else None
        )
        if asked is not None:
            raise SettingsError(f"{asked}={getattr(settings, asked)!r} needs a teacher")
        return "none"
    if settings.distillation is None:
        return "soft" if classifies or maps else "none"
    if settings.distillation != "none" and not (classifies or maps):
        raise SettingsError(
            "the student has no classes, so there are no logits to distil: learn the teacher's features (features=all)"
        )
    return settings.distillation


def _check_something_to_learn(
    settings: TuneSettings,
    data: Pictures,
    teacher: nn.Module | None,
    distillation: str,
    *,
    classifies: bool,
    maps: bool,
) -> None:
    if distillation != "none" or settings.features or (classifies and data.has_labels):
        return
    if maps:
        raise SettingsError("the student gives maps, which it learns from a teacher's: give a teacher to learn from")
    if not classifies:
        raise SettingsError(
            "the student has no classes to learn: give a teacher and the blocks to be like it in (features=all)"
        )
    instead = (
        "let it learn of the teacher (distillation=soft)" if teacher is not None else "give a teacher to learn from"
    )
    raise DataError(f"{data.unlabelled}: {instead}, or give labelled pictures")


def _batch_size(settings: TuneSettings, processes: int) -> int:
    """Samples of a batch of each process."""
    parts = processes * settings.accumulate
    if settings.batch_size % parts:
        spread = " × ".join(
            f"{n} {what}"
            for n, what in ((processes, "processes"), (settings.accumulate, "parts (accumulate)"))
            if n > 1
        )
        raise SettingsError(f"got batch_size={settings.batch_size}, expected a multiple of {parts}: {spread}")
    size = settings.batch_size // processes
    if size % 2 and (settings.mixup or settings.cutmix):
        raise SettingsError(
            f"mixup and cutmix mix pairs, but a process has {size} samples of a batch; expected an even number"
        )
    return size


def _tried(model: nn.Module, preprocess: Preprocess, features: Features) -> tuple[Tensor, list[Tensor]]:
    """What a model says of one blank picture, with gradients, and its features there."""
    home = next(model.parameters())
    blank = preprocess.blank(home)
    with features.kept_from(model), torch.enable_grad(), evaluating(model):
        output = rows_or_maps(model, blank)
        return output, features.take()


def _check_features(paths: tuple[str, ...], ours: list[Tensor], theirs: list[Tensor]) -> None:
    for path, mine, other in zip(paths, ours, theirs, strict=True):
        if mine.shape != other.shape:
            raise SettingsError(
                f"features: {path} gives {tuple(mine.shape[1:])} a picture in the student, "
                f"{tuple(other.shape[1:])} in the teacher; expected the same"
            )

"""How a model does on pictures: against labels, and against another model."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import expect_batches, parts_of_batch
from ..errors import DataError, ModelError, NumericsError, SettingsError, counted
from ..hosts.classes import classes_of
from ..wrappers import bare
from .maps import Kind, agreements, divergences, is_one_number, kind_of
from .outputs import as_rows, is_classifier, whole_output
from .running import AUTOCAST, evaluating


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on pictures; None where there are no labels, no reference or no classes to say it by.

    ``count`` is the number of pictures. ``top1``, ``top5`` (of more than five classes) and ``agreement`` (whose arg max
    equals the reference's; of maps the share of pixels) are percentages. ``loss`` is the mean cross-entropy and
    ``divergence`` the mean KL(reference || model), summed over the pixels of maps, both in nats. ``cosine`` is the mean
    cosine of the outputs to the reference's. Of one number a picture there is ``divergence`` alone, half its squared
    difference.
    """

    count: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON holds them."""
        return asdict(self)


def _split(batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
    """Pictures and labels of a batch."""
    images, labels = parts_of_batch(batch, where)
    if images.dim() < 2:
        raise DataError(f"{where}: got {tuple(images.shape)}, expected pictures (batch, channels, height, width)")
    if labels is None:
        return images, None
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: got {type(labels).__name__} for labels, expected whole numbers: {error}") from error
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not (whole or not len(labels)):
        raise DataError(
            f"{where}: got labels of shape {tuple(labels.shape)} {labels.dtype}, "
            f"expected one whole number for each of {counted(images.shape[0], 'picture')}"
        )
    return images, labels.long()


def _speaker(model: nn.Module, device: Any, dtype: torch.dtype | None, who: str) -> Callable[[Tensor, str], Tensor]:
    """A function from pictures and the batch's name to the model's output in float32, on the model's device."""
    held = [*model.parameters(), *model.buffers()]
    home = held[0].device if held else None
    if device is not None:
        device = torch.device(device)
        for tensor in held:
            if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
                raise ModelError(f"the {who} is on {tensor.device}, expected {device}; move it there first")
        home = home or device
    if home is not None and home.type == "meta":
        raise ModelError(f"the {who} has no weights: they are on the meta device; load them first")
    own = next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.float32)
    if dtype not in (None, own, *AUTOCAST):
        raise SettingsError(f"dtype: got {dtype}, expected torch.bfloat16, torch.float16 or the {who}'s own {own}")

    def speak(images: Tensor, where: str) -> Tensor:
        images = images.to(device=home or images.device, dtype=own, non_blocking=True)
        cast = dtype not in (None, own)
        with torch.autocast(images.device.type, dtype=dtype) if cast else nullcontext():
            output = whole_output(model, images).float()
        output = output if output.dim() == 4 else as_rows(output)
        sound = output.isfinite().flatten(1).all(1)
        if not sound.all():
            first = int((~sound).nonzero()[0])
            raise NumericsError(f"{where}: the {who}'s output for picture {first} has NaN or infinity in it")
        return output

    return speak


def _numbers(output: Tensor) -> str:
    return " × ".join(map(str, output.shape[1:]))


class _Told:
    """Whether two models' outputs are distributions that can be compared, and of what."""

    def __init__(self, model: nn.Module, against: nn.Module | None) -> None:
        self.both = against is not None and is_classifier(model) and is_classifier(against)
        self.classes = frozenset() if against is None else classes_of(against)
        self.found: Kind | None = None

    def kind(self, other: Tensor) -> Kind | None:
        """Of the reference's output; once it was a map, all are, whatever its values are."""
        if is_one_number(other):
            self.found = "one number"
        elif other.dim() == 2:
            self.found = "scores" if self.both else None
        elif self.found is None and (kind := kind_of(other, self.classes)) != "values":
            self.found = kind
        return self.found


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    against: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    reference: nn.Module | None = None,
) -> Evaluation:
    """How the model does on every picture of ``batches``, each once: against labels, and against another model.

    ``batches`` yields pictures (batch, channels, height, width), tuples of pictures and labels (batch,) or None, or
    mappings with ``pixel_values`` or ``image`` and maybe ``labels`` or ``label``; a DataLoader of any of these will do.
    Labels count where the model is a classifier (:func:`is_classifier`). Against another model come the cosine of the
    outputs, be they logits or features, and, where both are classifiers, agreement and divergence. Pictures go to each
    model's own device and type; ``device`` states where the models must be. ``dtype`` bfloat16 or float16 computes
    under autocast where it is not the weights' own type. ``progress`` shows a bar.

    Raises DataError for empty or malformed batches, for labels outside the model's classes and where only some batches
    have labels; NumericsError for NaN or infinity in an output; ModelError where a model fails, is on another device,
    or says something of another width than the reference; SettingsError for another ``dtype``.
    """
    if reference is not None:
        warnings.warn("evaluate(reference=…) is deprecated, say against=…", DeprecationWarning, stacklevel=2)
        against = reference
    expect_batches(batches, "the evaluation")
    for module in (model, *(() if against is None else (against,))):
        bare(module)  # raises for what is no module
    scores, told = is_classifier(model), _Told(model, against)
    speak = _speaker(model, device, dtype, "model")
    refer = None if against is None else _speaker(against, device, dtype, "other model")
    sums = dict.fromkeys(("top1", "top5", "loss", "agreement", "cosine", "divergence"), 0.0)
    count, width, labelled = 0, 0, None
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="evaluate", unit="batch")
    with evaluating(model, *([] if against is None else [against])), torch.no_grad():
        for index, batch in enumerate(batches):
            where = f"batch {index}"
            images, labels = _split(batch, where)
            if not len(images):
                continue
            if labelled not in (None, labels is not None):
                has, had = ("labels", "none") if labels is not None else ("no labels", "some")
                raise DataError(f"{where} has {has} and those before have {had}; expected all alike")
            labelled = labels is not None
            output = speak(images, where)  # (batch, classes or features)
            count, width, scores = count + len(output), output.shape[1], scores and output.dim() == 2
            if scores and labels is not None:
                labels = labels.to(output.device)
                wrong = labels[(labels < 0) | (labels >= width)]
                if len(wrong):
                    raise DataError(
                        f"{where}: got label {int(wrong[0])}, expected 0 to {width - 1} of {counted(width, 'class')}"
                    )
                sums["loss"] += F.cross_entropy(output, labels, reduction="sum").item()
                ranked = output.topk(min(5, width)).indices == labels[:, None]  # (batch, 5)
                sums["top1"] += ranked[:, 0].sum().item()
                sums["top5"] += ranked.sum().item()
            if refer is not None:
                other = refer(images, where).to(output.device)
                if other.shape != output.shape:
                    raise ModelError(
                        f"the model gives {_numbers(output)} numbers a picture, the other model {_numbers(other)}; "
                        "expected as many"
                    )
                sums["cosine"] += F.cosine_similarity(output.flatten(1), other.flatten(1)).sum().item()
                if (kind := told.kind(other)) is not None:
                    if kind != "one number":
                        sums["agreement"] += agreements(other, output, kind).sum().item()
                    sums["divergence"] += divergences(other, output, kind).sum().item()
    if not count:
        raise DataError("no pictures to evaluate on: the batches are empty")
    known = set()
    if scores and labelled:
        known |= {"top1", "loss"} | ({"top5"} if width > 5 else set())
    if refer is not None:
        alone = {None: {"cosine"}, "one number": {"divergence"}}
        known |= alone.get(told.found, {"cosine", "agreement", "divergence"})
    percent = {"top1", "top5", "agreement"}
    sums["divergence"] = max(0.0, sums["divergence"])  # rounding alone takes it below
    return Evaluation(count=count, **{key: sums[key] / count * (100 if key in percent else 1) for key in sorted(known)})

"""One pass over a few pictures that records, for every site, small second moments.

Of queries and keys, of the heads' outputs, of a linear layer's narrower side, of a feed-forward's hidden units, and,
for the loss-aware statistic, of the gradients there. Memory does not grow with the number of pictures. Labels are never
needed: the gradient is that of the loss on labels drawn from the model's own predictions (the true Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import DataError, SettingsError, nearest
from ..grad_mode import outside_inference_mode
from ..hosts import find_sites
from ..hosts.classes import classes_of
from ..measure.running import call, evaluating
from ..sites import Sites, channels_last
from ..wrappers import bare
from .examples import Example, examples_of
from .losses import sampled_loss
from .recorder import Recorder
from .seen import STATISTICS, StatisticName, Statistics


@outside_inference_mode
def calibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    statistic: StatisticName = "loss",
    sites: Sites | None = None,
    limit: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Statistics:
    """Record the moments that a statistic needs, in one pass over some pictures.

    Args:
        batches: batches of pictures (batch, channels, height, width), or (pictures, labels) pairs, or dicts with
            ``pixel_values`` or ``image`` and whatever else the model's forward takes by name; labels are ignored.
        statistic: ``"activation"``: what flows in; ``"loss"``: and the gradients of the loss on labels drawn from the
            model's own predictions.
        sites: the sites to observe, by default all. limit: stop after so many pictures.

    Raises:
        DataError: without pictures. NumericsError: where an activation or gradient is not finite; the message names the
            site. ModelError: where no gradient reaches any site, as with a head of zeros.
    """
    if statistic not in STATISTICS:
        raise SettingsError(
            f"got statistic {statistic!r}, expected one of {', '.join(STATISTICS)}{nearest(statistic, STATISTICS)}"
        )
    model = bare(model)
    sites = find_sites(model) if sites is None else sites
    if statistic == "weights":
        raise SettingsError("statistic 'weights' needs no calibration: leave the statistics out")
    device = next(model.parameters()).device if device is None else torch.device(device)
    recorder = Recorder(sites, gradients=statistic == "loss", device=device)
    with recorder.attached(model):
        seen = show(
            model, examples_of(model, batches, limit, progress), device, recorder.begin, recorder.check,
            torch.Generator().manual_seed(seed) if statistic == "loss" else None,
        )  # fmt: skip
    recorder.check_gradients()
    reached = {name for name, _ in recorder.moments}
    unreached = tuple(name for name in sites if name not in reached)
    return Statistics(statistic, seen, recorder.moments, recorder.rows, recorder.pairs, unreached)


@outside_inference_mode
def watch_gradients(
    model: nn.Module,
    batches: Iterable,
    layers: Mapping[str, str],
    add: Callable[[str, Tensor, Tensor, int], None],
    *,
    of: Literal["input", "output"] = "input",
    seed: int = 0,
) -> int:
    """Show pictures under the sampled loss and pass on what enters some layers with a gradient; the number of pictures.

    Args:
        layers: path of each layer → the name to pass on. add: called with the name, the input (..., channels), the
            gradient ``of`` the input or of the layer's output, and the number of pictures.
    """
    pictures = 0

    def begin(count: int) -> None:
        nonlocal pictures
        pictures = count

    def observe(name: str) -> Callable[[nn.Module, tuple], tuple]:
        def keep(module: nn.Module, inputs: tuple) -> tuple:
            h = inputs[0].view_as(inputs[0])
            if h.requires_grad:
                rows = channels_last(module, h.detach())
                h.register_hook(lambda gradient: add(name, rows, channels_last(module, gradient), pictures))
            return (h, *inputs[1:])

        return keep

    def observe_output(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.requires_grad:
                rows = channels_last(module, inputs[0].detach())
                output.register_hook(lambda gradient: add(name, rows, channels_last(module, gradient), pictures))

        return keep

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for path, name in layers.items():
            layer = model.get_submodule(path)
            if of == "input":
                handle = layer.register_forward_pre_hook(observe(name))
            else:
                handle = layer.register_forward_hook(observe_output(name))
            stack.callback(handle.remove)
        shown = examples_of(model, batches)
        return show(model, shown, device, begin, lambda: None, torch.Generator().manual_seed(seed))


def show(
    model: nn.Module,
    examples: Iterable[Example],
    device: torch.device,
    begin: Callable[[int], None],
    end: Callable[[], None],
    labels: torch.Generator | None,
) -> int:
    """Show batches of pictures to a frozen model in evaluation mode, backwards too where labels can be drawn.

    Args:
        begin: called before each batch with the number of its pictures. end: called after each. labels: what labels are
            drawn with from the model's own predictions; None goes forward alone.

    Returns:
        The number of pictures. Raises DataError where there is none.
    """
    wanted, classes = [(p, p.requires_grad) for p in model.parameters()], classes_of(model)
    seen = 0
    model.to(device)
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with evaluating(model):
            for shown in examples:
                example = shown.on(device, next(model.parameters()).dtype, gradients=labels is not None)
                begin(shown.count)
                seen += shown.count
                if labels is None:
                    with torch.no_grad():
                        call(model, example)
                else:
                    with torch.enable_grad():
                        sampled_loss(call(model, example), classes, labels).backward()
                end()
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)
    if seen == 0:
        raise DataError("no pictures to calibrate on: got an empty iterable")
    return seen

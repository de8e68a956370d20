"""Streaming moments of what flows through the sites, and the statistics that methods are built on.

One pass over a few pictures records, for every site, small second moments: of queries and keys, of the heads' outputs, of a linear layer's narrower
side, and, for the loss-aware statistic, of the gradients there. Memory does not grow with the number of pictures. Labels are never
needed: the gradient is that of the loss on labels drawn from the model's own predictions (the true Fisher information).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.batches import parts_of_batch
from .errors import DataError, NumericsError, SettingsError, nearest
from .factors import Weights
from .grad_mode import ordinary, outside_inference_mode
from .hosts import find_sites, host_of
from .linalg import match_trace, shrinkage_weight
from .measure import is_classifier, model_output
from .measure.running import evaluating
from .sites import Attention, Projection, Site, Sites

StatisticName = Literal["weights", "activation", "loss"]
STATISTICS: tuple[StatisticName, ...] = ("weights", "activation", "loss")


class Moments:
    """Streaming second moments of rows with ``heads`` groups of ``width`` channels.

    Batches are reduced in their own precision around a running shift and accumulated in float64, so that a large mean does not eat
    the digits of a small variance. Also kept: ``Σ_i ‖S_i‖²`` over the pictures' own moments, for the shrinkage.
    """

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu", groups: int = 1) -> None:
        self.heads, self.width, self.groups = heads, width, groups
        self.pictures, self.rows = 0, 0.0
        self.shift: Tensor | None = None
        self.sum = torch.zeros(heads, width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(heads, width, width, dtype=torch.float64, device=device)
        self.square = torch.zeros(heads, dtype=torch.float64, device=device)
        self.group_square = torch.zeros(groups, dtype=torch.float64, device=device)

    def add(
        self,
        x: Tensor,
        pictures: int,
        *,
        centred: Literal["no", "all", "set"] = "no",
        per: Literal["row", "picture"] = "row",
    ) -> None:
        """Add a batch.

        Args:
            x: (..., rows of a softmax set, heads · width); leading dimensions are picture-major.
            pictures: how many pictures the batch holds.
            centred: ``"set"`` subtracts each set's own mean (keys); ``"all"`` keeps the mean so that it can be subtracted at the end.
            per: whether a picture's moment is its mean over rows or its sum.
        """
        x = x.detach().float()
        if centred == "set":
            x = x - x.mean(-2, keepdim=True)
        x = x.reshape(pictures, -1, self.heads, self.width)
        rows = x.shape[1]
        if centred == "all":
            if self.shift is None:
                self.shift = x.mean((0, 1), keepdim=True)
            x = x - self.shift
            self.sum += x.sum((0, 1)).double()
        x = x.permute(0, 2, 1, 3)  # (pictures, heads, rows, width)
        own = x.mT @ x  # (pictures, heads, width, width)
        if per == "row":
            own.div_(rows)
        self.outer += own.sum(0).double()
        square = own.square_().sum(0).double()
        self.square += square.sum((-2, -1))
        if self.groups > 1:
            self.group_square += (
                square[0].unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1)).sum((1, 3)).diagonal()
            )
        self.pictures += pictures
        self.rows += rows * pictures

    @property
    def mean(self) -> Tensor:
        """Mean over rows, (heads · width)."""
        mean = self.sum / max(self.rows, 1)
        return (mean if self.shift is None else mean + self.shift[0, 0].double()).flatten()

    @property
    def moment(self) -> Tensor:
        """Mean of the pictures' moments, less the mean's part where it was kept: (heads, width, width)."""
        moment = self.outer / max(self.pictures, 1)
        if self.shift is None:
            return moment
        mean = self.sum / max(self.rows, 1)
        return moment - mean[:, :, None] * mean[:, None, :]

    def shrunk(self, target: Tensor) -> Tensor:
        """The moment pulled to a target of the same trace (heads, width, width); see :func:`comcat.linalg.shrinkage_weight`."""
        moment = self.moment
        target = match_trace(target, moment)
        weight = shrinkage_weight(moment, target, self.square / max(self.pictures, 1), self.pictures)[..., None, None]
        return (1 - weight) * moment + weight * target

    def by_group(self) -> Moments:
        """The diagonal blocks alone: the moments of each of ``groups`` heads, out of the joint ones."""
        parts = Moments(self.groups, self.width // self.groups, self.sum.device)
        parts.pictures, parts.rows = self.pictures, self.rows
        parts.sum = self.sum.view(self.groups, -1)
        parts.shift = None if self.shift is None else self.shift.view(1, 1, self.groups, -1)
        blocks = (
            self.outer[0].unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1))
        )  # (group, row, group, column)
        parts.outer = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        parts.square = self.group_square
        return parts

    def finite(self) -> bool:
        return bool(torch.isfinite(self.outer).all() and torch.isfinite(self.sum).all())


@dataclass(frozen=True)
class Statistics:
    """What calibration has seen: moments per site and side.

    Attributes:
        name: ``"activation"`` or ``"loss"``. pictures: how many were seen. rows: mean rows (tokens) a picture at each site.
        pairs: query–key pairs a picture at each attention site.
    """

    name: str
    pictures: int
    moments: Mapping[tuple[str, str], Moments]
    rows: Mapping[str, float]
    pairs: Mapping[str, float]
    unreached: tuple[str, ...] = ()
    zero_biases: bool = False

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        """``G_A`` and ``G_B`` of a site (references: the module's docstring), shrunk towards those of the weights."""
        prior_a, prior_b = (g if g.ndim == 3 else g[None] for g in Weights().grams(model, site))
        device = self._device(site, prior_a.device)
        g_a, g_b = self._side(site, "a", prior_a.to(device)), self._side(site, "b", prior_b.to(device))
        return (g_a[0], g_b[0]) if site.kind == "linear" else (g_a, g_b)

    def mean(self, site: Site) -> Tensor | None:
        narrow_in = site.kind == "linear" and site.in_features <= site.out_features
        found = self.moments.get((site.name, "joint" if site.kind == "vo" else "a" if narrow_in else "mean"))
        return None if found is None else found.mean

    def covariance(self, site: Site) -> Tensor | None:
        found = self.moments.get((site.name, "joint"))
        if found is None or site.kind != "vo":
            return None
        moment = found.moment
        return found.shrunk(torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1)))[0]

    def _device(self, site: Site, otherwise: torch.device) -> torch.device:
        found = (m.outer.device for (name, _), m in self.moments.items() if name == site.name)
        return next(found, otherwise)  # a site never reached has its weights alone

    def _side(self, site: Site, side: Literal["a", "b"], prior: Tensor) -> Tensor:
        found = self.of(site, side)
        return prior if found is None else found.shrunk(prior)

    def of(self, site: Site, side: Literal["a", "b"]) -> Moments | None:
        """What was recorded on a side of a site, None where nothing was. A head's outputs are blocks of the joint moments."""
        joint = self.moments.get((site.name, "joint")) if side == "a" else None
        return self.moments.get((site.name, side)) if joint is None else joint.by_group()


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
        batches: batches of pictures (batch, channels, height, width), or (pictures, labels) pairs, or dicts with ``pixel_values`` or ``image``; labels are ignored.
        statistic: ``"activation"``: what flows in; ``"loss"``: and the gradients of the loss on labels drawn from the model's own predictions.
        sites: the sites to observe, by default all. limit: stop after so many pictures.

    Raises:
        DataError: without pictures. NumericsError: where an activation or gradient is not finite; the message names the site.
    """
    if statistic not in STATISTICS:
        raise SettingsError(
            f"got statistic {statistic!r}, expected one of {', '.join(STATISTICS)}{nearest(statistic, STATISTICS)}"
        )
    sites = find_sites(model) if sites is None else sites
    if statistic == "weights":
        raise SettingsError("statistic 'weights' needs no calibration: leave the statistics out")
    device = next(model.parameters()).device if device is None else torch.device(device)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    recorder = _Recorder(sites, gradients=statistic == "loss", device=device)
    seen = 0
    model.to(device)
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with evaluating(model), recorder.attached(model):
            for images in _images(batches, limit, progress):
                images = ordinary(images).to(device=device, dtype=next(model.parameters()).dtype)
                recorder.pictures = len(images)
                seen += len(images)
                if statistic == "loss":
                    with torch.enable_grad():
                        _sampled_loss(model, images.requires_grad_(True), generator).backward()
                else:
                    with torch.no_grad():
                        model_output(model, images)
                recorder.check()
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)
    if seen == 0:
        raise DataError("no pictures to calibrate on: got an empty iterable")
    return recorder.statistics(statistic, seen)


def _sampled_loss(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss on labels drawn from the model's own predictions; noise on the normalised feature for a backbone."""
    output = model_output(model, images).float()
    if is_classifier(model):
        probabilities = output.detach().softmax(-1).cpu()
        if not torch.isfinite(probabilities).all():
            raise NumericsError("the model's output holds NaN or infinite values on the calibration pictures")
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(output.device)
        return F.cross_entropy(output, labels, reduction="sum")
    feature = F.normalize(output.flatten(1), dim=-1)
    return (feature * torch.randn(feature.shape, generator=generator).to(feature)).sum()


def pictures_of(batch: Any, where: str = "a calibration batch") -> Tensor:
    """The pictures (batch, channels, height, width) of a batch (:func:`~comcat.data.batches.parts_of_batch`). Raises DataError for anything else."""
    images, _ = parts_of_batch(batch[:1] if isinstance(batch, tuple | list) else batch, where)
    if images.ndim < 3 or not len(images):
        raise DataError(
            f"{where}: got a tensor of {tuple(images.shape)}, expected pictures (batch, channels, height, width)"
        )
    return images


def _images(batches: Iterable, limit: int | None, progress: bool):
    from tqdm import tqdm

    if limit is not None and limit < 1:
        raise DataError(f"got a limit of {limit} pictures, expected at least 1")
    seen = 0
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    for batch in tqdm(batches, total=total, desc="calibrating", unit="batch", disable=not progress, leave=False):
        images = pictures_of(batch)
        images = images if limit is None else images[: limit - seen]
        seen += len(images)
        yield images
        if limit is not None and seen >= limit:
            return


class _Recorder:
    """Hooks on the projections of attention and on linear layers; fused attention can stay."""

    def __init__(self, sites: Sites, *, gradients: bool, device: torch.device) -> None:
        self.sites, self.gradients, self.device = sites, gradients, device
        self.pictures = 0
        self.moments: dict[tuple[str, str], Moments] = {}
        self.rows: dict[str, float] = {}
        self.pairs: dict[str, float] = {}

    def attached(self, model: nn.Module) -> ExitStack:
        stack = ExitStack()
        by_attention: dict[str, dict[str, Site]] = {}
        for site in self.sites.values():
            if site.attention is None:
                self._observe_linear(stack, model, site)
            else:
                by_attention.setdefault(site.path, {})[site.kind] = site
        for found in by_attention.values():
            attention = next(iter(found.values())).attention
            assert attention is not None
            stack.callback(host_of(attention).observe(model.get_submodule(attention.path)))
            if "qk" in found:
                self._observe_qk(stack, model, found["qk"], attention)
            if "vo" in found:
                self._observe_vo(stack, model, found["vo"], attention)
        return stack

    def _of(self, site: Site, side: str, heads: int, width: int, groups: int = 1) -> Moments:
        key = (site.name, side)
        if key not in self.moments:
            self.moments[key] = Moments(heads, width, self.device, groups)
        return self.moments[key]

    def _observe_qk(self, stack: ExitStack, model: nn.Module, site: Site, a: Attention) -> None:
        def rows_of(projection: Projection, output: Tensor) -> Tensor:
            return output[..., projection.start : projection.stop]

        def keep_q(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            q = rows_of(a.q, output).detach()
            if a.q.bias is not None:
                q = q + a.q.bias_or_none(model)  # type: ignore[operator]
            tokens = q.shape[:-1].numel() / self.pictures
            self.rows[site.name] = tokens
            self.pairs[site.name] = tokens * q.shape[-2]
            if not self.gradients:
                self._of(site, "a", a.heads, a.width).add(q, self.pictures)

        def keep_k(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self._of(site, "b", a.heads, a.width).add(rows_of(a.k, output), self.pictures, centred="set")
            if self.gradients and output.requires_grad:
                moments, pictures = self._of(site, "a", a.heads, a.width), self.pictures
                output.register_hook(lambda g: moments.add(rows_of(a.k, g), pictures, per="picture"))

        stack.enter_context(_hook(model.get_submodule(a.q.path).register_forward_hook(keep_q)))
        stack.enter_context(_hook(model.get_submodule(a.k.path).register_forward_hook(keep_k)))

    def _observe_vo(self, stack: ExitStack, model: nn.Module, site: Site, a: Attention) -> None:
        def keep(module: nn.Module, inputs: tuple) -> tuple:
            o = inputs[0].view_as(inputs[0])  # a tensor of its own, so that its gradient is this layer's alone
            tokens = o.shape[:-1].numel() / self.pictures
            self.rows[site.name] = tokens
            keys = o.shape[-2] if o.ndim == 3 else o.shape[1:-1].numel()
            self.pairs[site.name] = tokens * keys
            self._of(site, "joint", 1, a.heads * a.width, a.heads).add(o, self.pictures, centred="all")
            if self.gradients and o.requires_grad:
                moments, pictures = self._of(site, "b", a.heads, a.width), self.pictures
                o.register_hook(lambda g: moments.add(g, pictures, per="picture"))
            return (o, *inputs[1:])

        stack.enter_context(_hook(model.get_submodule(a.out).register_forward_pre_hook(keep)))

    def _observe_linear(self, stack: ExitStack, model: nn.Module, site: Site) -> None:
        narrow_in, width = site.in_features <= site.out_features, site.full_rank

        def keep_input(module: nn.Module, inputs: tuple) -> tuple | None:
            if inputs[0].shape[:-1].numel() % self.pictures:
                return None  # a table of positions, say: no rows of pictures
            x = inputs[0].view_as(inputs[0])
            x3 = _as_rows(x, self.pictures)
            self.rows[site.name] = x3.shape[1]
            if narrow_in:
                self._of(site, "a", 1, width).add(x3, self.pictures, centred="all")
                self._on_gradient(x, site, width)
            else:  # the output's moments are kept below; the input's mean is all that is needed of it
                mean = self._of(site, "mean", site.in_features, 1)
                mean.sum += x3.detach().sum((0, 1)).double()[:, None]
                mean.rows += x3.shape[0] * x3.shape[1]
            return (x, *inputs[1:])

        def keep_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.shape[:-1].numel() % self.pictures:
                return
            self._of(site, "a", 1, width).add(_as_rows(output, self.pictures), self.pictures, centred="all")
            self._on_gradient(output, site, width)

        module = model.get_submodule(site.path)
        stack.enter_context(_hook(module.register_forward_pre_hook(keep_input)))
        if not narrow_in:
            stack.enter_context(_hook(module.register_forward_hook(keep_output)))

    def _on_gradient(self, x: Tensor, site: Site, width: int) -> None:
        if self.gradients and x.requires_grad:
            moments, pictures = self._of(site, "b", 1, width), self.pictures
            x.register_hook(lambda g: moments.add(_as_rows(g, pictures), pictures, per="picture"))

    def check(self) -> None:
        for (name, _), moments in self.moments.items():
            if not moments.finite():
                raise NumericsError(
                    f"{name}: its activations or gradients hold NaN or infinite values on the calibration pictures"
                )

    def statistics(self, name: str, seen: int) -> Statistics:
        reached = {n for n, _ in self.moments}
        return Statistics(
            name, seen, self.moments, self.rows, self.pairs, tuple(n for n in self.sites if n not in reached)
        )


class _hook:
    def __init__(self, handle) -> None:
        self.handle = handle

    def __enter__(self):
        return self.handle

    def __exit__(self, *_) -> None:
        self.handle.remove()


def _as_rows(x: Tensor, pictures: int) -> Tensor:
    return x.reshape(pictures, -1, x.shape[-1])

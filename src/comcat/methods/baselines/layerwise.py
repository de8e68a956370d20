"""Published decompositions of each linear layer by what flows through it, as statistics.

Every matrix W (out, in), those of attention over all heads at once, becomes the W' of rank r that is nearest in a norm
taken from pictures. Nothing is shrunk and nothing is refitted: each is as its paper has it.

- **FWSVD** (Hsu et al., ICLR 2022): ``Σ_i f_i ‖W_·i − W'_·i‖²``, f_i the Fisher information of the weights that read
  input i, summed. The paper takes the task's labels; here they are drawn from the model's own predictions.
- **SVD-LLM** (Wang et al., ICLR 2025), its whitening: ``E ‖(W − W') x‖²`` with x as it comes, its mean included. Its
  training afterwards is not part of it.
- **Feature PCA** (Yu and Wu, AAAI 2023, AAFM): ``W' = U Uᵀ W`` and ``b' = U Uᵀ b + (I − U Uᵀ) E[y]``, U the leading
  eigenvectors of the outputs' covariance: ``E ‖y − y'‖²`` is least. An attention's matrix without a bias of its own
  gets none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...factors import Weights
from ...hosts import host_of
from ...sites import HiddenSite, LinearSite, ProductSite, Site, Sites, part
from ...statistics import calibrate, watch_gradients

Kind = Literal["fwsvd", "svd-llm", "feature-pca"]


@dataclass(frozen=True)
class Layerwise:
    """A statistic of matrices, for linear sites and for the matrix form of attention.

    ``moments`` holds, by layer and first row, the metric of the input (in, in), or of the output (out, out) where that
    is the narrower side. ``means`` holds the input's mean (in,) by layer, where biases make up for it.
    See :class:`comcat.factors.Statistic` and :class:`comcat.forms.matrix.LayerStatistic`.
    """

    name: str
    moments: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)
    zero_biases: bool = False

    def layer(self, path: str, start: int) -> tuple[Tensor, Tensor | None]:
        """The metric of the narrower side of a layer's rows from ``start`` on, and the input's mean."""
        if (path, start) not in self.moments:
            raise PlanError(f"{path}: got a plan for it, but {self.name} was measured without it")
        return self.moments[path, start], self.means.get(path)

    def grams(self, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
        """Of a linear site that was measured; of anything else those of the weights alone."""
        gram_a, gram_b = Weights().grams(model, site)
        if isinstance(site, LinearSite) and (site.path, 0) in self.moments:
            gram_a = self.moments[site.path, 0].to(gram_b)
        return gram_a, gram_b

    def mean(self, site: Site) -> Tensor | None:
        return self.means.get(site.path) if isinstance(site, LinearSite) else None

    def covariance(self, site: Site) -> Tensor | None:
        return None

    def importance(self, model: nn.Module, site: HiddenSite) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Rows:
    """The rows of a linear layer that one matrix is."""

    path: str
    start: int
    stop: int

    def weight(self, model: nn.Module) -> Tensor:
        return part(model, self.path).weight[self.start : self.stop].detach().flatten(1).double()


def layerwise(kind: Kind, model: nn.Module, sites: Sites, batches: Iterable, *, seed: int = 0) -> Layerwise:
    """Measure every matrix of some sites. ``seed`` draws FWSVD's labels.

    Raises:
        DataError: without pictures.
    """
    rows = list(dict.fromkeys(rows_of(model, sites)))
    with ExitStack() as stack:
        for site in sites.values():
            if isinstance(site, ProductSite):  # so that its layers are called, whatever its forward does
                stack.callback(host_of(site.attention).observe(model.get_submodule(site.attention.path)))
        if kind == "fwsvd":
            fisher = input_fisher(model, rows, batches, seed=seed)
            moments = {r: f.diag() for r, f in fisher.items()}
            return Layerwise(kind, {(r.path, r.start): narrower(r.weight(model), m) for r, m in moments.items()})
        return _from_moments(kind, model, rows, batches)


def rows_of(model: nn.Module, sites: Sites) -> Iterator[Rows]:
    """The matrices of some sites: a linear layer each, and W_Q, W_K, W_V and W_O."""
    for site in sites.values():
        if isinstance(site, LinearSite):
            yield Rows(site.path, 0, site.out_features)
        elif isinstance(site, ProductSite) and not site.attention.normed:  # form 'matrix' refuses those
            a = site.attention
            for projection in (a.q, a.k) if site.kind == "qk" else (a.v,):
                yield Rows(projection.path, projection.start, projection.stop)
            if site.kind == "vo":
                yield Rows(a.out, 0, part(model, a.out).weight.shape[0])


def narrower(weight: Tensor, metric: Tensor) -> Tensor:
    """A metric of the input (in, in) as one of the narrower side of a weight (out, in)."""
    metric = metric.double()
    return metric if weight.shape[1] <= weight.shape[0] else weight @ metric @ weight.mT


def _from_moments(kind: Kind, model: nn.Module, rows: list[Rows], batches: Iterable) -> Layerwise:
    """The moments of inputs (or of outputs, where these are fewer), centred or not."""
    layers = {}
    for path in dict.fromkeys(r.path for r in rows):
        out, into = part(model, path).weight.shape[:2]  # of a 1×1 convolution as well
        layers[path] = LinearSite(path, "linear", path, min(out, into), into, out)
    seen = calibrate(model, batches, statistic="activation", sites=Sites(layers))
    moments: dict[tuple[str, int], Tensor] = {}
    means: dict[str, Tensor] = {}
    for r in rows:
        site, weight = layers[r.path], r.weight(model)
        found, mean = seen.of(site, "a"), seen.mean(site)
        if found is None or mean is None:
            continue
        moment, narrow_in = found.moment[0], site.in_features <= site.out_features
        if kind == "feature-pca":
            means[r.path] = mean
        else:
            middle = mean if narrow_in else part(model, r.path).weight.detach().flatten(1).double() @ mean
            moment = moment + middle.outer(middle)
        moments[r.path, r.start] = narrower(weight, moment) if narrow_in else moment[r.start : r.stop, r.start : r.stop]
    return Layerwise(kind, moments, means)


def input_fisher(model: nn.Module, rows: list[Rows], batches: Iterable, *, seed: int = 0) -> dict[Rows, Tensor]:
    """For each input of each matrix, the Fisher information of the weights that read it, summed: (in,), float64.

    It is the mean over pictures of ``Σ_o (∂L/∂W_oi)²``, the labels drawn from the model's own predictions.
    """
    totals = {r: torch.zeros(part(model, r.path).weight.shape[1], dtype=torch.float64) for r in rows}

    def add(path: str, x: Tensor, gradient: Tensor, pictures: int) -> None:
        if x.shape[:-1].numel() % pictures:
            return  # a table of positions, say: no rows of pictures
        x, gradient = (t.detach().float().reshape(pictures, -1, t.shape[-1]) for t in (x, gradient))
        for one, its in zip(x, gradient, strict=True):
            slopes = (its.mT @ one).square()  # (out, in)
            for r, total in totals.items():
                if r.path == path:
                    total += slopes[r.start : r.stop].sum(0).double().cpu()

    seen = watch_gradients(model, batches, {r.path: r.path for r in rows}, add, of="output", seed=seed)
    return {r: total.to(part(model, r.path).weight.device) / max(seen, 1) for r, total in totals.items()}

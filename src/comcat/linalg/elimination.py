"""Which hidden units of a feed-forward to keep, in closed form.

Notation: ``y = W h + b`` reads n hidden units h with mean μ and covariance C; G is the metric of errors at y (the
second moment of ∂L/∂y, summed over a picture's tokens, or the identity). Keep a subset K and refit W on it:

    X_K = W C[:, K] C[K, K]⁻¹,    b' = b + W μ − X_K μ_K,

which is the best linear prediction of y from the kept units. Removing unit j from the current set then costs
``½ w_jᵀ G w_j / [C⁻¹]_jj``, with w_j its *refitted* column, after which C⁻¹ and W take a rank-one downdate (the optimal
brain surgeon of Hassibi and Stork 1993, on the outputs of a layer). One greedy elimination orders all units, so every
width is a prefix of the order, and its predicted loss is the sum of the prices of what was removed.

Units have no scale of their own (``W D`` with ``D⁻¹ h`` is the same layer), so everything is done on units of variance
one, and the ridge is relative to each unit's own variance. Tensors in, tensors out, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError, SettingsError

RIDGE = 1e-3
"""Relative ridge on every unit's variance: how far the covariance of a few pictures is trusted."""
BLOCK = 16
"""Units that are removed between two downdates of the whole inverse; they are found one by one in a small pool."""
_POOL = 4
"""Candidates for each unit of a block: the cheapest ones at its start."""
_DENSE = 7 / 8
"""The share of living rows at which the matrices are made smaller."""


@dataclass(frozen=True)
class Elimination:
    """All widths of a feed-forward at once.

    Attributes:
        order: units from the most important one to the first that goes, (n,). The best k are ``order[:k]``.
        prices: what removing ``order[i]`` costs when all after it are gone, (n,): nats a picture under the loss-aware
            metric.
    """

    order: Tensor
    prices: Tensor

    def kept(self, units: int) -> Tensor:
        """The units that stay, ascending, (units,). Raises SettingsError where the number is out of range."""
        if not 1 <= units <= len(self.order):
            raise SettingsError(f"got {units} units, expected 1 to {len(self.order)}")
        return self.order[:units].sort().values


def eliminate(
    covariance: Tensor, weight: Tensor, metric: Tensor | None = None, *, ridge: float = RIDGE, block: int = BLOCK
) -> Elimination:
    """Order units by what removing them costs, the cheapest first to go.

    Args:
        covariance: C of the hidden units (n, n). weight: W (out, n). metric: G (out, out), by default the identity.
        ridge: relative to each unit's variance. block: units to remove between two downdates of the whole.

    Cost: one n × n inverse and ``n³ / block`` numbers moved; memory three n × n matrices.

    Raises:
        SettingsError: if the shapes do not fit. NumericsError: if an argument holds NaN or infinity.
    """
    n = len(covariance)
    if covariance.shape != (n, n) or weight.ndim != 2 or weight.shape[1] != n:
        raise SettingsError(f"got a covariance {tuple(covariance.shape)} and a weight {tuple(weight.shape)}")
    if block < 1:
        raise SettingsError(f"got block={block}, expected at least 1")
    correlation, scale = _standardised(covariance, ridge)
    reading = weight.double() * scale  # (out, n), of units of variance one
    if metric is not None:
        reading = _root(metric).mT @ reading
    if not torch.isfinite(reading).all():
        raise NumericsError("a weight or a metric of the output holds NaN or infinite values")
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    del correlation
    left = torch.arange(n, device=inverse.device)
    here = torch.ones(n, dtype=torch.bool, device=inverse.device)  # which of the rows at hand still count
    gone: list[Tensor] = []
    prices: list[Tensor] = []
    for start in range(0, n, block):
        if int(here.sum()) <= _DENSE * len(here):  # copying now and then is cheaper than carrying what is gone along
            inverse, reading = inverse[here][:, here].contiguous(), reading[:, here].contiguous()
            left, here = left[here], here[here]
        step = min(block, n - start)
        cost = torch.where(here, reading.square().sum(0) / inverse.diagonal(), torch.inf)
        pool = cost.topk(min(_POOL * step, n - start), largest=False).indices
        local, price = _one_by_one(inverse[pool][:, pool], reading[:, pool], step)
        chosen = pool[local]
        gone.append(left[chosen])
        prices.append(price)
        here[chosen] = False
        rows = inverse[chosen]  # (step, left)
        solved = torch.linalg.solve(rows[:, chosen], rows)
        reading.addmm_(reading[:, chosen], solved, alpha=-1)
        inverse.addmm_(rows.mT, solved, alpha=-1)
        inverse.diagonal()[chosen] = 1.0  # what is left of a row that is gone is rounding
    return Elimination(torch.cat(gone).flip(0), torch.cat(prices).flip(0).clamp_min(0))


def refit_units(covariance: Tensor, weight: Tensor, kept: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """``X_K = W C[:, K] C[K, K]⁻¹``: the weight on the kept units that best restores what all units gave, (out, kept).

    Args:
        covariance: C (n, n). weight: W (out, n). kept: positions of the kept units (k,). ridge: as in
            :func:`eliminate`.

    Kept columns pass unchanged where all units are kept.

    Raises:
        NumericsError: if an argument holds NaN or infinity.
    """
    correlation, scale = _standardised(covariance, ridge)
    reading = weight.double() * scale
    others = torch.ones(len(correlation), dtype=torch.bool, device=correlation.device)
    others[kept] = False
    result = reading[:, kept]
    if others.any():
        moved = (
            reading[:, others] @ correlation[others][:, kept]
        )  # (out, kept): what the removed ones share with the kept
        lower = torch.linalg.cholesky(correlation[kept][:, kept])
        result = result + torch.cholesky_solve(moved.mT, lower).mT
    if not torch.isfinite(result).all():
        raise NumericsError("a weight to refit holds NaN or infinite values")
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))[kept]
    dead = scale[kept] == 0
    return torch.where(dead, weight.double()[:, kept], result / safe)


def _standardised(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The correlation matrix with a ridge on its diagonal, and the units' deviations; dead units stand alone."""
    covariance = covariance.double()
    scale = covariance.diagonal().clamp_min(0).sqrt()
    if not torch.isfinite(covariance.sum()):
        raise NumericsError("a covariance of hidden units holds NaN or infinite values")
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-300), torch.zeros_like(scale))
    correlation = covariance * inverse[:, None]
    correlation *= inverse
    diagonal = correlation.diagonal()
    diagonal.fill_(1 + ridge)
    return correlation, scale


def _root(metric: Tensor) -> Tensor:
    """``L`` with ``G = L Lᵀ`` of a positive semi-definite metric."""
    metric = metric.double()
    if not torch.isfinite(metric.sum()):
        raise NumericsError("a metric of the output holds NaN or infinite values")
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()


def _one_by_one(inverse: Tensor, reading: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Remove the cheapest of a few units, one after the other: their positions (steps,) and each one's price at its
    turn.
    """
    shared = reading.mT @ reading  # all that prices need: (b, b)
    here = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    order, prices = [], []
    for _ in range(steps):
        cost = torch.where(here, shared.diagonal() / inverse.diagonal(), torch.inf)
        j = int(cost.argmin())
        order.append(j)
        prices.append(cost[j] / 2)
        here[j] = False
        pull = inverse[j] / inverse[j, j]  # what column i takes over of column j, negative
        column = shared[:, j]
        shared = shared - torch.outer(pull, column) - torch.outer(column, pull) + shared[j, j] * torch.outer(pull, pull)
        inverse = inverse - torch.outer(pull, inverse[j])
    return torch.tensor(order, device=inverse.device), torch.stack(prices)

"""Distances between sets of feature vectors, and how alike the vectors are. Tensors in, numbers out; all in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, NumericsError, SettingsError

SUBSETS, SUBSET_SIZE = 100, 1000
FEW_FOR_FID = 2048
"""With fewer pictures than this on a side, FID is mostly its own bias."""


@dataclass(frozen=True)
class KID:
    """The mean over random subsets of the unbiased estimate, and its standard deviation from one subset to the next."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kid(x: Tensor, y: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0) -> KID:
    """Kernel inception distance (Bińkowski et al. 2018): :func:`mmd2` averaged over subsets drawn without replacement.

    The mean's expectation does not depend on the subsets' size, its spread does: ``std`` is that of a subset's
    estimate, not of the mean. Subsets hold at most half of the smaller set, since of whole sets there is only one to
    draw.

    Args:
        x, y: features (n, features) and (m, features), n and m at least 2.
        subsets: how many subsets.
        subset_size: vectors from each set in one.

    Raises:
        DataError: with fewer than 2 vectors on a side, or different numbers of features. SettingsError: on sizes out of
            range.
        NumericsError: for features that are not finite.
    """
    x, y = _two_sets(x, y, "KID")
    if subsets < 1 or subset_size < 2:
        raise SettingsError(f"KID: got {subsets} subsets of {subset_size}, expected at least 1 of at least 2")
    size = max(2, min(subset_size, min(len(x), len(y)) // 2))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        rows = (torch.randperm(len(s), generator=generator)[:size] for s in (x, y))
        found.append(mmd2(*(s[r] for s, r in zip((x, y), rows, strict=True))))
    values = torch.tensor(found, dtype=torch.float64)
    return KID(float(values.mean()), float(values.std(correction=0)), subsets, size)


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, Eq. 3); negative at times.

    The kernel is Bińkowski et al.'s, k(a, b) = (aᵀb / d + 1)³ with d features. x: (n, d), y: (m, d). Raises as
    :func:`kid`.
    """
    x, y = _two_sets(x, y, "the mean discrepancy")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3  # (rows of a, rows of b)

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def fid(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets (Heusel et al. 2017): ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2
    (C₁C₂)^½).

    With Cᵢ = AᵢᵀAᵢ, tr (C₁C₂)^½ is the sum of the singular values of A₁A₂ᵀ. That needs no root of a matrix, and holds
    where covariances are singular, as they are with fewer pictures than features. The estimate is biased upwards, by
    much with few pictures (Chong and Forsyth 2020). x: (n, d), y: (m, d).

    Raises:
        DataError: with fewer than 2 vectors on a side, or different numbers of features. NumericsError: for features
            that are not finite.
    """
    x, y = _two_sets(x, y, "FID")
    a, b = _root(x), _root(y)
    apart = (x.mean(0) - y.mean(0)).square().sum()
    overlap = torch.linalg.svdvals(a @ b.mT).sum()
    return max(0.0, float(apart + a.square().sum() + b.square().sum() - 2 * overlap))


def _root(x: Tensor) -> Tensor:
    """A, (at most d, d), of the covariance AᵀA (d, d) of x, (n, d)."""
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R


def pairwise_cosine(x: Tensor, y: Tensor) -> float:
    """The mean cosine over all pairs of a vector of x, (n, d), and one of y, (m, d): DreamBooth's CLIP-I and DINO (Ruiz
    et al. 2023).
    """
    x, y = _two_sets(x, y, "the pairwise similarity", least=1)
    return float(_unit(x).mean(0) @ _unit(y).mean(0))


def paired_cosine(x: Tensor, y: Tensor) -> float:
    """The mean cosine between each vector of x, (n, d), and that of y, (n, d), in its row: CLIP-T.

    Raises:
        DataError: if there are not as many of both.
    """
    x, y = _two_sets(x, y, "the similarity of pairs", least=1)
    if len(x) != len(y):
        raise DataError(f"got {len(x)} and {len(y)} vectors to compare in pairs, expected as many of both")
    return float((_unit(x) * _unit(y)).sum(1).mean())


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _two_sets(x: Tensor, y: Tensor, what: str, *, least: int = 2) -> tuple[Tensor, Tensor]:
    for s in (x, y):
        if s.ndim != 2:
            raise DataError(f"{what}: got features of shape {tuple(s.shape)}, expected (vectors, features)")
        if len(s) < least:
            raise DataError(f"{what} needs at least {least} pictures on either side; got {len(x)} and {len(y)}")
        if not s.isfinite().all():
            raise NumericsError(f"{what}: the features hold NaN or infinity")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"{what}: got {x.shape[1]} and {y.shape[1]} features a vector; both sets need one extractor")
    return x.detach().cpu().double(), y.detach().cpu().double()

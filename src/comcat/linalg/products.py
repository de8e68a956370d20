"""Best low-rank products from Gram matrices.

Notation: a product is ``M = A Bᵀ`` with thin ``A`` (m × k) and ``B`` (n × k); a *Gram* of a side is the k × k matrix
``G_A = Aᵀ C_A A`` for a metric ``C_A`` on that side. Weights alone mean ``C = I``; activation-aware means ``C`` is the
second moment of what enters that side; loss-aware means the second moment of the gradient there. In every case the Gram
is the second moment of something that flows through the layer (a query, a key, a head's output, or its gradient), so no
m × m metric is ever formed, and neither is the m × n product.

Everything here is tensors in, tensors out, batched over leading dimensions (heads), and computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError, SettingsError

RIDGE = 1e-10
"""Relative ridge that makes a singular Gram invertible: a direction that never occurs costs nothing to lose."""


@dataclass(frozen=True)
class Factorization:
    """The products of a site, factorised in order, so that every rank is a prefix.

    With ``G_A = L_A L_Aᵀ``, ``G_B = L_B L_Bᵀ`` and ``SVD(L_Aᵀ L_B) = P Σ Rᵀ``, the best rank-r product under
    ``‖C_A^½ (M − M') C_B^½‖_F`` is ``M' = (A · left[..., :r]) (B · right[..., :r])ᵀ`` with
    ``left = L_A⁻ᵀ P Σ^½`` and ``right = L_B⁻ᵀ R Σ^½``. The squared error of rank r is ``Σ_{i ≥ r} σ_i²``.

    Shapes: ``left``, ``right`` (..., k, k); ``singular_values`` (..., k), descending.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first ``rank`` columns of both maps, each (..., k, rank).

        Raises SettingsError where the rank is out of range.
        """
        full = self.singular_values.shape[-1]
        if not 1 <= rank <= full:
            raise SettingsError(f"got rank {rank}, expected 1 to {full}")
        return self.left[..., :rank], self.right[..., :rank]


def gram(factor: Tensor) -> Tensor:
    """``AᵀA`` of a thin factor (..., m, k), in float64: (..., k, k)."""
    factor = factor.double()
    return factor.mT @ factor


def root(matrix: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """A root ``L`` of a positive semi-definite matrix, ``G ≈ L Lᵀ``, and ``L⁻ᵀ``; both (..., k, k).

    A ridge of ``ridge · tr(G)/k`` is added, and an all-zero matrix counts as ``ridge · I``. Falls back from Cholesky to
    eigenvalues where rounding has made the matrix indefinite.

    Raises:
        NumericsError: if the matrix holds NaN or infinity.
    """
    matrix = matrix.double()
    _check_finite("a Gram matrix", matrix)
    k = matrix.shape[-1]
    matrix = (matrix + matrix.mT) / 2
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    eye = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
    matrix = matrix / scale + ridge * eye
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    else:
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(ridge).sqrt()
        lower = vectors * values[..., None, :]
        inverse = (vectors / values[..., None, :]).mT
    return lower * scale.sqrt(), inverse.mT / scale.sqrt()


def factorize(gram_a: Tensor, gram_b: Tensor, *, ridge: float = RIDGE) -> Factorization:
    """Factorise a batch of products from the Grams of their two sides (..., k, k); see :class:`Factorization`.

    Full rank reproduces ``A Bᵀ`` to rounding. Where a Gram is all zero every singular value is: there is nothing to
    lose. Cost: three k × k decompositions a product, whatever m and n are.

    Raises:
        SettingsError: if the shapes differ or are not square. NumericsError: if a Gram holds NaN or infinity.
    """
    if gram_a.shape != gram_b.shape or gram_a.shape[-1] != gram_a.shape[-2]:
        raise SettingsError(
            f"got Grams of shapes {tuple(gram_a.shape)} and {tuple(gram_b.shape)}, expected two equal (..., k, k)"
        )
    root_a, inverse_a = root(gram_a, ridge=ridge)
    root_b, inverse_b = root(gram_b, ridge=ridge)
    p, sigma, rt = torch.linalg.svd(root_a.mT @ root_b)
    half = sigma.sqrt()[..., None, :]
    occurs = [g.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) > 0 for g in (gram_a, gram_b)]
    return Factorization(inverse_a @ p * half, inverse_b @ rt.mT * half, sigma * (occurs[0] & occurs[1]))


def product_singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of ``A Bᵀ`` for thin factors (..., m, k) and (..., n, k): two thin QRs and a k × k SVD; (..., k).

    Raises:
        NumericsError: if a factor holds NaN or infinity.
    """
    _check_finite("a factor", a, b)
    ra = torch.linalg.qr(a.double(), mode="r").R
    rb = torch.linalg.qr(b.double(), mode="r").R
    return torch.linalg.svdvals(ra @ rb.mT)


def shrinkage_weight(moment: Tensor, target: Tensor, mean_square: Tensor, count: int) -> Tensor:
    """How far to pull a sample moment to a target: Ledoit and Wolf's (2004) estimate, the picture being the sample.

    Tokens of one picture are anything but independent, so the sampling error is estimated from the spread of the
    pictures' own moments ``S_i``: ``ρ = (1/n²) Σ‖S_i − S‖² / ‖S − T‖²``, clipped to [0, 1]; a single picture has no
    spread, so ρ = 1/2 there.

    Args:
        moment: ``S``, mean of the pictures' moments (..., k, k).
        target: ``T`` (..., k, k).
        mean_square: ``(1/n) Σ ‖S_i‖_F²`` (...).
        count: pictures, n.

    Returns:
        ρ, shape (...).
    """
    if count < 2:
        return torch.full(moment.shape[:-2], 0.5, dtype=moment.dtype, device=moment.device)
    spread = (mean_square - moment.square().sum((-2, -1))).clamp_min(0) / (count - 1)
    distance = (moment - target).square().sum((-2, -1))
    return torch.where(distance > 0, (spread / distance.clamp_min(1e-300)).clamp(max=1.0), torch.zeros_like(distance))


def match_trace(target: Tensor, moment: Tensor) -> Tensor:
    """``target`` scaled to the trace of ``moment``, both (..., k, k); a target of zeros stays one."""
    trace = target.diagonal(dim1=-2, dim2=-1).sum(-1)
    wanted = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    return target * torch.where(trace > 0, wanted / trace.clamp_min(1e-300), 0.0)[..., None, None]


def refit(covariance: Tensor, basis: Tensor, weight: Tensor, *, ridge: float = 1e-6) -> Tensor:
    """The output factor that best restores ``X W`` from ``X T``: ridge regression over all heads at once.

    ``S = (Tᵀ C T + λ I)⁻¹ Tᵀ C W`` with ``C`` the covariance of X. Truncating head by head leaves errors that are
    correlated over heads; this takes back what the kept channels of other heads can explain.

    Args:
        covariance: C (D, D). basis: T (D, R). weight: W (D, out). ridge: λ relative to the mean diagonal of ``Tᵀ C T``.

    Returns:
        S (R, out), float64. Its error ``‖C^½ (W − T S)‖²`` is at most that of any other S', plus λ ‖S'‖².

    Raises:
        NumericsError: if an argument holds NaN or infinity.
    """
    basis, weight, covariance = basis.double(), weight.double(), covariance.double()
    _check_finite("an argument of the refit", covariance, basis, weight)
    moment = covariance @ basis
    normal = basis.mT @ moment
    level = normal.diagonal().mean().clamp_min(1e-300)
    normal = normal + ridge * level * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return torch.linalg.solve(normal, moment.mT @ weight)


def _check_finite(what: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(t).all() for t in tensors):
        raise NumericsError(f"{what} holds NaN or infinite values")

"""Properties of the mathematics, for any shape, rank, batch and dtype, singular matrices included."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from comcat.errors import NumericsError, SettingsError
from comcat.linalg import RIDGE, factorize, gram, match_trace, product_singular_values, refit, root, shrinkage_weight

pytestmark = pytest.mark.filterwarnings("error")
EXAMPLES = settings(max_examples=30)


@st.composite
def products(draw: st.DrawFn, *, singular: bool = False) -> tuple[Tensor, Tensor]:
    """Thin factors A (batch…, m, k), B (batch…, n, k). Singular ones have dead or repeated columns, or are zero."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    k = draw(st.integers(1, 8))
    m, n = (draw(st.integers(k, 12)) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randn(*batch, size, k, generator=generator, dtype=torch.float64) for size in (m, n))
    # singular values of every factor between a half and two: how well posed the question is, is not the question
    a, b = (
        u @ (s.clamp(0.5, 2)[..., None] * vh) for u, s, vh in (torch.linalg.svd(t, full_matrices=False) for t in (a, b))
    )
    if singular:
        for factor in (a, b):
            match draw(st.sampled_from(["regular", "dead", "repeated", "zero"])):
                case "dead":
                    factor[..., draw(st.integers(0, k - 1))] = 0
                case "repeated":
                    factor[...] = factor[..., :1].clone()
                case "zero":
                    factor.zero_()
    return (a * scale).to(dtype), b.to(dtype)


def split(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """The truncated product, (..., m, n), float64."""
    left, right = factorize(gram(a), gram(b)).truncate(rank)
    return (a.double() @ left) @ (b.double() @ right).mT


def size(a: Tensor, b: Tensor) -> float:
    """What an error of a product is relative to: ‖A‖ ‖B‖, or one where a factor is zero."""
    return float(a.double().norm() * b.double().norm()) or 1.0


@EXAMPLES
@given(products(singular=True))
def test_full_rank_reproduces_the_product(factors: tuple[Tensor, Tensor]) -> None:
    a, b = factors
    torch.testing.assert_close(split(a, b, a.shape[-1]), a.double() @ b.double().mT, rtol=0, atol=1e-9 * size(a, b))


@EXAMPLES
@given(products())
def test_singular_values_are_those_of_the_dense_product(factors: tuple[Tensor, Tensor]) -> None:
    a, b = factors
    k = a.shape[-1]
    dense = torch.linalg.svdvals(a.double() @ b.double().mT)[..., :k]
    for found in (factorize(gram(a), gram(b)).singular_values, product_singular_values(a, b)):
        assert found.shape == (*a.shape[:-2], k) and found.dtype == torch.float64
        torch.testing.assert_close(found, dense, rtol=1e-8, atol=1e-8 * float(dense.max()))
        assert (found.diff(dim=-1) <= 0).all()


@EXAMPLES
@given(products(singular=True), st.data())
def test_the_error_of_a_rank_is_the_tail_and_the_least(factors: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    a, b = factors
    rank = data.draw(st.integers(1, a.shape[-1]))
    product = a.double() @ b.double().mT
    error = (product - split(a, b, rank)).square().sum((-2, -1))
    tail = factorize(gram(a), gram(b)).singular_values[..., rank:].square().sum(-1)
    slack = 1e-8 * size(a, b) ** 2  # the ridge of singular Grams, squared
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=slack)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for other in _other_approximations(product, a, b, rank, generator):
        assert (error <= (product - other).square().sum((-2, -1)) + slack).all()


def _other_approximations(product: Tensor, a: Tensor, b: Tensor, rank: int, generator: torch.Generator):
    """Rank-r products that somebody could have thought of: fewer columns, each factor's own SVD, a random sketch, the
    dense SVD.
    """
    a, b = a.double(), b.double()
    yield a[..., :rank] @ b[..., :rank].mT
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    yield (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :] @ b.mT
    sketch, _ = torch.linalg.qr(
        product @ torch.randn(*product.shape[:-2], product.shape[-1], rank, generator=generator, dtype=torch.float64)
    )
    yield sketch @ (sketch.mT @ product)
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    yield (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


@EXAMPLES
@given(products(), st.data())
def test_metrics_on_both_sides(factors: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """``G = Aᵀ C A`` on either side gives the dense weighted optimum, without a metric of the dense size in the
    computation.
    """
    a, b = (f.double() for f in factors)
    rank = data.draw(st.integers(1, a.shape[-1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    roots = []
    for side in (a, b):
        u, _, vh = torch.linalg.svd(
            torch.randn(side.shape[-2], side.shape[-2], generator=generator, dtype=torch.float64)
        )
        roots.append(u @ (torch.linspace(0.5, 2, side.shape[-2], dtype=torch.float64)[:, None] * vh))
    left, right = factorize(gram(roots[0] @ a), gram(roots[1] @ b)).truncate(rank)
    error = roots[0] @ (a @ b.mT - (a @ left) @ (b @ right).mT) @ roots[1].mT
    best = torch.linalg.svdvals(roots[0] @ a @ b.mT @ roots[1].mT)[..., rank : a.shape[-1]].square().sum(-1)
    torch.testing.assert_close(error.square().sum((-2, -1)), best, rtol=1e-6, atol=1e-12 * size(a, b) ** 2)


@EXAMPLES
@given(products(singular=True))
def test_ranks_are_nested(factors: tuple[Tensor, Tensor]) -> None:
    a, b = factors
    found = factorize(gram(a), gram(b))
    full = found.truncate(a.shape[-1])
    for rank in range(1, a.shape[-1] + 1):
        for thin, whole in zip(found.truncate(rank), full, strict=True):
            assert thin.shape[-1] == rank and thin.equal(whole[..., :rank])


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_out_of_range(rank: int) -> None:
    found = factorize(torch.eye(4), torch.eye(4))
    with pytest.raises(SettingsError, match=f"got rank {rank}, expected 1 to 4"):
        found.truncate(rank)


@pytest.mark.parametrize("shapes", [((3, 3), (4, 4)), ((2, 3), (2, 3)), ((2, 3, 3), (3, 3))])
def test_grams_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(SettingsError, match="expected two equal"):
        factorize(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    good, bad = torch.eye(3), torch.eye(3)
    bad[1, 1] = value
    for call in (
        lambda: root(bad),
        lambda: factorize(good, bad),
        lambda: factorize(bad, good),
        lambda: product_singular_values(bad, good),
    ):
        with pytest.raises(NumericsError, match="NaN or infinite"):
            call()
    for arguments in ((bad, good, good), (good, bad, good), (good, good, bad)):
        with pytest.raises(NumericsError, match="NaN or infinite"):
            refit(*arguments)


@EXAMPLES
@given(products(singular=True))
def test_roots(factors: tuple[Tensor, Tensor]) -> None:
    for factor in factors:
        matrix = gram(factor)
        lower, inverse = root(matrix)
        k = matrix.shape[-1]
        level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(k, dtype=torch.float64)
        ridge = RIDGE * torch.where(level > 0, level, 1.0) * eye
        torch.testing.assert_close(
            lower @ lower.mT, matrix + ridge, rtol=1e-9, atol=1e-13 * float(matrix.abs().max()) + 1e-15
        )
        torch.testing.assert_close(inverse.mT @ lower, eye.expand_as(lower), rtol=0, atol=1e-5)


def test_a_gram_that_rounding_made_indefinite() -> None:
    """Calibration in float32 leaves slightly negative eigenvalues, on one head of several."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(2, 5, 5, dtype=torch.float64)).Q
    values = torch.tensor([[3.0, 2.0, 1.0, 0.5, -1e-7], [3.0, 2.0, 1.0, 0.5, 0.2]], dtype=torch.float64)
    matrix = vectors * values[:, None] @ vectors.mT
    lower, inverse = root(matrix)
    torch.testing.assert_close(lower @ lower.mT, matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(inverse.mT @ lower, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), rtol=0, atol=1e-8)
    left, right = factorize(matrix, matrix).truncate(5)
    torch.testing.assert_close(left @ right.mT, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), rtol=0, atol=1e-8)


def test_a_side_that_never_occurs_leaves_nothing_to_lose() -> None:
    """However large the other side is; and its factors still reproduce the product at full rank."""
    large = 1e12 * gram(torch.randn(2, 6, 3))
    dead = large.clone()
    dead[0] = 0
    for grams in ((dead, large), (large, dead)):
        found = factorize(*grams)
        assert (
            found.singular_values[0].equal(torch.zeros(3, dtype=torch.float64)) and (found.singular_values[1] > 0).all()
        )
        left, right = found.truncate(3)
        torch.testing.assert_close(
            left @ right.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), rtol=0, atol=1e-8
        )


# ---------------------------------------------------------------- refit


@st.composite
def refits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A covariance (D, D), perhaps singular, a basis (D, R), a weight (D, out) and some other factor (R, out)."""
    d, out = draw(st.integers(1, 10)), draw(st.integers(1, 6))
    r, samples = draw(st.integers(1, d)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(samples, d) @ normal(d, d)
    return x.mT @ x / samples, normal(d, r), normal(d, out), normal(r, out)


def refit_error(covariance: Tensor, basis: Tensor, weight: Tensor, factor: Tensor) -> float:
    rest = weight - basis @ factor
    return float((rest.mT @ covariance @ rest).trace())


@EXAMPLES
@given(refits(), st.sampled_from([1e-10, 1e-6, 1e-2]))
def test_refit_never_increases_the_error(problem: tuple[Tensor, Tensor, Tensor, Tensor], ridge: float) -> None:
    covariance, basis, weight, other = problem
    level = ridge * float((basis.mT @ covariance @ basis).diagonal().mean())
    found = refit(covariance, basis, weight, ridge=ridge)
    projected = torch.linalg.pinv(basis) @ weight  # what truncation alone would keep
    for factor in (other, projected, torch.zeros_like(other)):
        limit = refit_error(covariance, basis, weight, factor) + level * float(factor.square().sum())
        assert refit_error(covariance, basis, weight, found) <= limit * (1 + 1e-6) + 1e-9


def test_refit_restores_what_a_full_basis_can() -> None:
    torch.manual_seed(0)
    basis, weight = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 3)
    covariance = gram(torch.randn(30, 5)) / 30
    torch.testing.assert_close(
        basis @ refit(covariance, basis, weight, ridge=1e-13), weight.double(), rtol=0, atol=1e-7
    )


def test_refit_of_nothing_is_nothing() -> None:
    assert refit(torch.zeros(4, 4), torch.randn(4, 2), torch.randn(4, 3)).equal(torch.zeros(2, 3, dtype=torch.float64))


# ---------------------------------------------------------------- shrinkage


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Moments of single pictures, (pictures, heads, k, k), and a target (heads, k, k)."""
    pictures, heads, k = draw(st.integers(2, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(pictures, heads, 7, k, generator=generator, dtype=torch.float64)
    t = torch.randn(heads, 9, k, generator=generator, dtype=torch.float64)
    return x.mT @ x, t.mT @ t


def weight_of(own: Tensor, target: Tensor) -> Tensor:
    return shrinkage_weight(own.mean(0), target, own.square().sum((-2, -1)).mean(0), len(own))


@EXAMPLES
@given(samples(), st.sampled_from([1e-4, 0.5, 1e3]))
def test_the_shrinkage_weight(problem: tuple[Tensor, Tensor], scale: float) -> None:
    own, target = problem
    weight = weight_of(own, target)
    assert weight.shape == target.shape[:1] and ((weight >= 0) & (weight <= 1)).all()
    torch.testing.assert_close(weight_of(own * scale, target * scale), weight, rtol=1e-6, atol=1e-9)
    # the definition, spelt out: the variance of the mean over the squared distance
    spread = (own - own.mean(0)).square().sum((-2, -1)).sum(0) / (len(own) * (len(own) - 1))
    distance = (own.mean(0) - target).square().sum((-2, -1))
    torch.testing.assert_close(weight, (spread / distance).clamp(max=1), rtol=1e-6, atol=1e-9)


def test_one_picture_is_pulled_half_way_and_equal_ones_not_at_all() -> None:
    torch.manual_seed(0)
    own, target = gram(torch.randn(1, 2, 6, 3)), gram(torch.randn(2, 6, 3))
    assert weight_of(own, target).tolist() == [0.5, 0.5]
    torch.testing.assert_close(
        weight_of(own.expand(4, -1, -1, -1), target), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert weight_of(own.expand(4, -1, -1, -1), own[0]).tolist() == [0.0, 0.0]  # nothing between them to divide by


@EXAMPLES
@given(samples())
def test_matching_traces(problem: tuple[Tensor, Tensor]) -> None:
    own, target = problem
    matched = match_trace(target, own[0])
    traces = [t.diagonal(dim1=-2, dim2=-1).sum(-1) for t in (matched, own[0])]
    torch.testing.assert_close(*traces)
    shapes = [t / t.flatten(1).norm(dim=1)[:, None, None] for t in (matched, target)]
    torch.testing.assert_close(*shapes)
    assert match_trace(torch.zeros_like(target), own[0] * 1e300).equal(torch.zeros_like(target))

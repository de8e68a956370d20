"""Baselines' linear layers: matrix, Tucker and tensor-train factors.

What a *shape* is says :mod:`comcat.modules.tensor_shapes`.

Decompositions need the extra ``comcat[baselines]`` (tensorly); the modules, and loading their weights, do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ComcatError, NumericsError
from .answers import StandsForLinear
from .tensor_shapes import check_shape

SWEEPS = 50
"""Most sweeps of a Tucker decomposition; it stops where the relative error changes by less than ``TOLERANCE``."""
TOLERANCE = 1e-5


def matrix_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors of one matrix (out, in) by its SVD: first (rank, in) and last (out, rank), float64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    half = s[:rank].sqrt()
    return half[:, None] * vh[:rank], u[:, :rank] * half


class Mode(nn.Module):
    """One matrix of a decomposition, ``weight`` (m, n), that multiplies one mode of what it is given."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, z: Tensor, suffix: int, bias: Tensor | None = None) -> Tensor:
        """The middle of z seen as (rows, n, suffix): (rows, m, suffix), or (rows, m) for a suffix of 1.

        ``bias`` (m) is added where the suffix is 1.
        """
        n = self.weight.shape[1]
        if suffix == 1:
            return F.linear(z.reshape(-1, n), self.weight, bias)
        return self.weight @ z.reshape(-1, n, suffix)


class TensorLinear(StandsForLinear):
    """``y = W x + b`` with the weight kept as a decomposed tensor; a form says of what parameters and how they apply.

    Parameters: those of the form, and ``bias`` (out).

    Args:
        shape: see :mod:`comcat.modules.tensor_shapes`.

    Raises:
        PlanError: if the shape is malformed or does not fit the features.
    """

    form: ClassVar[str]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: Mapping[str, Any],
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_shape(self.form, shape, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.out_modes, self.in_modes, self.ranks = (list(shape[key]) for key in ("out", "in", "ranks"))

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self._add_parameters(empty)
        self.bias = empty(out_features) if bias else None
        self._initialise()

    @classmethod
    def replacing(cls, dense: nn.Linear, shape: Mapping[str, Any], weights: bool) -> Self:
        """The form of a dense layer, in its type and on its device; without ``weights`` the structure alone."""
        factory = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        module = cls(dense.in_features, dense.out_features, shape, bias=dense.bias is not None, **factory)
        if weights:
            module.decompose_(dense.weight)
            if module.bias is not None:
                with torch.no_grad():
                    module.bias.copy_(dense.bias)
        return module

    def decompose_(self, weight: Tensor) -> None:
        """Fill in the decomposition of a weight (out, in), computed in float64.

        Raises ComcatError without tensorly, NumericsError for a weight with NaN or infinity.
        """
        tensor = _float64(weight).reshape(*self.out_modes, *self.in_modes)
        with _tensorly() as tensorly:
            self._decompose(tensor, tensorly)

    def forward(self, x: Tensor) -> Tensor:
        y = self._apply_weight(x.reshape(-1, self.in_features), self.bias).reshape(-1, self.out_features)
        return y.view(x.shape[:-1] + y.shape[1:])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.upgrade_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def upgrade_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Read the matrices of the first saved models, ``cores.0``, as what they are called now, ``cores.0.weight``."""
        for path, _ in list(self.named_parameters()):
            old = prefix + path.removesuffix(".weight")
            if old in state_dict:
                state_dict[prefix + path] = state_dict.pop(old)

    def extra_repr(self) -> str:
        return f"in={tuple(self.in_modes)}, out={tuple(self.out_modes)}, ranks={tuple(self.ranks)}"

    def _initialise(self) -> None:
        """Matrices that keep the variance of what they multiply; a zero bias."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                nn.init.zeros_(parameter)

    def _add_parameters(self, empty: Callable[..., nn.Parameter]) -> None:
        raise NotImplementedError

    def _decompose(self, tensor: Any, tensorly: Any) -> None:
        """Fill the parameters from the weight as a NumPy tensor (o_1, …, i_1, …)."""
        raise NotImplementedError

    def _apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b`` of rows: (rows, in) → (rows, out), in whatever shape holds them in this order."""
        raise NotImplementedError


class TuckerLinear(TensorLinear):
    """A linear layer with the weight in Tucker form (Tucker 1966; Xiao et al. 2023, Table 4), never put together.

    With one mode a side ``W = U1 G U2ᵀ`` and ``y = U1 (G (U2ᵀ x)) + b``: three thin matrices. With more modes ``x`` is
    seen as a tensor (i_1, …), each of its modes is projected to its rank, the core maps these to the ranks of the out
    modes, and each of those is expanded.

    Parameters: ``in_factors[k].weight`` (rank, i_k), ``core`` (product of out ranks, product of in ranks),
    ``out_factors[k].weight`` (o_k, rank), ``bias`` (out). The decomposition is higher-order orthogonal iteration (De
    Lathauwer et al. 2000).
    """

    form = "tucker"

    def _add_parameters(self, empty: Callable[..., nn.Parameter]) -> None:
        out_ranks, in_ranks = self.ranks[: len(self.out_modes)], self.ranks[len(self.out_modes) :]
        self.in_factors: Any = nn.ModuleList([Mode(empty(r, n)) for n, r in zip(self.in_modes, in_ranks, strict=True)])
        self.inner = (math.prod(out_ranks), math.prod(in_ranks))
        self.core = empty(*self.inner)
        self.out_factors: Any = nn.ModuleList(
            [Mode(empty(n, r)) for n, r in zip(self.out_modes, out_ranks, strict=True)]
        )

    def _decompose(self, tensor: Any, tensorly: Any) -> None:
        if not tensor.any():  # the iteration divides by the norm
            with torch.no_grad():
                self.core.zero_()
            return
        # The start, an SVD of each unfolding, is the best there is for a matrix; more modes are improved in turn.
        sweeps = 0 if len(self.ranks) == 2 else SWEEPS
        core, factors = tensorly.decomposition.tucker(
            tensor, rank=list(self.ranks), n_iter_max=sweeps, tol=TOLERANCE, random_state=0
        )
        split = len(self.out_modes)
        _fill(self.core, core.reshape(self.core.shape))
        for target, factor in zip(self.out_factors, factors[:split], strict=True):
            _fill(target.weight, factor)
        for target, factor in zip(self.in_factors, factors[split:], strict=True):
            _fill(target.weight, factor.T)

    def _apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y, rest, alone = x, self.in_features, len(self.out_modes) == 1
        for k, factor in enumerate(self.in_factors):
            rest = rest // self.in_modes[k]
            y = factor(y, rest)  # (rows · r_1⋯r_{k−1}, r_k, rest)
        rest = self.inner[0]
        y = F.linear(y.reshape(-1, self.inner[1]), self.core)  # (rows, product of out ranks)
        for k, factor in enumerate(self.out_factors):
            rest = rest // self.ranks[k]
            y = factor(y, rest, bias if alone else None)
        if bias is None or alone:
            return y
        return y.reshape(-1, self.out_features) + bias.to(y.dtype)

    def product(self) -> Tensor:
        eye = torch.eye(self.in_features, dtype=self.core.dtype, device=self.core.device)
        return self._apply_weight(eye, None).reshape(-1, self.out_features).mT


class TensorTrainLinear(TensorLinear):
    """A linear layer with the weight a tensor train of matrices (Oseledets 2011), never put together.

    ``W[(o_1, …, o_d), (i_1, …, i_d)] = G_1[o_1, i_1] G_2[o_2, i_2] ⋯ G_d[o_d, i_d]``, where ``G_k[o, i]`` is a matrix
    (r_{k−1}, r_k) and r_0 = r_d = 1. The input meets one core after the other. Core k costs
    ``o_1⋯o_k · r_{k−1} r_k · i_k⋯i_d`` multiply-accumulates a row and leaves ``o_1⋯o_k · r_k · i_{k+1}⋯i_d`` numbers: a
    train saves parameters long before it saves work or memory.

    Parameters: ``cores[k].weight`` (o_k · r_k, r_{k−1} · i_k), ``bias`` (out). The decomposition is a sequence of
    truncated SVDs (TT-SVD, Oseledets 2011).
    """

    form = "tensor_train"

    def _add_parameters(self, empty: Callable[..., nn.Parameter]) -> None:
        bonds = (1, *self.ranks, 1)
        pairs = zip(self.out_modes, self.in_modes, bonds, bonds[1:], strict=False)
        self.cores: Any = nn.ModuleList([Mode(empty(o * after, before * i)) for o, i, before, after in pairs])

    def _decompose(self, tensor: Any, tensorly: Any) -> None:
        train = tensorly.decomposition.tensor_train_matrix(tensor, rank=[1, *self.ranks, 1])
        for target, core in zip(self.cores, train.factors, strict=True):  # core (r_{k−1}, o_k, i_k, r_k)
            _fill(target.weight, core.transpose(1, 3, 0, 2).reshape(target.weight.shape))

    def _apply_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y, rest = x, self.in_features
        for k, core in enumerate(self.cores):
            rest = rest // self.in_modes[k]  # what of the input no core has met yet, innermost
            y = core(y, rest)  # (rows · o_1⋯o_{k−1}, o_k · r_k, rest)
        y = y.reshape(-1, self.out_features)
        return y if bias is None else y + bias.to(y.dtype)

    def product(self) -> Tensor:
        core = self.cores[0].weight
        return self._apply_weight(torch.eye(self.in_features, dtype=core.dtype, device=core.device), None).mT


def _float64(weight: Tensor) -> Any:
    """The weight as a NumPy array: tensorly's decompositions are the same on every device that way."""
    if not torch.isfinite(weight).all():
        raise NumericsError("a weight to decompose holds NaN or infinite values")
    return weight.detach().double().cpu().numpy()


def _fill(target: Tensor, value: Any) -> None:
    with torch.no_grad():
        target.copy_(torch.from_numpy(value.copy()))


@contextmanager
def _tensorly() -> Iterator[ModuleType]:
    """tensorly with its NumPy backend in this thread, and the backend that was chosen before afterwards."""
    try:
        import tensorly
        import tensorly.decomposition
    except ImportError as error:
        raise ComcatError("tensor forms need tensorly; install it with: pip install 'comcat[baselines]'") from error
    before = tensorly.get_backend()
    # Not tensorly's own context: leaving it sets the backend of every thread.
    tensorly.set_backend("numpy", local_threadsafe=True)
    try:
        yield tensorly
    finally:
        tensorly.set_backend(before, local_threadsafe=True)


TENSOR_FORMS: dict[str, Callable[[nn.Linear, dict[str, Any], bool], nn.Module]] = {
    kind.form: kind.replacing for kind in (TuckerLinear, TensorTrainLinear)
}
"""Form → builder(dense layer, shape, weights). Without ``weights`` the structure alone, for loading a state dict."""

"""The low-rank changes of two factors whose product comes nearest to a wanted sum of products.

With ``L`` and ``R`` of each head, (heads, rows, width), and wanted terms ``U Sᵀ``:

    minimise over ΔL, ΔR of low rank    Σ_h ‖ (L_h + ΔL_h)(R_h + ΔR_h)ᵀ − L_h R_hᵀ − U_h S_hᵀ ‖²

where ΔL, all heads side by side, is ``A B`` of a given rank for each of the streams that its rows are made of, and so
is ΔR. Rows are in coordinates in which the squared length is what counts (whitened by the Gram of what flows in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One factor of the product, float64.

    Attributes:
        own: (heads, rows, width). term: (heads, rows, term rank), this side of what is wanted beside it.
        streams: for each stream, what its own coordinates become as rows, (rows, inputs): a change of weights
            ``A B`` (inputs, heads · width) changes the rows by ``stream @ A B``.
    """

    own: Tensor
    term: Tensor
    streams: tuple[Tensor, ...]


Update = tuple[Tensor, Tensor]
"""A (inputs, rank) and B (rank, heads · width)."""


def nearest_updates(
    left: Side, right: Side, rank: int, *, iterations: int = 150
) -> tuple[list[Update], list[Update], float]:
    """The changes of every stream of both sides, and ‖what is missing‖ / ‖what was wanted‖.

    The start is the least-squares change of each side alone, cut to the rank; L-BFGS goes on from there.
    """
    wanted = left.term @ right.term.mT  # (heads, rows, rows)
    size = wanted.square().sum()
    starts = [_start(left, wanted @ right.own, right.own, rank), _start(right, wanted.mT @ left.own, left.own, rank)]
    if size == 0:
        return [(a * 0, b) for a, b in starts[0]], [(a * 0, b) for a, b in starts[1]], 0.0
    variables = [
        t.clone(memory_format=torch.contiguous_format).requires_grad_(True)
        for start in starts
        for update in start
        for t in update
    ]
    count = 2 * len(left.streams)

    def missing() -> Tensor:
        change_l, change_r = _change(left, variables[:count]), _change(right, variables[count:])
        found = change_l @ (right.own + change_r).mT + left.own @ change_r.mT
        return (found - wanted).square().sum() / size

    optimizer = torch.optim.LBFGS(
        variables, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-10,
        tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = missing()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        error = float(missing().sqrt())
    done = [v.detach() for v in variables]
    pairs = [(done[i], done[i + 1]) for i in range(0, len(done), 2)]
    return pairs[: count // 2], pairs[count // 2 :], error


def _change(side: Side, variables: Sequence[Tensor]) -> Tensor:
    """The rows' change, (heads, rows, width)."""
    change = sum(s @ a @ b for s, a, b in zip(side.streams, variables[::2], variables[1::2], strict=True))
    assert isinstance(change, Tensor)
    return change.unflatten(1, (side.own.shape[0], -1)).transpose(0, 1)


def _start(side: Side, gathered: Tensor, other: Tensor, rank: int) -> list[Update]:
    """Half of the change that would do it by least squares while the other side stays: ``T R (Rᵀ R)⁻¹``, cut to the
    rank for each stream.
    """
    inner = other.mT @ other
    ridge = 1e-6 * inner.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    change = torch.linalg.solve(inner + ridge[:, None, None] * eye, gathered.mT).mT / 2
    whole = change.transpose(0, 1).flatten(1)  # (rows, heads · width)
    updates = []
    for stream in side.streams:
        weights = torch.linalg.pinv(stream) @ whole  # (inputs, heads · width)
        u, sigma, vt = torch.linalg.svd(weights, full_matrices=False)
        half = sigma[:rank].sqrt()
        a, b = u[:, :rank] * half, half[:, None] * vt[:rank]
        if (lacking := rank - a.shape[1]) > 0:
            a = torch.nn.functional.pad(a, (0, lacking))
            b = torch.nn.functional.pad(b, (0, 0, 0, lacking))
        updates.append((a, b))
    return updates

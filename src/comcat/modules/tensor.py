"""Baselines' linear layers: matrix, Tucker and tensor-train factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def matrix_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors of one matrix (out, in) by its SVD: first (rank, in) and last (out, rank), float64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    half = s[:rank].sqrt()
    return half[:, None] * vh[:rank], u[:, :rank] * half


TENSOR_FORMS: dict[str, Callable[[nn.Linear, dict[str, Any], bool], nn.Module]] = {}

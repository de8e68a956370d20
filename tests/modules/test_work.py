"""How much a forward of low-rank attention computes: one projection in, one attention, one projection out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comcat.modules.lowrank import LowRankAttention


class Operations(TorchDispatchMode):
    """Counts what is computed or copied; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket not in (torch.ops.aten._unsafe_view, torch.ops.aten.detach):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rank_qk", "rank_vo", "padded"), [(3, 3, 0), (2, 3, 2), (3, 2, 1)])
def test_one_projection_one_attention_one_projection(rank_qk: int, rank_vo: int, padded: int) -> None:
    attention = LowRankAttention(12, 12, 3, rank_qk, rank_vo, scale=0.5)
    with torch.no_grad(), Operations() as operations:
        attention(torch.randn(2, 5, 12))
    counts = operations.counts
    del counts["randn"]
    assert counts["addmm"] == 2 and sum(n for name, n in counts.items() if "attention" in name) == 1
    assert counts["constant_pad_nd"] == padded
    assert set(counts) <= {"addmm", "constant_pad_nd", "clone", *(n for n in counts if "attention" in n)}, counts

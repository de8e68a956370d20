"""State dicts of the first format load by torch: biases beside ``qkv``, tables below ``source``, bare matrices."""

from __future__ import annotations

import pytest
import torch

from comcat.modules.lowrank import LowRankAttention

from .cases import BY_NAME


@pytest.mark.parametrize("biases", [("q_bias",), ("v_bias",), ("q_bias", "v_bias"), ()])
def test_biases_beside_the_projection(biases: tuple[str, ...]) -> None:
    module = torch.nn.Sequential(LowRankAttention(6, 6, 2, 3, 2, scale=0.5, qkv_bias=bool(biases)))
    state = {k: torch.randn_like(v) for k, v in module.state_dict().items() if k != "0.qkv.bias"}
    apart = {f"0.{name}": torch.randn(2 * (3 if name == "q_bias" else 2)) for name in biases}
    module.load_state_dict({**state, **apart})
    attention = module[0]
    if not biases:
        assert attention.qkv.bias is None
        return
    q, k, v = attention.qkv.bias.split(attention.widths)
    assert not k.any()
    for name, part in (("q_bias", q), ("v_bias", v)):
        assert part.equal(apart[f"0.{name}"] if name in biases else torch.zeros_like(part))


TABLE = "relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "new", "old"),
    [
        ("window", f"inner.{TABLE}", f"inner.source.{TABLE}"),
        ("relative-bias", f"inner.rel_pos.{TABLE}", f"inner.source.rel_pos.{TABLE}"),
        ("tucker", "inner.in_factors.0.weight", "inner.in_factors.0"),
        ("tensor-train", "inner.cores.1.weight", "inner.cores.1"),
    ],
)
def test_other_names(name: str, new: str, old: str) -> None:
    model = BY_NAME[name].model()
    state = model.state_dict()
    state[old] = torch.randn_like(state.pop(new))
    model.load_state_dict(state)
    assert model.state_dict()[new].equal(state[old])

"""State dicts of the first format, whose attention kept its biases beside ``qkv``, load by torch alone."""

from __future__ import annotations

import pytest
import torch

from comcat.modules.lowrank import LowRankAttention


@pytest.mark.parametrize("biases", [("q_bias",), ("v_bias",), ("q_bias", "v_bias"), ()])
def test_first_state_dicts_load(biases: tuple[str, ...]) -> None:
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

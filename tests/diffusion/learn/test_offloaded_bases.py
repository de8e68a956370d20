"""A pipeline whose parts something else moves, casts or leaves out under training: refused before the work, with the
way out. Quantised ones stand in ``test_quantised_bases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import comcat.diffusion as cd
from comcat.diffusion.pipeline.families import family_of
from comcat.diffusion.pipeline.residence import Idle, computing_dtype
from comcat.errors import ModelError

from .. import tiny
from ..newer import NEWER

CPU = torch.device("cpu")


def sequential(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does on a card: weights come for one layer at a time."""
    from accelerate import cpu_offload

    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        cpu_offload(part, execution_device=CPU)


def whole(pipe: Any) -> None:
    """What ``enable_model_cpu_offload`` does on a card: a part comes when it is called."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


def blocks(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def leaves_of_the_text(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(pipe.text_encoder, CPU, CPU, offload_type="leaf_level")


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def cached(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))


def rounded(pipe: Any) -> None:
    pipe.transformer.to(torch.float8_e4m3fn)


CASES: list[tuple[Callable[[Any], None], str]] = [
    (sequential, "the pipeline offloads .*transformer; .*load the pipeline without offloading.*gradient_checkpointing"),
    (whole, "the pipeline offloads transformer; "),
    (blocks, "the pipeline offloads transformer; "),
    (leaves_of_the_text, "the pipeline offloads text_encoder; "),
    (cast, r"the transformer keeps its weights in another type .*layerwise casting.* quantised to 8 bit"),
    (cached, r"hooks of diffusers act in the transformer \(.*\), .*disable_cache"),
    (rounded, "weights in float8_e4m3fn, in which nothing can be computed: load it in bfloat16"),
]


@pytest.mark.parametrize(("change", "said"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_it_is_refused_before_the_work(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    change(pipe)
    pipe.transformer.forward = None  # any work would fail otherwise
    with pytest.raises(ModelError, match=said):
        cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)
    assert cd.adapters(pipe) == {}


def test_hooks_that_are_out_again_are_in_nobody_s_way(tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    cached(pipe)
    pipe.transformer.disable_cache()
    cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)


def test_it_computes_in_the_type_of_weights_that_are_no_whole_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    model[0].bias = None
    assert computing_dtype(model) == torch.bfloat16
    del model[1]
    with pytest.raises(ModelError, match="no weights of 16 bit or more"):
        computing_dtype(model)


def test_a_part_that_refuses_to_move_stays(tmp_path: Path) -> None:
    """transformers' models in 8 bit of bitsandbytes do."""
    pipe = tiny.stable_diffusion(tmp_path / "parts")

    def refusing(*_: Any) -> None:
        raise ValueError("`.to` is not supported for 8-bit models")

    pipe.text_encoder.to = refusing
    with Idle(family_of(pipe), [pipe.unet]).away():
        pass
    adapter = cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)
    assert adapter.modules

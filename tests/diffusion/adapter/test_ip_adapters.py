"""An IP-Adapter and adapters in one attention: each does what it does alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import ModelError, UnsupportedSite

from ..denoisers import CASES, random

UNET = CASES["sd1"]
IMAGE = {"added_cond_kwargs": {"image_embeds": [random(2, 1, 6)]}}
PLAIN = {"AttnProcessor2_0"}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def load_ip_adapter(model: Any, count: int = 1) -> None:
    """The smallest weights that there are, as ``pipe.load_ip_adapter`` brings them to the denoiser."""
    states = []
    for seed in range(count):
        projection = {"proj.weight": random(48, 6, seed=seed), "proj.bias": random(48, seed=seed)}
        projection |= {"norm.weight": random(12, seed=seed), "norm.bias": random(12, seed=seed)}
        weights: dict[str, Tensor] = {}
        for number, name in enumerate(n for n in model.attn_processors if "attn2" in n):
            width = model.get_submodule(name.removesuffix(".processor")).inner_dim
            for kind in ("k", "v"):
                weights[f"{2 * number + 1}.to_{kind}_ip.weight"] = random(width, 12, seed=seed + 7)
        states.append({"image_proj": projection, "ip_adapter": weights})
    dtype = next(model.parameters()).dtype
    model._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    model.to(dtype)


class Holder:
    """As much of a pipeline as the methods for IP-Adapters want."""

    def __init__(self, unet: Any) -> None:
        from diffusers.loaders.ip_adapter import IPAdapterMixin

        self.unet = unet
        self.unload = lambda: IPAdapterMixin.unload_ip_adapter(self)  # type: ignore[arg-type]
        self.scale = lambda scale: IPAdapterMixin.set_ip_adapter_scale(self, scale)  # type: ignore[arg-type]


def attach(model: Any, **more: Any) -> Any:
    diffusion.attach(model, name="dog", init="random", dtype=torch.float64, **more)
    return model


def made(*steps: Any) -> Any:
    model = UNET.model(torch.float64)
    for step in steps:
        step(model)
    return model


@torch.no_grad()
def test_the_text_s_part_is_changed_and_the_picture_s_is_not() -> None:
    """The output projection is linear: with both, an attention adds what each adds alone."""
    models = [made(), made(load_ip_adapter), made(attach), made(load_ip_adapter, attach)]
    path = next(n for n in models[0].attn_processors if "attn2" in n).removesuffix(".processor")
    x, text, image = random(2, 16, 8).double(), random(2, 5, 12).double(), random(2, 1, 4, 12).double()

    def said(model: Any) -> Tensor:
        attention = model.get_submodule(path)
        ip = "IPAdapter" in type(attention.processor).__name__
        return attention(x, encoder_hidden_states=(text, [image[:, 0]]) if ip else text)

    plain, ip, adapter, both = map(said, models)
    assert relative(both, adapter + ip - plain) < 1e-12
    assert min(relative(ip, plain), relative(adapter, plain)) > 0.01


@pytest.mark.parametrize("where", ["cross", "all"])
@torch.no_grad()
def test_the_order_in_which_they_come_makes_no_difference(where: str) -> None:
    def adapter(model: Any) -> None:
        attach(model, where=where)

    first, last = made(adapter, load_ip_adapter), made(load_ip_adapter, adapter)
    assert relative(UNET.run(first, **IMAGE), UNET.run(last, **IMAGE)) < 1e-12
    alone = UNET.run(made(load_ip_adapter), **IMAGE)
    assert relative(UNET.run(first, **IMAGE), alone) > 1e-3


@torch.no_grad()
def test_each_goes_and_leaves_the_other() -> None:
    model = made(attach, load_ip_adapter)
    UNET.run(model, **IMAGE)
    diffusion.unload(model)
    assert UNET.run(model, **IMAGE).equal(UNET.run(made(load_ip_adapter), **IMAGE))
    assert {type(p).__name__ for p in model.attn_processors.values()} == PLAIN | {"IPAdapterAttnProcessor2_0"}
    model = made(load_ip_adapter, attach)
    UNET.run(model, **IMAGE)
    Holder(model).unload()
    assert relative(UNET.run(model), UNET.run(made(attach))) < 1e-12
    diffusion.unload(model)
    assert (
        UNET.run(model).equal(UNET.run(made())) and {type(p).__name__ for p in model.attn_processors.values()} == PLAIN
    )


@torch.no_grad()
def test_the_library_still_sets_its_scale_and_moves_its_weights() -> None:
    model = made(load_ip_adapter, attach)
    Holder(model).scale(0.0)
    without = UNET.run(made(attach))
    assert relative(UNET.run(model, **IMAGE), without) < 1e-12
    Holder(model).scale(0.5)
    assert relative(UNET.run(model, **IMAGE), without) > 1e-3
    assert {p.dtype for p in model.to(torch.float32).parameters()} == {torch.float32}
    UNET.run(model, **IMAGE)


@torch.no_grad()
def test_two_ip_adapters_and_masks() -> None:
    def two(model: Any) -> None:
        load_ip_adapter(model, count=2)

    image = {"added_cond_kwargs": {"image_embeds": [random(2, 1, 6), random(2, 1, 6, seed=3)]}}
    half = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    half[..., :4] = 1
    image["cross_attention_kwargs"] = {"ip_adapter_masks": [half, 1 - half]}
    model, alone = made(two, attach), made(two)
    with_both = UNET.run(model, **image)
    assert relative(with_both, UNET.run(alone, **image)) > 1e-3
    del image["cross_attention_kwargs"]
    assert relative(UNET.run(model, **image), with_both) > 1e-3  # masks count
    diffusion.set_scale(model, dog=0.0)
    assert relative(UNET.run(model, **image), UNET.run(alone, **image)) < 1e-12


@torch.no_grad()
def test_copies_and_pickles_carry_both() -> None:
    model = made(load_ip_adapter, attach)
    expected = UNET.run(model, **IMAGE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert UNET.run(other, **IMAGE).equal(expected)
        diffusion.unload(other)
        assert UNET.run(other, **IMAGE).equal(UNET.run(made(load_ip_adapter), **IMAGE))
    assert UNET.run(model, **IMAGE).equal(expected)


def test_what_writes_to_shared_projections_is_refused() -> None:
    model = made(load_ip_adapter, attach)
    reason = r"an IP-Adapter reads its queries and writes through its output; unload_ip_adapter\(\) first"
    with pytest.raises(UnsupportedSite, match=reason):
        diffusion.fuse(model)
    with pytest.raises(UnsupportedSite, match=reason):
        diffusion.merge(model, "dog")
    assert diffusion.adapters(model)["dog"].scale == 1.0
    Holder(model).unload()
    diffusion.fuse(model)


@torch.no_grad()
def test_an_ip_adapter_over_fused_adapters_is_said_at_the_next_call() -> None:
    model = made(attach)
    diffusion.fuse(model)
    with pytest.raises(Exception, match=r"(?s)'dog' cannot act at unet.*IP-Adapter|size mismatch"):
        load_ip_adapter(model)
        UNET.run(model, **IMAGE)


def test_terms_learn_beside_an_ip_adapter() -> None:
    model = made(load_ip_adapter)
    model.requires_grad_(False)
    diffusion.attach(model, name="dog", init="zero", dtype=torch.float64)
    UNET.run(model, **IMAGE).square().mean().backward()
    learning = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"k_down", "out_up"}


def test_ip_adapters_of_other_families_are_refused_with_the_reason() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    model = UNET.model()
    for name, processor in dict(model.attn_processors).items():
        if "attn2" in name:
            attention = model.get_submodule(name.removesuffix(".processor"))
            attention.set_processor(IPAdapterAttnProcessor(attention.inner_dim, 12))
            assert processor is not attention.processor
    with pytest.raises(
        UnsupportedSite, match=r"attn2 \(an IP-Adapter computes this attention \(IPAdapterAttnProcessor\)"
    ):
        diffusion.attach(model)


def test_an_ip_adapter_that_adapters_cannot_act_beside_says_so_at_the_next_call() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    model = made(attach)
    name = next(n for n in model.attn_processors if "attn2" in n).removesuffix(".processor")
    attention = model.get_submodule(name)
    attention.set_processor(IPAdapterAttnProcessor(attention.inner_dim, 12))
    with pytest.raises(
        ModelError, match=r"'dog' cannot act at unet.*IP-Adapter.*unload_ip_adapter\(\) first, or unload"
    ):
        UNET.run(model)

"""Merged models compute the same however they are run: with and without gradients, under torch.func, in every dtype."""

import copy
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import comcat
from comcat.errors import ModelError

from ..models import pictures, tiny_vit

X = pictures(4, 4)[0]
FRONTS = [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}]


def merged(how, keep=0.6, size=(32, 32), **settings):
    model = tiny_vit(dynamic_img_size=True, **settings)
    plan = comcat.merge(model, example=X[:1], keep=keep, how=how)
    assert plan.sites
    comcat.apply_(model, plan)
    return model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("front", FRONTS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 56)], ids=str)
@pytest.mark.parametrize("how", ["similar", "grid"])
def test_no_result_depends_on_whether_gradients_are_kept(how, size, front):
    model, x = merged(how, size=size, **front)
    learned = model(x)
    learned.sum().backward()
    for way in (torch.no_grad, torch.inference_mode):
        with way():
            torch.testing.assert_close(model(x), learned.detach(), atol=2e-6, rtol=0)  # sums in another order
            one = torch.cat([model(picture[None]) for picture in x])
        torch.testing.assert_close(one, learned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["similar", "grid"])
def test_what_a_block_was_given_is_left_alone(how):
    """Hooks and recorded hidden states may hold tokens of before and within a block."""
    model, x = merged(how)
    held = []
    for module in (model.blocks[-1], model.blocks[-1].norm1, model.blocks[-1].mlp):
        module.register_forward_hook(lambda m, args, out: held.extend((t, t.clone()) for t in (args[0], out)))
    with torch.no_grad():
        model(x)
    assert len(held) == 6 and all(torch.equal(now, then) for now, then in held)


@pytest.mark.parametrize("how", ["similar", "grid"])
def test_ensembles_by_vmap_and_forward_derivatives(how):
    model, x = merged(how)
    parts = stack_module_state([model, copy.deepcopy(model)])
    for way in (torch.enable_grad, torch.no_grad):
        with way():
            both = vmap(lambda p, b: functional_call(model, (p, b), (x,)), randomness="same")(*parts)
        torch.testing.assert_close(both[1], model(x), atol=1e-5, rtol=1e-5)
    slopes = []
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for way in (torch.enable_grad, torch.no_grad):
            with way():
                slopes.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_other_types_of_numbers(how):
    model, x = merged(how)
    with torch.no_grad():
        plain = model(x)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            other = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert other.dtype == dtype and other.isfinite().all()
        torch.testing.assert_close(other.float(), plain, atol=1e-4, rtol=1e-4)
        streams = []
        model.blocks[-1].register_forward_hook(lambda m, args, out: streams.append((args[0].dtype, out.dtype)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == tiny_vit()(X).dtype == torch.bfloat16
    assert streams == [(torch.float32, torch.float32)]  # the stream between blocks keeps its type


def test_patches_that_were_left_out_have_no_neighbours():
    """4 of 16 would be a square, but one of patches that do not lie side by side."""
    model, x = merged("grid", patch_drop_rate=0.75)
    assert model(x).isfinite().all()
    with pytest.raises(ModelError, match=r"got 4 tokens of a picture of 4 × 4 patches.*how='similar'"):
        model.train()(x)
    model, x = merged("similar", patch_drop_rate=0.75)
    assert model.train()(x).isfinite().all()


def test_threads_with_pictures_of_other_shapes_do_not_disturb_each_other():
    """3 × 5 and 5 × 3 tokens are as many, but have other neighbours."""
    model, _ = merged("grid")
    shapes, patches = [(24, 40), (40, 24)], model.patch_embed.proj
    shown = [torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    alone, together, said = [model(x) for x in shown], threading.Barrier(2), {}

    def wait(module, args, output):  # both have cut their pictures before either goes on
        together.wait(10)

    patches.register_forward_hook(wait)

    def run(number):
        said[number] = model(shown[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(said[number], alone[number], atol=1e-6) for number in (0, 1))


@pytest.mark.parametrize("how", ["similar", "grid"])
def test_compiled_for_pictures_of_several_shapes(how):
    model, _ = merged(how)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    part = copy.deepcopy(model)
    part.blocks[1] = torch.compile(part.blocks[1], backend="eager")
    for shape in ((32, 32), (24, 40), (40, 24), (24, 40)):
        x = torch.randn(2, 3, *shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(part(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_share_is_not_asked_of_what_is_merged_already():
    model = tiny_vit()
    comcat.apply_(model, comcat.merge(model, example=X[:1], keep=0.6, blocks=("blocks.0",)))
    with pytest.raises(ModelError, match=r"already, the first blocks\.0; .*handle\.revert"):
        comcat.merge(model, example=X[:1], keep=0.6)
    assert list(comcat.merge(model, example=X[:1], keep=0.6, blocks=("blocks.1",)).sites) == ["blocks.1:tokens"]


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_taken_back_after_steps_of_training(how):
    model, x = tiny_vit(), X
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    handle = comcat.apply_(model, comcat.merge(model, example=x[:1], keep=0.6, how=how))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle.revert()
    handle.revert()  # a second time does nothing
    fresh = tiny_vit()
    fresh.load_state_dict(learned)
    assert torch.equal(model.eval()(x), fresh(x)) and [type(m) for m in model.modules()] == kinds
    assert list(learned) == keys and not any(m._forward_hooks for m in model.modules())

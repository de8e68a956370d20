"""Low-rank terms on frozen attention: what they compute, and that they leave everything else as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import ModelError, SettingsError
from comcat.modules.adapters import attend, padded_width

from .. import reference
from ..denoisers import CASES, Case, random

UNET = CASES["sd1"]
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


def trained(model: Any, **settings: Any) -> diffusion.Adapter:
    """An adapter all of whose factors matter."""
    return diffusion.attach(model, init="random", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    model = case.model(dtype)
    before = case.run(model)
    for where in case.where:
        diffusion.attach(model, where=where, rank=3, dtype=dtype)
        assert relative(case.run(model), before) < torch.finfo(dtype).eps * 50
        diffusion.unload(model)


@torch.no_grad()
def test_unloading_gives_the_model_back_bit_for_bit(case: Case) -> None:
    model = case.model()
    before, state = case.run(model), copy.deepcopy(model.state_dict())
    modules, processors = dict(model.named_modules()), model.attn_processors
    trained(model, where=case.where[-1])
    assert relative(case.run(model), before) > 1e-3
    assert diffusion.unload(model) is None
    after = model.state_dict()
    assert list(after) == list(state) and all(after[n].equal(state[n]) for n in state)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {n: id(p) for n, p in model.attn_processors.items()} == {n: id(p) for n, p in processors.items()}
    assert case.run(model).equal(before)
    assert diffusion.adapters(model) == {} and not hasattr(model, "comcat_adapters")


@torch.no_grad()
def test_what_is_unloaded_does_not_come_back_with_unfused_projections() -> None:
    """``fuse_qkv_projections`` sets the processors aside, and ``unfuse_qkv_projections`` brings them back."""
    model = UNET.model()
    before, processors = UNET.run(model), model.attn_processors
    for name in ("dog", "cat"):
        trained(model, where="cross", name=name)
    model.fuse_qkv_projections()
    diffusion.unload(model, "dog")
    diffusion.unload(model)
    model.unfuse_qkv_projections()
    for module in model.modules():
        if hasattr(module, "fused_projections"):
            module.fused_projections = False  # diffusers leaves it as it was
    assert {n: id(p) for n, p in model.attn_processors.items()} == {n: id(p) for n, p in processors.items()}
    assert UNET.run(model).equal(before)


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
@torch.no_grad()
def test_one_stream_computes_equation_8(kind: str) -> None:
    model = UNET.model(torch.float64)
    adapter = trained(model, where="all", rank=3, alpha=2.0, dtype=torch.float64)
    diffusion.set_scale(model, default=0.7)
    path = CROSS.replace("attn2", kind)
    attn = model.get_submodule(path.removeprefix("unet."))
    x, text = random(2, 6, 16).double(), random(2, 5, 12, seed=1).double()
    got = attn(x) if kind == "attn1" else attn(x, encoder_hidden_states=text)
    expected = reference.plain(attn, x, x if kind == "attn1" else text, [adapter.terms[path]])
    assert relative(got, expected) < 1e-12


@pytest.mark.parametrize("name", ["sd3", "sd35"])
@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_joint_attention_computes_equation_8_over_both_streams(name: str, block: int) -> None:
    model = CASES[name].model(torch.float64)
    adapter = trained(model, where="all", rank=3, dtype=torch.float64)
    path = f"transformer_blocks.{block}.attn"
    attn = model.get_submodule(path)
    x, text = random(2, 6, 16).double(), random(2, 5, 16, seed=1).double()
    got = attn(x, encoder_hidden_states=text)
    expected = reference.joint(attn, x, text, [adapter.terms[f"transformer.{path}"]])
    assert relative(got[0], expected[0]) < 1e-12
    if block == 0:
        assert relative(got[1], expected[1]) < 1e-12
    else:  # the last block: the text ends here, and nobody reads what its queries find
        assert expected[1] is None and not hasattr(adapter.terms[f"transformer.{path}"], "add_q_up")


@pytest.mark.parametrize("block", ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"])
@torch.no_grad()
def test_flux_computes_equation_8_behind_norms_and_rotation(block: str) -> None:
    model = CASES["flux"].model(torch.float64)
    adapter = trained(model, where="joint", rank=3, dtype=torch.float64)
    attn = model.get_submodule(block)
    single = block.startswith("single")
    x, text = random(2, 9, 16).double(), None if single else random(2, 5, 16, seed=1).double()
    angle = random(9 if single else 14, 4, seed=2).double().repeat_interleave(2, dim=1)
    angles = angle.cos(), angle.sin()
    got = attn(x, encoder_hidden_states=text, image_rotary_emb=angles)
    expected = reference.joint(attn, x, text, [adapter.terms[f"transformer.{block}"]], angles)
    if single:
        assert adapter.modules[f"transformer.{block}"] == ("qk",)
        assert relative(got, expected[0]) < 1e-6  # cos and sin act in float32
    else:
        assert relative(got[0], expected[0]) < 1e-6 and relative(got[1], expected[1]) < 1e-6


@torch.no_grad()
def test_masks_reach_the_extra_channels_as_well() -> None:
    model = UNET.model(torch.float64)
    adapter = trained(model, where="all", dtype=torch.float64)
    attn = model.get_submodule(CROSS.removeprefix("unet."))
    x, text = random(2, 6, 16).double(), random(2, 5, 12, seed=1).double()
    mask = torch.zeros(2, 1, 5, dtype=torch.float64)
    mask[0, :, 3:] = -1e4
    mask[1, :, 1] = -0.5
    got = attn(x, encoder_hidden_states=text, attention_mask=mask)
    assert relative(got, reference.plain(attn, x, text, [adapter.terms[CROSS]], mask)) < 1e-12
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    whole = UNET.run(model, encoder_attention_mask=keep)
    inputs = UNET.arguments()
    inputs["encoder_hidden_states"][0, 3:] = 7.0  # what is masked does not matter
    changed = model(
        **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, encoder_attention_mask=keep
    )
    assert relative(changed.sample, whole) < 1e-9


@torch.no_grad()
def test_pictures_norms_residuals_and_biases_of_the_attention_stay() -> None:
    from diffusers.models.attention_processor import Attention

    from comcat.diffusion.adapter.hosts import find_in
    from comcat.diffusion.adapter.places import place_at
    from comcat.diffusion.pipeline.components import Component
    from comcat.modules.adapters import ExtraChannels, LowRankTerms

    attn: Any = Attention(
        8, cross_attention_dim=6, heads=2, dim_head=4, bias=True, norm_num_groups=2, cross_attention_norm="layer_norm",
        residual_connection=True, rescale_output_factor=1.5, qk_norm="layer_norm",
    ).double().eval()  # fmt: skip
    picture, text = random(2, 8, 3, 3).double(), random(2, 5, 6, seed=1).double()
    before = attn(picture, encoder_hidden_states=text)
    model = torch.nn.ModuleDict({"attn": attn})
    (found,), _ = find_in(model)
    terms = LowRankTerms(found.widths, found.heads, 3, dtype=torch.float64)
    terms.reset("zero", torch.Generator().manual_seed(0))
    channels = ExtraChannels()
    channels.add("default", terms)
    place_at({"unet": Component("unet", model)}, "unet.attn").mount(channels)
    assert relative(attn(picture, encoder_hidden_states=text), before) < 1e-14


@torch.no_grad()
def test_adapters_add_up_in_any_order(case: Case) -> None:
    where = case.where[0]
    outputs = []
    for order in (("dog", "cat"), ("cat", "dog")):
        model = case.model(torch.float64)
        for name in order:
            settings = {"dog": {"rank": 2, "seed": 1}, "cat": {"rank": 3, "seed": 2, "alpha": 1.0}}[name]
            diffusion.attach(model, name=name, where=where, init="random", dtype=torch.float64, **settings)
        diffusion.set_scale(model, dog=0.5, cat=-1.5)
        outputs.append(case.run(model))
    assert relative(outputs[0], outputs[1]) < 1e-12
    diffusion.set_scale(model, dog=0)
    one_off = case.run(model)
    diffusion.unload(model, "dog")
    assert list(diffusion.adapters(model)) == ["cat"]
    assert relative(case.run(model), one_off) < 1e-12 and relative(one_off, outputs[0]) > 1e-4


@torch.no_grad()
def test_two_adapters_are_the_sum_of_their_terms() -> None:
    model = UNET.model(torch.float64)
    for name, where in (("dog", "cross"), ("cat", "all")):
        trained(model, name=name, where=where, seed=len(where), dtype=torch.float64)
    held = diffusion.adapters(model)
    attn = model.get_submodule(CROSS.removeprefix("unet."))
    x, text = random(2, 6, 16).double(), random(2, 5, 12, seed=1).double()
    expected = reference.plain(attn, x, text, [held["dog"].terms[CROSS], held["cat"].terms[CROSS]])
    assert relative(attn(x, encoder_hidden_states=text), expected) < 1e-12
    assert CROSS.replace("attn2", "attn1") not in held["dog"].terms


def test_a_random_start_is_the_paper_s_and_follows_the_seed() -> None:
    found = [trained(UNET.model(), rank=2, seed=seed).named_parameters() for seed in (0, 0, 1)]
    for key, factor in found[0].items():
        assert factor.equal(found[1][key]) and not factor.equal(found[2][key])
        bound = factor.shape[1] ** -0.5  # of torch.nn.Linear
        assert factor.abs().max() <= bound and factor.abs().max() > bound / 2
    fresh = diffusion.attach(UNET.model()).named_parameters()
    assert {key.rpartition(".")[2] for key, f in fresh.items() if not f.any()} == {"k_down", "out_up"}


def test_every_factor_learns_and_nothing_else_does(case: Case) -> None:
    model = case.model().requires_grad_(False)
    adapter = diffusion.attach(model, where="all")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if any(p is f for f in adapter.parameters())
    }
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):  # at first a factor beside a zero one has no gradient
        optimizer.zero_grad()
        case.run(model).square().mean().backward()
        optimizer.step()
    for key, factor in adapter.named_parameters().items():
        assert factor.grad is not None and factor.grad.abs().max() > 0, key


def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = case.model(torch.float64).requires_grad_(False)
        adapter = trained(model, where="all", dtype=torch.float64)
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
        case.run(model).square().mean().backward()
        gradients.append([f.grad for f in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and relative(recomputed, plain) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@torch.no_grad()
def test_a_float32_adapter_in_a_16_bit_model(case: Case, dtype: torch.dtype) -> None:
    model, low = case.model(), case.model(dtype)
    for one in (model, low):
        assert all(p.dtype is torch.float32 for p in trained(one, where="all").parameters())
    assert low.dtype is dtype
    got = case.run(low)
    assert got.dtype is dtype and relative(got.float(), case.run(model)) < 60 * torch.finfo(dtype).eps


def test_autocast() -> None:
    model = UNET.model().requires_grad_(False)
    adapter = trained(model, where="all")
    with torch.no_grad():
        expected = UNET.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = UNET.run(model)
        got.float().square().mean().backward()
    assert relative(got.float(), expected) < 0.1
    assert all(f.grad is not None and f.grad.dtype is torch.float32 for f in adapter.parameters())


@torch.no_grad()
def test_copies_and_devices_take_the_adapter_along(case: Case) -> None:
    model = case.model()
    adapter = trained(model, where="all", name="dog")
    before = case.run(model)
    copied = copy.deepcopy(model)
    other = diffusion.adapters(copied)["dog"]
    for factor, mine in zip(other.parameters(), adapter.parameters(), strict=True):
        assert factor.equal(mine) and factor is not mine
        factor.zero_()
    assert case.run(model).equal(before) and not case.run(copied).equal(before)
    diffusion.unload(copied)
    assert case.run(model).equal(before) and list(diffusion.adapters(model)) == ["dog"]
    assert all(f.is_meta for f in diffusion.adapters(model.to("meta"))["dog"].parameters())


@pytest.mark.parametrize("attach_first", [True, False])
@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere(attach_first: bool) -> None:
    from accelerate import cpu_offload

    model = UNET.model()
    trained(model, where="all")
    expected = UNET.run(model)
    model = UNET.model()
    if attach_first:
        trained(model, where="all")
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not attach_first:
        trained(model, where="all")
    assert relative(UNET.run(model), expected) < 1e-6


@torch.no_grad()
def test_lora_beside_an_adapter() -> None:
    from peft import LoraConfig

    both = UNET.model(torch.float64)
    adapter = trained(both, where="all", dtype=torch.float64)
    without_lora = UNET.run(both)
    both.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    together = UNET.run(both)
    assert relative(together, without_lora) > 1e-4
    attn = both.get_submodule(CROSS.removeprefix("unet."))
    x, text = random(2, 6, 16).double(), random(2, 5, 12, seed=1).double()
    got = attn(x, encoder_hidden_states=text)
    dense = copy.deepcopy(attn)
    for name in ("to_q", "to_k", "to_v"):
        setattr(dense, name, getattr(dense, name).merge() or getattr(dense, name).get_base_layer())
    dense.to_out[0] = dense.to_out[0].merge() or dense.to_out[0].get_base_layer()
    assert relative(got, reference.plain(dense, x, text, [adapter.terms[CROSS]])) < 1e-10
    both.disable_adapters()
    assert relative(UNET.run(both), without_lora) < 1e-12
    diffusion.unload(both)
    both.enable_adapters()
    alone = UNET.model(torch.float64)
    torch.manual_seed(0)
    alone.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    alone.load_state_dict(both.state_dict())
    assert UNET.run(both).equal(UNET.run(alone))


@torch.no_grad()
def test_other_ways_to_compute_the_same_attention_come_back() -> None:
    model = UNET.model()
    model.set_attention_slice(1)
    sliced, processors = UNET.run(model), model.attn_processors
    diffusion.attach(model, where="all")
    assert relative(UNET.run(model), sliced) < 1e-5
    diffusion.unload(model)
    assert model.attn_processors == processors and UNET.run(model).equal(sliced)


@torch.no_grad()
def test_compiled_without_a_break_in_the_graph() -> None:
    model = UNET.model()
    trained(model, where="all")
    attn = model.get_submodule(CROSS.removeprefix("unet."))
    x, text = random(2, 6, 16), random(2, 5, 12, seed=1)
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    for scale in (1.0, 0.5):
        diffusion.set_scale(model, default=scale)
        assert relative(compiled(x, encoder_hidden_states=text), attn(x, encoder_hidden_states=text)) < 1e-6
    diffusion.unload(model)
    assert compiled(x, encoder_hidden_states=text).equal(attn(x, encoder_hidden_states=text))


def test_a_compiled_model_is_adapted_as_it_is() -> None:
    model = UNET.model()
    adapter = diffusion.attach(torch.compile(model))
    assert diffusion.adapters(model)["default"].modules == adapter.modules


def test_an_adapter_that_was_displaced_is_missed() -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    model = UNET.model()
    diffusion.attach(model, name="dog")
    attn = model.get_submodule(CROSS.removeprefix("unet."))
    attn.set_processor(mine := CustomDiffusionAttnProcessor2_0(hidden_size=8, cross_attention_dim=12))
    for use in (
        lambda: diffusion.adapters(model),
        lambda: diffusion.set_scale(model, dog=0),
        lambda: diffusion.attach(model),
        lambda: UNET.run(model),
    ):
        with pytest.raises(ModelError, match=f"'dog' cannot act at {CROSS}: Custom Diffusion's own weights"):
            use()
    diffusion.unload(model)
    assert attn.processor is mine  # whose it is now is not ours to say


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "got rank 0, expected a whole number from 1"),
        ({"rank": 2.0}, "got rank 2.0"),
        ({"rank": True}, "got rank True"),
        ({"where": "corss"}, "got where='corss'.*did you mean 'cross'"),
        ({"init": "zeros"}, "got init='zeros'.*did you mean 'zero'"),
        ({"alpha": 0.0}, "alpha: got 0.0, expected a number above 0 and up to 1e\\+06"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": 1e30}, "alpha: got 1e\\+30"),
        ({"name": " "}, "got ' ' as an adapter's name"),
        ({"name": "dog"}, "there is an adapter called 'dog' already"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    model = UNET.model()
    diffusion.attach(model, name="dog")
    with pytest.raises(SettingsError, match=message):
        diffusion.attach(model, **settings)
    assert list(diffusion.adapters(model)) == ["dog"]


def test_scales_are_set_by_name_or_not_at_all() -> None:
    model = UNET.model()
    diffusion.attach(model, name="dog")
    diffusion.attach(model, name="teddy bear")
    diffusion.set_scale(model, dog=0.5, **{"teddy bear": 2})
    assert {n: a.scale for n, a in diffusion.adapters(model).items()} == {"dog": 0.5, "teddy bear": 2.0}
    for scales, message in (
        ({"dog": 1.0, "tedy": 1.0}, "no adapter called 'tedy'"),
        ({"dog": 1.0, "teddy bear": float("inf")}, "got inf"),
        ({"dog": "1"}, "got '1'"),
    ):
        with pytest.raises(SettingsError, match=message):
            diffusion.set_scale(model, **scales)
    assert diffusion.adapters(model)["dog"].scale == 0.5
    with pytest.raises(SettingsError, match=r"no adapter called 'cat'; there are 'dog', 'teddy bear'"):
        diffusion.unload(model, "cat")
    diffusion.unload(model)
    with pytest.raises(SettingsError, match=r"no adapter called 'dog'; there are none"):
        diffusion.unload(model, "dog")
    diffusion.unload(model)  # of none, all is none


@pytest.mark.parametrize("target", [None, 7, torch.nn.Linear(2, 2), object()], ids=lambda v: type(v).__name__)
def test_what_is_no_pipeline(target: object) -> None:
    with pytest.raises(ModelError, match="expected a diffusers pipeline"):
        diffusion.attach(target)


def test_widths_are_padded_where_kernels_want_it() -> None:
    assert padded_width(42, torch.empty(1, dtype=torch.float16)) == 42  # not on a CPU
    q = random(1, 3, 2, 4)
    o, extra = attend(q, q, q, (random(1, 3, 2, 2), random(1, 3, 2, 2, seed=1), None), scale=0.5)
    assert o.shape == q.shape and extra is None
    o, extra = attend(q, q, q, (None, None, random(1, 3, 2, 5)), scale=0.5)
    assert o.shape == q.shape and extra is not None and extra.shape == (1, 3, 2, 5)
    assert (
        relative(
            o,
            torch.softmax(0.5 * q.transpose(1, 2) @ q.transpose(1, 2).mT, -1).matmul(q.transpose(1, 2)).transpose(1, 2),
        )
        < 1e-5
    )


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_in_16_bit() -> None:
    model = UNET.model()
    trained(model, where="all", rank=3)
    expected = UNET.run(model)
    low = UNET.model(torch.float16).cuda()
    trained(low, where="all", rank=3)
    inputs = {k: v.cuda().half() if v.is_floating_point() else v.cuda() for k, v in UNET.arguments().items()}
    assert relative(low(**inputs).sample.float().cpu(), expected) < 0.05
    assert padded_width(42, torch.empty(1, dtype=torch.float16, device="cuda")) == 48

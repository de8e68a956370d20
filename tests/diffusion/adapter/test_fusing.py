"""Adapters inside the weights: exactly, in wider heads, and approximately, in heads as wide as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.errors import NumericsError, SettingsError, UnsupportedSite

from .. import tiny
from ..denoisers import CASES, unet_arguments

UNET = CASES["sd1"]
FUSABLE = ("sd1", "sd2", "sdxl", "sd3")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def two_adapters(model: Any, where: Any = "all", **settings: Any) -> None:
    diffusion.attach(model, name="dog", where=where, rank=2, init="random", seed=1, **settings)
    diffusion.attach(model, name="cat", where=where, rank=3, init="random", seed=2, alpha=2.0, **settings)
    diffusion.set_scale(model, dog=0.7, cat=-1.2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("name", FUSABLE)
@torch.no_grad()
def test_fused_computes_the_same_with_the_model_s_own_processors(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    case = CASES[name]
    model = case.model(dtype)
    modules, processors = dict(model.named_modules()), model.attn_processors
    two_adapters(model, dtype=dtype)
    attached = case.run(model)
    diffusion.fuse(model)
    assert {n: id(p) for n, p in model.attn_processors.items()} == {n: id(p) for n, p in processors.items()}
    assert not any(getattr(m, "comcat_module", False) for m in model.modules())
    assert relative(case.run(model), attached) < tolerance
    diffusion.unfuse(model)
    assert case.run(model).equal(attached)
    diffusion.unload(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert case.run(model).equal(case.run(case.model(dtype)))


@torch.no_grad()
def test_what_only_some_attention_carries() -> None:
    model = UNET.model(torch.float64)
    diffusion.attach(model, name="dog", where="cross", init="random", dtype=torch.float64)
    diffusion.attach(model, name="cat", where="all", rank=3, init="random", dtype=torch.float64)
    attached = UNET.run(model)
    diffusion.fuse(model)
    widths = {
        n: m.out_features
        for n, m in model.named_modules()
        if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn2.to_q")
    }
    assert list(widths.values()) == [2 * (8 + 5)]  # two heads of width 8, ranks 2 and 3
    assert relative(UNET.run(model), attached) < 1e-12


@pytest.mark.parametrize("stock", ["AttnProcessor", "AttnProcessor2_0", "sliced"])
@torch.no_grad()
def test_any_stock_processor_runs_what_was_fused(stock: str) -> None:
    """Some scale the logits by the width of a head, others by the attention's ``scale``."""
    from diffusers.models import attention_processor

    model = UNET.model(torch.float64)
    two_adapters(model, dtype=torch.float64)
    attached = UNET.run(model)
    diffusion.fuse(model)
    if stock == "sliced":
        model.set_attention_slice(1)
    else:
        model.set_attn_processor(getattr(attention_processor, stock)())
    assert relative(UNET.run(model), attached) < 1e-12


@torch.no_grad()
def test_masks_while_fused() -> None:
    model = UNET.model(torch.float64)
    two_adapters(model, dtype=torch.float64)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    attached = UNET.run(model, encoder_attention_mask=keep)
    diffusion.fuse(model)
    assert relative(UNET.run(model, encoder_attention_mask=keep), attached) < 1e-12


@torch.no_grad()
def test_text_encoders_are_fused_as_well(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    ids = pipe.tokenizer("a photo of a dog", padding="max_length", return_tensors="pt").input_ids
    diffusion.attach(pipe, text_encoder=True, init="random", rank=3)
    attached = pipe.text_encoder(ids).last_hidden_state
    diffusion.fuse(pipe)
    assert relative(pipe.text_encoder(ids).last_hidden_state, attached) < 1e-5
    assert pipe.text_encoder.encoder.layers[0].self_attn.q_proj.out_features == 2 * (8 + 3)
    diffusion.unfuse(pipe)
    assert pipe.text_encoder(ids).last_hidden_state.equal(attached)


@torch.no_grad()
def test_copies_moves_and_saving_while_fused(tmp_path: Path) -> None:
    model = UNET.model()
    two_adapters(model)
    attached = UNET.run(model)
    diffusion.fuse(model)
    fused = UNET.run(model)
    copied = copy.deepcopy(model)
    copied.to(torch.float64)
    diffusion.unfuse(copied)
    assert next(copied.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.parameters()).dtype is torch.float64
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in unet_arguments().items()}
    assert relative(copied(**arguments).sample.float(), attached) < 1e-5
    assert UNET.run(model).equal(fused)
    path = diffusion.save(model, tmp_path / "dog.safetensors", name="dog", dtype=torch.float32)
    diffusion.unfuse(model)
    diffusion.unload(model)
    two = UNET.model()
    diffusion.load(two, path, scale=0.7)
    diffusion.attach(two, name="cat", where="all", rank=3, init="random", seed=2, alpha=2.0)
    diffusion.set_scale(two, cat=-1.2)
    assert UNET.run(two).equal(attached)


def test_nothing_changes_while_fused(tmp_path: Path) -> None:
    model = UNET.model()
    with pytest.raises(SettingsError, match="there is no adapter to fuse"):
        diffusion.fuse(model)
    with pytest.raises(SettingsError, match="there is no fused adapter"):
        diffusion.unfuse(model)
    diffusion.attach(model, name="dog")
    path = diffusion.save(model, tmp_path / "cat.safetensors", name="dog")
    diffusion.fuse(model)
    assert diffusion.adapters(model)["dog"].rank == 2
    for change in (
        lambda: diffusion.fuse(model),
        lambda: diffusion.attach(model),
        lambda: diffusion.load(model, path),
        lambda: diffusion.set_scale(model, dog=0.5),
        lambda: diffusion.unload(model),
        lambda: diffusion.merge(model, "dog"),
    ):
        with pytest.raises(SettingsError, match=r"adapter 'dog' is fused into the weights; unfuse\(\) first"):
            change()


@pytest.mark.parametrize("verb", ["fuse", "merge"])
def test_what_stands_between_q_and_k(verb: str) -> None:
    for name, reason in (("sd35", "q/k normalisation"), ("flux", "q/k normalisation and rotary embeddings")):
        model = CASES[name].model()
        diffusion.attach(model, where="all")
        before = dict(model.attn_processors)
        with pytest.raises(UnsupportedSite, match=rf"cannot {verb}.* 3 of 3 attentions: .*{reason}"):
            diffusion.fuse(model) if verb == "fuse" else diffusion.merge(model, "default")
        assert model.attn_processors == before


@pytest.mark.parametrize("verb", ["fuse", "merge"])
@torch.no_grad()
def test_an_unmerged_lora_is_in_the_way(verb: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = UNET.model()
    diffusion.attach(model, init="random")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    attached, before = UNET.run(model), dict(model.attn_processors)
    with pytest.raises(
        UnsupportedSite,
        match=rf"cannot {verb}.* 4 of 4 .*to_k carries a LoRA that is not merged; fuse_lora\(\) or unload it",
    ):
        diffusion.fuse(model) if verb == "fuse" else diffusion.merge(model, "default")
    assert model.attn_processors == before and UNET.run(model).equal(attached)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    if verb == "fuse":
        diffusion.fuse(model)
        assert relative(UNET.run(model), attached) < 1e-5
        diffusion.unfuse(model)
        assert relative(UNET.run(model), attached) < 1e-6


def test_weights_that_are_not_there() -> None:
    model = UNET.model().to("meta")
    diffusion.attach(model)
    with pytest.raises(UnsupportedSite, match=r"the weights of to_q are not there"):
        diffusion.fuse(model)


def low_rank_heads(model: nn.Module, heads: int, missing: int) -> None:
    """Take channels out of every head of W_Q and W_V, so that a product has room for a term of that rank."""
    for name, module in model.named_modules():
        if name.endswith((".to_q", ".to_v", ".add_q_proj", ".add_v_proj")) and isinstance(module, nn.Linear):
            module.weight.data.unflatten(0, (heads, -1))[:, -missing:] = 0
            if module.bias is not None:
                module.bias.data.unflatten(0, (heads, -1))[:, -missing:] = 0


@pytest.mark.parametrize("name", ["sd1", "sd3"])
@torch.no_grad()
def test_merging_is_exact_where_there_is_room(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    low_rank_heads(model, 2, 2)
    state = {k: v.shape for k, v in model.state_dict().items()}
    diffusion.attach(model, name="dog", where="all", init="random", dtype=torch.float64)
    diffusion.set_scale(model, dog=0.8)
    attached = case.run(model)
    report = diffusion.merge(model, "dog")
    assert max(e.of_term for e in report.errors.values()) < 1e-12
    assert relative(case.run(model), attached) < 1e-10
    assert diffusion.adapters(model) == {} and {k: v.shape for k, v in model.state_dict().items()} == state


@pytest.mark.parametrize("name", FUSABLE)
@torch.no_grad()
def test_merging_takes_one_adapter_and_leaves_the_others(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    settings: dict[str, Any] = {"where": case.where[0], "init": "random", "dtype": torch.float64}
    diffusion.attach(model, name="cat", seed=3, **settings)
    paths = list(diffusion.attach(model, name="dog", **settings).terms)
    report = diffusion.merge(model, "dog")
    assert list(diffusion.adapters(model)) == ["cat"]
    assert set(report.errors) == {f"{path}:{product}" for path in paths for product in ("qk", "vo")}
    assert all(0 <= e.relative < e.of_term < 1 for e in report.errors.values() if e.of_term > 1e-9)
    assert "merged 'dog': lost" in str(report) and report.worst in str(report)


@torch.no_grad()
def test_merging_reports_what_it_cuts_off() -> None:
    plain, model = UNET.model(torch.float64), UNET.model(torch.float64)
    adapter = diffusion.attach(model, name="dog", init="random", dtype=torch.float64)
    diffusion.set_scale(model, dog=0.9)
    terms = dict(adapter.terms)
    report = diffusion.merge(model, "dog")
    for path, t in terms.items():
        before, after = (m.get_submodule(path.removeprefix("unet.")) for m in (plain, model))

        def product(attn: Any, i: int) -> Tensor:  # W_V W_O of one head
            width = attn.to_v.out_features // attn.heads
            rows = slice(i * width, (i + 1) * width)
            return attn.to_v.weight[rows].mT @ attn.to_out[0].weight[:, rows].mT

        cut = total = added = torch.zeros((), dtype=torch.float64)
        for i in range(before.heads):
            rows = slice(i * t.rank, (i + 1) * t.rank)
            term = 0.9 * t.v_down[rows].mT @ t.out_up[:, rows].mT
            wanted = product(before, i) + term
            cut = cut + (product(after, i) - wanted).square().sum()
            total, added = total + wanted.square().sum(), added + term.square().sum()
        error = report.errors[f"{path}:vo"]
        assert error.relative == pytest.approx(float((cut / total).sqrt()), rel=1e-6)
        assert error.of_term == pytest.approx(float((cut / added).sqrt()), rel=1e-6)
        assert error.of_term > 0.01


@torch.no_grad()
def test_merging_into_a_text_encoder(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path)
    ids = pipe.tokenizer("a photo of a dog", padding="max_length", return_tensors="pt").input_ids
    for layer in pipe.text_encoder.encoder.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            linear.weight.data.unflatten(0, (2, -1))[:, -2:] = 0
            linear.bias.data.unflatten(0, (2, -1))[:, -2:] = 0
    diffusion.attach(pipe, text_encoder=True, init="random")
    attached = pipe.text_encoder(ids).last_hidden_state
    report = diffusion.merge(pipe, "default")
    assert report.errors["text_encoder.encoder.layers.0.self_attn:qk"].of_term < 1e-3
    assert relative(pipe.text_encoder(ids).last_hidden_state, attached) < 1e-4


@torch.no_grad()
def test_merging_into_weights_that_are_no_numbers() -> None:
    model = UNET.model()
    diffusion.attach(model, init="random")
    model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="hold NaN or infinity"):
        diffusion.merge(model, "default")
    assert list(diffusion.adapters(model)) == ["default"]


def test_merging_what_is_not_there() -> None:
    model = UNET.model()
    diffusion.attach(model, name="dog")
    with pytest.raises(SettingsError, match="no adapter called 'dgo'; did you mean 'dog'"):
        diffusion.merge(model, "dgo")
    report = diffusion.merge(model, "dog")  # fresh: there is nothing to lose
    assert all(e.of_term == 0 and e.relative < 1e-12 for e in report.errors.values())

"""Every family of denoisers computes Equation 8: explicit logits, head by head, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import ModelError, UnsupportedSite

from ..denoisers import CASES, Case
from ..token_denoisers import TOKEN_CASES

EVERY = CASES | TOKEN_CASES
STREAMS = {"sd3": ("", "add_"), "sd35": ("", "add_")}
"""Whose tokens come first where both streams have projections; in all other families it is the text's."""
PROJECTIONS = {
    "q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj"),
    "out": ("to_out", "to_add_out"),
}  # fmt: skip


@contextmanager
def watched(attention: Any) -> Iterator[dict[str, Any]]:
    """What goes into and comes out of an attention, its projections, and the softmax attention that it calls."""
    seen: dict[str, Any] = {"read": {}, "softmax": []}
    computed = F.scaled_dot_product_attention

    def whole(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output)

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        def told(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **named: Any) -> Tensor:
            seen["softmax"].append((query.clone(), key.clone(), value.clone(), positional, named))
            return computed(query, key, value, *positional, **named)

        F.scaled_dot_product_attention = told

    def leaving(module: Any, args: Any, output: Any) -> None:
        F.scaled_dot_product_attention = computed

    handles = [
        attention.register_forward_pre_hook(entering, with_kwargs=True),
        attention.register_forward_hook(leaving),
        attention.register_forward_hook(whole, with_kwargs=True),
    ]
    for side, names in PROJECTIONS.items():
        for prefix, name in zip(("", "add_"), names, strict=True):
            module = projection(attention, name)
            if module is not None:
                reading = lambda m, args, key=(prefix, side): seen["read"].__setitem__(key, args[0].clone())  # noqa: E731
                handles.append(module.register_forward_pre_hook(reading))
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = computed
        for handle in handles:
            handle.remove()


def projection(attention: Any, name: str) -> Any:
    if hasattr(attention, "to_qkv_mlp_proj"):
        return {"to_out": attention.to_out}.get(
            name, attention.to_qkv_mlp_proj if name in ("to_q", "to_k", "to_v") else None
        )
    module = getattr(attention, name, None)
    return module[0] if isinstance(module, torch.nn.ModuleList) else module


def expected(attention: Any, seen: dict[str, Any], terms: Any, order: tuple[str, ...]) -> list[Tensor]:
    """What the attention gives with terms, from what the library computed without them."""
    (q, k, v, positional, named) = seen["softmax"][0]
    mask = positional[0] if positional else named.get("attn_mask")
    scale = named.get("scale") or q.shape[-1] ** -0.5
    order = tuple(p for p in order if (p, "k") in seen["read"])
    strength, rank = terms.alpha / terms.rank * terms.scale, terms.rank

    def rows(side: str, name: str, head: int) -> Tensor:
        parts = []
        for p in order:
            factor, x = getattr(terms, p + name, None), seen["read"][p, side]
            own = x.new_zeros(*x.shape[:2], rank)
            parts.append(own if factor is None else x @ factor[head * rank : (head + 1) * rank].mT)
        return torch.cat(parts, dim=1)

    before, after, extra = [], [], []
    for h in range(terms.heads):
        old = scale * q[:, h] @ k[:, h].mT
        new = old + scale * strength * rows("q", "q_up", h) @ rows("k", "k_down", h).mT
        if mask is not None:
            shown = mask.expand(q.shape[0], terms.heads, q.shape[2], k.shape[2])[:, h]
            shown = torch.where(shown, 0.0, float("-inf")).to(old) if shown.dtype == torch.bool else shown
            old, new = old + shown, new + shown
        old, new = (logits.softmax(-1).nan_to_num(0.0) for logits in (old, new))  # Chroma's hidden words see nothing
        before.append(old @ v[:, h])
        after.append(new @ v[:, h])
        if hasattr(terms, "v_down"):
            extra.append(strength * new @ rows("v", "v_down", h))
    difference = torch.cat(after, dim=-1) - torch.cat(before, dim=-1)
    outputs = seen["output"] if isinstance(seen["output"], tuple) else (seen["output"],)
    begin, result = 0, {}
    for p in order:
        count = seen["read"][p, "q"].shape[1]
        here = slice(begin, begin + count)
        begin += count
        out = projection(attention, "to_add_out" if p else "to_out")
        change = difference[:, here]
        if out is not None:
            change = change @ out.weight[:, : change.shape[-1]].mT
            if hasattr(terms, f"{p}out_up"):  # else nothing reads what it would write
                change = change + torch.cat([e[:, here] for e in extra], dim=-1) @ getattr(terms, f"{p}out_up").mT
        result[p] = change
    if order == ("",) and len(outputs) == 2:  # one stream inside, two outside: the text comes first
        words = outputs[1].shape[1]
        result = {"": result[""][:, words:], "add_": result[""][:, :words]}
    return [y + result[p] for p, y in zip(("", "add_"), outputs, strict=False) if p in result]


def attentions(name: str) -> list[str]:
    found = diffusion.find_adaptable(EVERY[name].model())
    return [path.partition(".")[2] for path in found.attention]


@pytest.mark.parametrize("name", list(EVERY))
@torch.no_grad()
def test_every_attention_computes_equation_8(name: str) -> None:
    case = EVERY[name]
    model = case.model(torch.float64)
    paths = attentions(name)
    recorded = {}
    for path in paths:
        attention = model.get_submodule(path)
        with watched(attention) as seen:
            case.run(model)
        assert len(seen["softmax"]) == 1
        recorded[path] = seen
    where = case.where[-1]
    adapter = diffusion.attach(model, init="random", where=where, rank=3, alpha=2.0, dtype=torch.float64)
    diffusion.set_scale(model, default=0.7)
    checked = 0
    for path, seen in recorded.items():
        terms = adapter.terms.get(f"{'unet' if 'unet' in type(model).__name__.lower() else 'transformer'}.{path}")
        if terms is None:
            continue
        attention = model.get_submodule(path)
        got = attention(*seen["args"], **seen["kwargs"])
        got = got if isinstance(got, tuple) else (got,)
        wanted = expected(attention, seen, terms, STREAMS.get(name, ("add_", "")))
        for y, z in zip(got, wanted, strict=False):
            assert float((y - z).abs().max()) < 1e-9 * float(z.abs().max())
        before = seen["output"] if isinstance(seen["output"], tuple) else (seen["output"],)
        assert float((got[0] - before[0]).abs().max()) > 1e-4 * float(before[0].abs().max())
        checked += 1
    assert checked == len(adapter.terms)


@pytest.fixture(params=list(TOKEN_CASES))
def family(request: pytest.FixtureRequest) -> Case:
    return TOKEN_CASES[request.param]


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_unloading_gives_the_model_back(family: Case) -> None:
    model = family.model()
    before, processors = family.run(model), {n: getattr(m, "processor", None) for n, m in model.named_modules()}
    for where in family.where:
        diffusion.attach(model, where=where, rank=3)
        changed = float((family.run(model) - before).abs().max() / before.abs().max())
        assert changed < 1e-5
        diffusion.unload(model)
    diffusion.attach(model, where=family.where[-1], init="random")
    assert not torch.allclose(family.run(model), before, rtol=1e-3)
    diffusion.unload(model)
    assert family.run(model).equal(before)
    assert {n: getattr(m, "processor", None) for n, m in model.named_modules()} == processors


def test_steps_lower_the_loss_of_a_fixed_batch_and_the_file_gives_the_same_output(family: Case, tmp_path: Any) -> None:
    model = family.model().requires_grad_(False)
    with torch.no_grad():
        target = family.run(model) + 0.1
    adapter = diffusion.attach(model, where=family.where[-1])
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(family.run(model), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = family.run(model)
        file = diffusion.save(model, tmp_path / "dog.safetensors", dtype=torch.float32)
        diffusion.unload(model)
        diffusion.load(model, file, name="dog")
        assert torch.allclose(family.run(model), trained, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_factor_has_a_part_in_the_output(name: str) -> None:
    case = EVERY[name]
    model = case.model().requires_grad_(False)
    adapter = diffusion.attach(model, where="joint" if "joint" in case.where else case.where[-1], init="random")
    case.run(model).square().sum().backward()
    assert [key for key, p in adapter.named_parameters().items() if p.grad is None or not p.grad.any()] == []


def test_factors_that_nothing_reads_are_left_out_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Qwen-Image drops what its last block makes of the text. A file of before still loads."""
    case = TOKEN_CASES["qwen"]
    first, last = diffusion.find_adaptable(case.model()).attention.values()
    assert first.unread == {} and {"add_q_up", "add_out_up"} < set(first.widths)
    assert last.unread == {"add_q_up": 16, "add_out_up": 16} and not set(last.unread) & set(last.widths)
    assert last.products == ("qk", "vo") and set(last.widths) | set(last.unread) == set(first.widths)
    with monkeypatch.context() as of_before, torch.no_grad():
        of_before.setattr("comcat.diffusion.adapter.hosts.diffusers._read_later", lambda model, found: found)
        model = case.model()
        diffusion.attach(model, init="random")
        wanted = case.run(model)
        old = diffusion.save(model, tmp_path / "old.safetensors", dtype=torch.float32)
    model = case.model()
    adapter = diffusion.load(model, old)
    with torch.no_grad():
        assert torch.allclose(case.run(model), wanted, atol=1e-6)
    assert len(diffusion.read(old).factors[last.path]) == 8 and len([*adapter.terms[last.path].parameters()]) == 6
    new = diffusion.save(model, tmp_path / "new.safetensors", name="old", dtype=torch.float32)
    assert new.stat().st_size < old.stat().st_size


def test_what_cannot_carry_terms_says_why_module_by_module() -> None:
    model = TOKEN_CASES["sana"].model()
    found = diffusion.find_adaptable(model)
    assert {r.name for r in found.refused} == {f"transformer.transformer_blocks.{n}.attn1" for n in (0, 1)}
    assert all("linear attention" in r.reason for r in found.refused)
    with pytest.raises(UnsupportedSite, match=r"attn1.*linear attention"):
        diffusion.attach(model, where="all")
    flux = diffusion.find_adaptable(CASES["flux"].model()).attention
    assert "fused with the MLP's" in flux["transformer.single_transformer_blocks.0.attn"].missing["vo"]
    flux2 = diffusion.find_adaptable(TOKEN_CASES["flux2"].model()).attention
    assert flux2["transformer.single_transformer_blocks.0.attn"].products == ("qk", "vo")


def test_attention_of_which_nothing_is_known_is_told_by_its_processor() -> None:
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
    )  # fmt: skip
    found = diffusion.find_adaptable(model)
    assert not found.attention and len(found.refused) == 3
    with pytest.raises(UnsupportedSite, match="its processor is a Kandinsky5AttnProcessor, of which"):
        diffusion.attach(model)


def test_transformers_of_videos_are_told_module_by_module() -> None:
    """Mochi's attention cannot exchange its processor, and is one all the same."""
    from diffusers import MochiTransformer3DModel

    mochi = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    found = diffusion.find_adaptable(mochi)
    assert [r.name for r in found.refused] == [f"transformer.transformer_blocks.{n}.attn1" for n in range(2)]
    assert all("MochiAttnProcessor2_0, of which it is not known" in r.reason for r in found.refused)
    with pytest.raises(UnsupportedSite, match=r"blocks\.0\.attn1 \(its processor is a MochiAttnProcessor2_0"):
        diffusion.attach(mochi, where="all")


def test_a_given_picture_beside_the_text_closes_cross_attention_alone() -> None:
    wan: Any = TOKEN_CASES["wan"].model()
    wan = type(wan)(**wan.config | {"added_kv_proj_dim": 24, "image_dim": 8})
    found = diffusion.find_adaptable(wan)
    assert [*found.attention] == [f"transformer.blocks.{n}.attn1" for n in range(2)]
    assert {r.name for r in found.refused} == {f"transformer.blocks.{n}.attn2" for n in range(2)}
    assert all("keys and values of a given picture" in r.reason for r in found.refused)


def test_another_attention_backend_is_told_and_not_passed_over() -> None:
    case = TOKEN_CASES["qwen"]
    model: Any = case.model()
    diffusion.attach(model)
    processor = model.transformer_blocks[0].attn.processor
    engine = type("QwenDoubleStreamAttnProcessor2_0", (), {"__call__": lambda self, attn, x, **more: (x, x)})()
    processor.before = engine
    with pytest.raises(ModelError, match="called softmax attention 0 times"):
        case.run(model)


@pytest.mark.parametrize("kind", ["fuse", "merge"])
def test_fusing_and_merging_are_refused_with_the_reason(kind: str) -> None:
    both = "q/k normalisation and rotary embeddings (between|to whole)"
    for name, reason in (("flux2", both), ("lumina2", both), ("wan", "q/k normalisation (between|to whole)")):
        model = TOKEN_CASES[name].model()
        diffusion.attach(model, init="random")
        with pytest.raises(UnsupportedSite, match=reason):
            diffusion.fuse(model) if kind == "fuse" else diffusion.merge(model, "default")


@torch.no_grad()
def test_pixart_is_fused() -> None:
    case = TOKEN_CASES["pixart"]
    model = case.model(torch.float64)
    diffusion.attach(model, init="random", where="cross", dtype=torch.float64)
    attached = case.run(model)
    diffusion.fuse(model)
    assert torch.allclose(case.run(model), attached)

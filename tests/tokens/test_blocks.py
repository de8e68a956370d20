"""Blocks that run on fewer tokens: the trunk is found, the no-op is exact, and all can be taken back."""

import copy
import pickle

import pytest
import torch

import comcat
from comcat.errors import ModelError, PlanError
from comcat.forms.tokens import grid_entry, token_entry
from comcat.plan import Plan
from comcat.statistics.trunk import find_trunk

from ..models import pictures, tiny_vit

X = pictures(4, 4)[0]


def merged_plan(trunk, how, keep=None, **more):
    entries = {}
    for site in trunk.sites:
        if how == "grid":
            entries[site.name] = grid_entry(site, keep or (1, 2), **more)
        else:
            entries[site.name] = token_entry(site, how, keep or site.full // 2, **more)
    return Plan(sites=entries)


def test_the_trunk_of_a_vision_transformer():
    trunk = find_trunk(tiny_vit(), X[:1])
    assert [s.path for s in trunk.sites] == ["blocks.0", "blocks.1"]
    site = trunk.sites[0]
    assert (site.full, site.prefix, site.grid, site.patches) == (16, 1, (4, 4), "patch_embed.proj")
    assert (site.stream, site.mask, site.norm) == ("x", "attn_mask", "norm1")


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_fewer_tokens_and_back_bit_for_bit(how):
    model = tiny_vit()
    before, keys = model(X), list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    more = {"by": "random"} if how == "drop" else {}
    handle = comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), how, **more))
    assert list(model.state_dict()) == keys
    assert not torch.allclose(model(X), before, atol=1e-3)
    handle.revert()
    assert torch.equal(model(X), before) and [type(m) for m in model.modules()] == kinds


def test_all_tokens_kept_is_the_model_itself():
    model = tiny_vit()
    before = model(X)
    trunk = find_trunk(model, X[:1])
    for plan in (merged_plan(trunk, "similar", 16), merged_plan(trunk, "grid", (1, 1))):
        handle = comcat.apply_(model, plan)
        assert torch.equal(model(X), before)
        handle.revert()


def test_equal_tokens_are_merged_without_loss():
    """Where every second token is a copy of its neighbour, running one of the two with twice the weight is exact."""
    model = tiny_vit(class_token=False, global_pool="avg")
    block = model.blocks[0]
    x = torch.randn(2, 8, 48).repeat_interleave(2, 1)
    before = block(x)
    trunk = find_trunk(model, X[:1])
    handle = comcat.apply_(model, merged_plan(trunk, "similar", 8))
    torch.testing.assert_close(block(x), before, atol=1e-5, rtol=1e-5)
    handle.revert()


def test_blocks_run_on_fewer_tokens():
    model = tiny_vit()
    seen = []
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    model.blocks[1].mlp.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    model(X)
    assert seen == [7]
    assert [t.shape for t in model.forward_intermediates(X, intermediates_only=True)] == [(4, 48, 4, 4)] * 2


def test_copies_and_pickles_are_the_model():
    model = tiny_vit()
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    after = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), after) and "OnFewerTokens" in repr(other)
        with torch.no_grad():
            other.blocks[0].attn.proj.weight.zero_()
    assert torch.equal(model(X), after)


def test_other_and_rectangular_pictures():
    model = tiny_vit(dynamic_img_size=True)
    trunk = find_trunk(model, X[:1])
    wide = torch.randn(2, 3, 24, 48)
    for plan in (merged_plan(trunk, "grid"), merged_plan(trunk, "similar")):
        handle = comcat.apply_(model, plan)
        model.eval()
        assert model(wide).shape == (2, 5) and torch.isfinite(model(wide)).all()
        handle.revert()
    comcat.apply_(model, merged_plan(trunk, "grid", (2, 1)))
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    model(wide)
    assert seen == [1 + 2 * 6]  # 3 × 6 patches, pairs of rows, the last row alone


def test_a_batch_of_one_and_the_order_of_pictures():
    model = tiny_vit()
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    together = model(X)
    for i in (3, 1):
        torch.testing.assert_close(model(X[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


def test_training_and_gradient_checkpointing_give_the_same_gradients():
    model = tiny_vit()
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model(X).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_a_mask_beside_merged_tokens_is_refused():
    model = tiny_vit()
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    with pytest.raises(ModelError, match="runs on fewer"):
        model.blocks[0](torch.randn(1, 17, 48), attn_mask=torch.zeros(17, 17))


def test_two_merges_on_one_block_and_plans_of_other_models():
    model = tiny_vit()
    plan = merged_plan(find_trunk(model, X[:1]), "similar", 6)
    comcat.apply_(model, plan)
    with pytest.raises(PlanError, match="already"):
        comcat.apply_(model, plan)
    with pytest.raises(PlanError, match=r"no 'blocks\.1'"):
        comcat.apply_(tiny_vit(depth=1), plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_ranks_units_and_tokens_together_and_back():
    model = tiny_vit()
    before = model(X)
    small = comcat.allocate(model, reduce=0.3, multiple=4)
    tokens = merged_plan(find_trunk(model, X[:1]), "similar", 8)
    both = Plan(sites={**small.sites, **tokens.sites}, made_for=small.made_for)
    handle = comcat.apply_(model, both)
    assert torch.isfinite(model(X)).all()
    handle.revert()
    assert torch.equal(model(X), before)


def test_what_has_no_trunk_says_why():
    import timm

    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=7
    )
    with pytest.raises(ModelError, match="no trunk"):
        find_trunk(swin, torch.randn(1, 3, 56, 56))
    beit = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    trunk = find_trunk(beit, torch.randn(1, 3, 32, 32))
    assert not trunk.sites and len(trunk.refused) == 2
    assert trunk.refused[0].reason == "does not accept fewer tokens than the grid has"


def test_compiled_without_a_break():
    model = tiny_vit()
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), expected, atol=1e-5, rtol=1e-5)


def test_exported_with_a_dynamic_batch():
    for plan_of in (lambda t: merged_plan(t, "similar", 6), lambda t: merged_plan(t, "grid")):
        model = tiny_vit()
        comcat.apply_(model, plan_of(find_trunk(model, X[:1])))
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
        more = torch.cat((X, X.flip(-1)))
        torch.testing.assert_close(exported(more), model(more), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_traced_for_torchscript(how):
    model = tiny_vit()
    comcat.apply_(model, comcat.merge(model, [X], keep=0.6, how=how))
    traced = torch.jit.trace(model, X)
    more = torch.cat((X, X.flip(-1)))
    torch.testing.assert_close(traced(more), model(more), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"a Block on fewer tokens"):
        torch.jit.script(model)


def config_model(kind, **more):
    import transformers as tf

    names = {
        "vit": (tf.ViTConfig, tf.ViTForImageClassification), "deit": (tf.DeiTConfig, tf.DeiTModel),
        "dinov2": (tf.Dinov2Config, tf.Dinov2ForImageClassification), "backbone": (tf.Dinov2Config, tf.Dinov2Backbone),
        "registers": (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel),
        "clip": (tf.CLIPVisionConfig, tf.CLIPVisionModel), "siglip": (tf.SiglipVisionConfig, tf.SiglipVisionModel),
        "mae": (tf.ViTMAEConfig, tf.ViTMAEModel),
    }  # fmt: skip
    config, model = names[kind]
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return model(config(image_size=32, patch_size=8, **common, **more)).eval()


@pytest.mark.parametrize(
    ("kind", "prefix", "full"),
    [
        ("vit", 1, 16),
        ("deit", 2, 16),
        ("dinov2", 1, 16),
        ("registers", 5, 16),
        ("clip", 1, 16),
        ("siglip", 0, 16),
        ("mae", 1, 4),
    ],
)
def test_trunks_of_transformers(kind, prefix, full):
    model = config_model(kind)
    trunk = find_trunk(model, X[:1])
    assert [(s.prefix, s.full) for s in trunk.sites] == [(prefix, full)] * 2, trunk.refused
    assert trunk.sites[0].grid == ((4, 4) if kind != "mae" else None)
    assert trunk.sites[0].norm is not None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
                                  "vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224",
                                  "vit_base_patch16_siglip_224"])  # fmt: skip
def test_trunks_of_timm(name):
    import timm

    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()
    trunk = find_trunk(model, X[:1])
    assert len(trunk.sites) == 2 and trunk.sites[0].full == 16 and trunk.sites[0].grid == (4, 4)
    assert trunk.sites[0].mask == "attn_mask"


def test_hidden_states_and_feature_maps_have_the_whole_grid():
    model = config_model("dinov2")
    recorded = model(X, output_hidden_states=True).hidden_states
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    again = model(X, output_hidden_states=True)
    assert [h.shape for h in again.hidden_states] == [h.shape for h in recorded] == [(4, 17, 32)] * 3
    assert not torch.equal(again.hidden_states[1], recorded[1])
    backbone = config_model("backbone", out_features=["stage1", "stage2"])
    comcat.apply_(backbone, merged_plan(find_trunk(backbone, X[:1]), "grid"))
    assert [f.shape for f in backbone(X).feature_maps] == [(4, 32, 4, 4)] * 2


def test_gradient_checkpointing_of_transformers():
    model = config_model("vit")
    comcat.apply_(model, merged_plan(find_trunk(model, X[:1]), "similar", 6))
    model.gradient_checkpointing_enable()
    model.train()
    model(X).logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

"""What takes a module's place is as its predecessor was: frozen, training, typed, hooked and named as that."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import comcat
from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan

from ..models import tiny_vit
from .conftest import subject_of
from .test_apply import low_plan
from .zoo import relative_error, run

FAMILIES = [
    "timm-vit",
    "timm-vit-gated",
    "timm-beit",
    "timm-swin",
    "timm-relpos",
    "timm-vit-qk-norm",
    "timm-eva02",
    "hf-vit",
    "hf-swinv2",
    "hand-plain",
]


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_frozen_trunk_stays_frozen() -> None:
    """A ViT frozen up to its head came back with 35,837 trained parameters instead of 245."""
    model = tiny_vit().requires_grad_(False)
    model.head.requires_grad_(True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 245
    small = comcat.compress(model, reduce=0.3, statistic="weights", only=("qk", "vo", "blocks"))
    assert trained(small) == {"head.weight", "head.bias"}
    small(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {n for n, p in small.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_or_not_as_a_whole(name: str) -> None:
    for wanted in (True, False):
        model = subject_of(name).copy().requires_grad_(wanted)
        with no_warning():
            apply_(model, low_plan(subject_of(name).sites))
        assert {p.requires_grad for p in model.parameters()} == {wanted}


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_alone(name: str) -> None:
    """BitFit: every bias that took the place of biases learns, no factor does."""
    model = subject_of(name).copy().requires_grad_(False)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    with no_warning():
        handle = apply_(model, low_plan(subject_of(name).sites))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    factors = ("qkv", "proj", "first", "last", "linear")
    for path in factors:
        assert not any(flag for n, flag in flags.items() if n.endswith(f"{path}.weight")), path
    if name != "hand-plain":  # it has no biases in attention
        learns = {n for n, flag in flags.items() if n.endswith(("qkv.bias", "last.bias")) and flag}
        assert learns == {n for n in flags if n.endswith(("qkv.bias", "last.bias")) and "reduction" not in n}
    handle.revert()
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in biases]


def test_a_projection_frozen_in_part_is_trained_and_it_is_said() -> None:
    """q, k and v become one matrix, which cannot be frozen in part."""
    subject = subject_of("hand-plain")
    model = subject.copy().requires_grad_(False)
    model.blocks[0].attend.v_proj.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^blocks\.0\.attend was frozen in part"):
        apply_(model, low_plan(subject.sites))
    assert trained(model) == {"blocks.0.attend.qkv.weight"}


def test_training_flags_of_each_module() -> None:
    model = subject_of("timm-vit").copy().train()
    model.blocks[0].attn.eval()
    model.blocks[1].attn.proj_drop.eval()
    model.blocks[1].mlp.fc1.eval()
    apply_(model, low_plan(subject_of("timm-vit").sites))
    first, second = model.blocks
    assert not any(m.training for m in first.attn.modules())
    assert {n for n, m in second.named_modules() if not m.training} == {
        "attn.proj_drop",
        "mlp.fc1",
        "mlp.fc1.first",
        "mlp.fc1.last",
    }


def test_compression_leaves_training_flags_alone() -> None:
    model = tiny_vit().train()
    model.blocks[1].eval()
    pictures = [torch.randn(2, 3, 32, 32)]
    for settings in ({"statistic": "weights"}, {"statistic": "loss", "calibration": pictures}):
        small = comcat.compress(model, reduce=0.3, **settings)
        for name, module in small.named_modules():
            assert module.training != name.startswith("blocks.1"), name


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "timm-eva02"])
def test_dtype_of_each_part(name: str) -> None:
    """Layers that were kept in another precision than the rest keep it."""
    subject = subject_of(name)
    model = subject.copy().double()
    wide = [s.attention.v.path for s in subject.sites.only("vo").values()] + ["blocks.0.mlp.fc1"]
    paths = [p for p in wide if any(n == p for n, _ in model.named_modules())]
    for path in paths:
        model.get_submodule(path).float()
    apply_(model, low_plan(subject.sites))
    for path in paths:
        assert {p.dtype for p in model.get_submodule(path).parameters()} == {torch.float32}, path


def test_memory_format_of_what_stays() -> None:
    subject = subject_of("timm-swin")
    model = subject.copy().to(memory_format=torch.channels_last)
    apply_(model, low_plan(subject.sites))
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    images = subject.images.to(memory_format=torch.channels_last)
    assert relative_error(run(model, images), run(model, subject.images)) < 1e-5


def test_weights_that_share_memory_are_refused() -> None:
    """Tied by storage rather than by name: shrinking one would silently untie them."""
    model = subject_of("timm-vit").copy()
    model.blocks[1].mlp.fc1.weight.data = model.blocks[0].mlp.fc1.weight.data
    model.blocks[1].attn.proj.weight.data = model.blocks[0].attn.proj.weight.data
    sites = find_sites(model)
    reasons = {r.name: r.reason for r in sites.refused}
    for i in range(2):
        assert "shared" in reasons[f"blocks.{i}.mlp.fc1"] and "shared" in reasons[f"blocks.{i}.attn"]
    assert set(sites) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "head"}


@pytest.mark.parametrize("path", ["blocks.0.attn", "blocks.0.mlp.fc1"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-beit"])
def test_hooks_and_attributes_go_on(name: str, path: str) -> None:
    subject = subject_of(name)
    model, seen = subject.copy(), []
    module = model.get_submodule(path)
    module.lr_scale = 0.5
    handles = [
        module.register_forward_pre_hook(lambda m, i: seen.append("before")),
        module.register_forward_hook(lambda m, a, k, o: seen.append("after"), with_kwargs=True),
        module.register_full_backward_hook(lambda m, i, o: seen.append("back")),
    ]
    handle = apply_(model, low_plan(subject.sites))
    stand_in = model.get_submodule(path)
    assert stand_in is not module and stand_in.lr_scale == 0.5
    if path.endswith("attn"):
        assert stand_in.num_heads == 3
    run(model, subject.images).sum().backward()
    assert seen == ["before", "after", "back"]
    for registered in handles:
        registered.remove()
    run(model, subject.images)
    handle.revert()
    run(model, subject.images)
    assert len(seen) == 3


def test_hooks_that_cannot_go_on_are_named() -> None:
    subject = subject_of("timm-vit")
    model = subject.copy()
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, i, o: None)
    with pytest.warns(UserWarning, match=r"^blocks\.1\.attn\.qkv is no more, and its hooks with it"):
        apply_(model, Plan(sites={"blocks.1.attn:qk": SitePlan(keep=2, full=8)}))


def test_trials_call_no_hooks_of_the_models_own() -> None:
    """Finding sites tries copies of attention on random numbers: nothing that a hook should see."""
    model, seen = subject_of("timm-vit").copy(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: seen.append(m))
    find_sites(model)
    assert not seen

"""What goes wrong with tokens is told before anything is changed, or comes out right."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import comcat
from comcat.errors import ComcatError, ModelError, PlanError, SettingsError
from comcat.forms.tokens import grid_entry, token_entry
from comcat.plan import Plan, SitePlan
from comcat.statistics.trunk import find_trunk

from ..models import pictures, tiny_vit

X = pictures(4, 4)[0]
NAME = "blocks.0:tokens"


def plan_of(model: Any, form: str = "similar", size: int = 32, **more: Any) -> Plan:
    site = find_trunk(model, torch.randn(1, 3, size, size)).sites[0]
    return Plan(sites={NAME: grid_entry(site, (1, 2)) if form == "grid" else token_entry(site, form, 6, **more)})


def changed(plan: Plan, **changes: Any) -> Plan:
    """A plan as somebody has edited its file."""
    said = json.loads(plan.to_json())
    entry = said["sites"][NAME]
    for name, value in changes.items():
        (entry if name in ("keep", "full") else entry["tokens"] if "tokens" in entry else entry["details"]["tokens"])[
            name
        ] = value
    return Plan.from_json(json.dumps(said))


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("similar", {"keep": 0}),
        ("similar", {"keep": 17}),
        ("similar", {"keep": "half"}),
        ("similar", {"prefix": -1}),
        ("similar", {"prefix": "1"}),
        ("similar", {"channels": 47}),
        ("similar", {"channels": 0}),
        ("similar", {"mask": "mask"}),
        ("similar", {"norm": "norm2"}),
        ("similar", {"stream": "tokens"}),
        ("similar", {"window": [1, 2]}),
        ("grid", {"window": [1, 0]}),
        ("grid", {"window": "1x2"}),
        ("grid", {"window": [2, 2]}),
        ("grid", {"grid": [4, 5]}),
        ("grid", {"patches": "patch_embed.conv"}),
    ],
)
def test_plans_edited_wrongly_are_refused_and_nothing_is_changed(form: str, changes: dict[str, Any]) -> None:
    model = tiny_vit()
    before, kinds, plan = model(X), [type(m) for m in model.modules()], plan_of(model, form)
    with pytest.raises(ComcatError, match=r"got|expected|says|channels|leave|no '|must not"):
        comcat.apply_(model, changed(plan, **changes))
    assert model(X).equal(before) and [type(m) for m in model.modules()] == kinds


def test_a_drop_whose_projection_becomes_thin_is_refused_and_nothing_is_changed() -> None:
    model = tiny_vit()
    before, drop = model(X), comcat.merge(model, [X], keep=0.5, how="drop")
    thin = {f"blocks.{i}.attn:qk": SitePlan(keep=8, full=16) for i in range(2)}
    for both in ({**thin, **drop.sites}, {**drop.sites, **thin}):
        with pytest.raises(PlanError, match="is not the projection that it was"):
            comcat.apply_(model, Plan(sites=both))
        assert model(X).equal(before)


@pytest.mark.parametrize("form", ["similar", "grid"])
def test_a_plan_for_another_grid_runs_the_same_share(form: str) -> None:
    """Counts are of the pictures that the plan was made for; a model for larger ones runs as large a share."""
    plan, large = plan_of(tiny_vit(), form), tiny_vit(img_size=64)
    x, seen = torch.randn(2, 3, 64, 64), []
    comcat.apply_(large, plan)
    large.get_submodule("blocks.0.mlp").register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    assert large(x).isfinite().all()
    assert seen == [1 + (24 if form == "similar" else 32)]  # of 64: 6 of 16, or pairs


def test_a_grid_that_nothing_tells_is_an_error_of_the_call() -> None:
    model = tiny_vit(dynamic_img_size=True)
    plan = plan_of(model, "grid")
    comcat.apply_(model, changed(plan, patches=None))
    assert model(X).shape == (4, 5)  # the grid that it was made for
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)  # a square
    with pytest.raises(ModelError, match=r"got 24 tokens, expected 4 × 4 or a square"):
        model(torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize("form", ["similar", "grid", "drop"])
def test_pictures_of_fewer_tokens_than_the_plan_merges(form: str) -> None:
    model = tiny_vit(dynamic_img_size=True)
    comcat.apply_(model, plan_of(model, "drop", by="random") if form == "drop" else plan_of(model, form))
    for size in ((8, 8), (8, 16), (16, 8)):  # one token, two tokens
        assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("settings", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_models_without_a_class_token_and_with_registers(settings: dict[str, Any]) -> None:
    model = tiny_vit(**settings)
    plan = comcat.merge(model, [X], keep=0.6)
    assert {e.details["tokens"]["prefix"] for e in plan.sites.values()} == {0 if "class_token" in settings else 3}
    before = model(X)
    handle = comcat.apply_(model, plan)
    one = torch.cat([model(x[None]) for x in X])  # batches of one
    torch.testing.assert_close(one, model(X), atol=1e-5, rtol=1e-5)
    assert model(X[[2, 0]]).allclose(model(X)[[2, 0]], atol=1e-5)
    assert handle.revert()(X).equal(before)


@pytest.mark.parametrize("form", ["similar", "grid"])
def test_a_plan_for_fewer_registers_is_refused(form: str) -> None:
    plan, model = plan_of(tiny_vit(), form), tiny_vit(reg_tokens=4)
    before = model(X)
    with pytest.raises(PlanError, match="1 tokens in front of the picture's, the model has 5"):
        comcat.apply_(model, plan)
    assert model(X).equal(before)
    comcat.apply_(tiny_vit(), plan)


def test_a_plan_for_fewer_registers_is_refused_by_a_config() -> None:
    import transformers as tf

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dinov2 = tf.Dinov2Model(tf.Dinov2Config(image_size=32, patch_size=8, **sizes)).eval()
    more = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(image_size=32, patch_size=8, **sizes)).eval()
    site = find_trunk(dinov2, X[:1]).sites[0]
    plan = Plan(sites={site.name: token_entry(site, "similar", 6)})
    comcat.apply_(dinov2, plan)
    with pytest.raises(PlanError, match="the model has 5"):
        comcat.apply_(more, plan)


def test_calibration_that_shows_nothing() -> None:
    for empty in ([], [torch.zeros(0, 3, 32, 32)]):
        with pytest.raises(ComcatError):
            comcat.merge(tiny_vit(), empty)
    with pytest.raises(ComcatError, match="NaN"):
        comcat.merge(tiny_vit(), [torch.full((2, 3, 32, 32), float("nan"))])
    for keep in (float("nan"), float("inf"), -1, True):
        with pytest.raises(SettingsError, match="keep"):
            comcat.merge(tiny_vit(), [X], keep=keep)


def test_pictures_of_several_sizes_in_the_calibration() -> None:
    model = tiny_vit(dynamic_img_size=True)
    batches = [X, torch.randn(2, 3, 32, 48), torch.randn(1, 3, 48, 32)]
    plan = comcat.merge(model, batches, keep=0.7, how="grid")
    comcat.apply_(model, plan)
    assert all(model(x).isfinite().all() for x in batches)

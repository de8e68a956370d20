"""Fewer hidden units, on every model of the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from comcat.apply import apply_
from comcat.errors import PlanError
from comcat.hosts import find_sites
from comcat.plan import Plan, SitePlan
from comcat.sites import Sites, part
from comcat.statistics import calibrate

from ..models import ranked
from .conftest import Subject, subject_of
from .zoo import HandAttention, HandModel, relative_error, run


def units_plan(sites: Sites, share: float) -> Plan:
    return Plan(
        sites={n: SitePlan(form="units", keep=max(1, int(share * s.full)), full=s.full) for n, s in sites.items()}
    )


def test_every_feed_forward_is_one_site_or_refused_with_the_reason(subject: Subject) -> None:
    """Each layer of an MLP that has a partner belongs to hidden units, or to a refusal that says why not."""
    told = {path for site in subject.units.values() for path in site.modules}
    reasons = {r.name.removesuffix(":units"): r.reason for r in subject.sites.refused if r.name.endswith(":units")}
    for path in subject.sites.only("linear"):
        if ".mlp." in path or "intermediate" in path:
            assert path in told or any(path.startswith(f"{holder}.") for holder in reasons), path
    assert all("norm" in reason for reason in reasons.values())


def test_all_units_change_nothing(subject: Subject) -> None:
    model = subject.copy()
    handle = apply_(model, units_plan(subject.units, 1.0), sites=subject.units)
    assert relative_error(run(model, subject.images), subject.output) < 1e-5
    handle.revert()
    assert run(model, subject.images).equal(subject.output)


def test_fewer_units_are_plain_narrower_layers(subject: Subject) -> None:
    """Nothing of ours runs there; what the units that are left compute is what they computed."""
    if not subject.units:
        pytest.skip("no feed-forward of this model can lose units")
    model = subject.copy()
    before = sum(p.numel() for p in model.parameters())
    plan = units_plan(subject.units, 0.5)
    handle = apply_(model, plan, sites=subject.units)
    saved = 0
    for name, site in subject.units.items():
        keep = plan.sites[name].keep
        for path in site.modules:
            assert type(part(model, path)) is nn.Linear
        assert part(model, site.down).in_features == keep
        saved += site.parameters() - site.parameters(keep)
    assert before - sum(p.numel() for p in model.parameters()) == saved
    output = run(model, subject.images)
    assert output.isfinite().all() and relative_error(output, subject.output) > 1e-4
    state = copy.deepcopy(model.state_dict())
    handle.revert()
    for (name, now), then in zip(model.state_dict().items(), subject.original.state_dict().values(), strict=True):
        assert now.equal(then), name
    apply_(model, plan, sites=subject.units, weights=False)
    model.load_state_dict(state)
    assert run(model, subject.images).equal(output)


@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-dinov2-swiglu", "timm-eva02", "hf-dinov3-gated", "hf-swinv2", "hand-plain"]
)
@pytest.mark.parametrize("statistic", ["activation", "loss"])
def test_units_that_are_copies_of_others_are_lost_for_nothing(name: str, statistic: str) -> None:
    """Half the units doubled, with half their column each: half of them can go, and refitting gives the model back."""
    subject = subject_of(name)
    model, images = subject.copy(), subject.case.images(256)
    with torch.no_grad():
        for site in subject.units.values():
            half = site.full // 2
            for up in site.ups:
                for rows in (up.weight(model), up.bias_or_none(model)):
                    if rows is not None:
                        rows[half : 2 * half] = rows[:half]
    before = run(model, images)
    sites = find_sites(model).only("units")
    found = calibrate(model, [images], statistic=statistic, sites=sites)
    apply_(model, units_plan(sites, 0.5), found, sites=sites)
    assert relative_error(run(model, images), before) < 0.05


def test_a_dead_unit_leaves_its_mean_in_the_bias() -> None:
    model, images = subject_of("timm-vit").copy(), subject_of("timm-vit").case.images(8)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[:48] = 0  # constant, but not zero: their bias goes through the activation
            block.mlp.fc1.bias[:48] = 1.5
    before = run(model, images)
    sites = find_sites(model).only("units")
    found = calibrate(model, [images], statistic="activation", sites=sites)
    apply_(model, units_plan(sites, 0.5), found, sites=sites)
    assert model.blocks[0].mlp.fc1.out_features == 48
    assert relative_error(run(model, images), before) < 1e-4


class Normed(nn.Module):
    """A feed-forward whose units see each other; ``kind`` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(24) if kind == "layer norm" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        if self.kind == "softmax":
            h = h.softmax(-1)
        if self.kind == "width":
            h = h.view(*h.shape[:-1], 24)
        if self.kind == "unread":
            return x
        return self.down(self.norm(h))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("layer norm", "a norm (norm) sits between"),
        ("softmax", "depend on each other"),
        ("width", "reckons with the number"),
        ("unread", "does not depend on its hidden units"),
    ],
)
def test_units_that_see_each_other_are_refused(kind: str, reason: str) -> None:
    model = HandModel(HandAttention(16, 2, 6))
    model.blocks[0].mlp = Normed(kind)
    refused = {r.name: r.reason for r in find_sites(model).refused}
    assert reason in refused["blocks.0.mlp:units"]


class Around(nn.Module):
    """Layers that fit by their sizes, with a feed-forward of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.between = nn.Sequential(nn.Linear(24, 30), nn.GELU(), nn.Linear(30, 24))
        self._modules["down"] = self._modules.pop("down")  # defined last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


def test_layers_around_others_are_no_feed_forward() -> None:
    model = HandModel(HandAttention(16, 2, 6))
    model.blocks[0].mlp = Around()
    sites = find_sites(model)
    assert "blocks.0.mlp.between:units" in sites
    assert "blocks.0.mlp:units" not in {*sites, *(r.name for r in sites.refused)}


def test_tied_layers_are_refused() -> None:
    model = HandModel(HandAttention(16, 2, 6), HandAttention(16, 2, 6))
    model.blocks[1].mlp[0] = model.blocks[0].mlp[0]
    refused = {r.name: r.reason for r in find_sites(model).refused}
    assert "shared" in refused["blocks.0.mlp:units"]


def test_units_and_ranks_of_one_feed_forward_contradict_each_other() -> None:
    subject = subject_of("timm-vit")
    sites = find_sites(subject.original)
    plan = Plan(
        sites={
            "blocks.0.mlp:units": SitePlan(form="units", keep=8, full=96),
            "blocks.0.mlp.fc1": SitePlan(keep=4, full=24),
        }
    )
    with pytest.raises(
        PlanError, match=r"blocks\.0\.mlp:units and blocks\.0\.mlp\.fc1 both change blocks\.0\.mlp\.fc1"
    ):
        apply_(subject.copy(), plan, sites=sites)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SitePlan(form="units", keep=97, full=96), "expected 1 to 96"),
        (SitePlan(form="units", keep=0, full=96), "expected 1 to 96"),
        (SitePlan(form="units", keep=8, full=95), "full number of units of 95, the model has 96"),
        (SitePlan(form="product", keep=8, full=96), "is for linear, qk, vo"),
        (SitePlan(form="unitz", keep=8, full=96), "did you mean 'units'"),
        (SitePlan(form="units", keep=8, full=96, details={"head_ranks": (1,)}), "takes no head_ranks"),
    ],
)
def test_entries_that_do_not_fit_are_told(entry: SitePlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply_(subject_of("timm-vit").copy(), Plan(sites={"blocks.0.mlp:units": entry}))


def test_sites_with_ranks_are_what_they_were() -> None:
    """Hidden units are sites beside the two layers, not instead of them."""
    sites = find_sites(subject_of("timm-vit").original)
    assert set(ranked(sites)) | {"blocks.0.mlp:units", "blocks.1.mlp:units"} == set(sites)

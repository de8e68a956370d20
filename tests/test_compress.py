"""The whole way in Python: copies, budgets, drops, sequential calibration, bad input."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.errors import BudgetError, DataError, ModelError, NumericsError, PlanError, SettingsError
from comcat.measure import count_macs, count_parameters, evaluate
from comcat.methods.compress import CompressSettings, compress_

from .models import pictures, shake, tiny_vit


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


def test_the_model_is_untouched_and_the_copy_is_smaller(model):
    before = copy.deepcopy(model.state_dict())
    small = comcat.compress(model, calibration=pictures(), reduce=0.5)
    assert count_parameters(small) <= 0.5 * count_parameters(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert small(pictures()[0]).shape == (4, 5)
    assert small.comcat_record.plan.made_by["saved"] >= 0.5


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        lambda x: {"pixel_values": x},
        lambda x: {"image": x, "label": [0] * len(x)},
        lambda x: (x, None, ["a"] * len(x)),
    ],
)
def test_any_iterable_of_batches_calibrates(model, batch):
    reference = comcat.compress(model, calibration=pictures(), reduce=0.4)
    small = comcat.compress(model, calibration=(batch(x) for x in pictures()), reduce=0.4)
    assert torch.equal(small(pictures()[0]), reference(pictures()[0]))


@pytest.mark.parametrize("batch", [{"photo": torch.zeros(2, 3, 32, 32)}, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])
def test_batches_that_hold_no_pictures_are_refused(model, batch):
    """8-bit pictures were taken as they are, 0 to 255, without a word."""
    with pytest.raises(DataError, match=r"calibration batch: got .*expected pictures"):
        comcat.compress(model, calibration=[batch], reduce=0.4)


def test_macs_budget_saves_macs(model):
    small = comcat.compress(model, calibration=pictures(), reduce=0.3, budget="macs")
    x = pictures()[0]
    assert count_macs(small, x) <= 0.7 * count_macs(model, x) * 1.001


def test_better_statistics_keep_more(model):
    """On the pictures' own distribution: loss-aware beats weights in divergence from the model before."""
    loader = pictures(48, 16)
    held = pictures(48, 16, seed=1)

    def divergence(**settings) -> float:
        small = comcat.compress(model, calibration=loader, reduce=0.55, **settings)
        return evaluate(small, held, against=model).divergence

    assert divergence(statistic="loss") < divergence(statistic="weights", ranks="uniform")


def test_sequential_calibration_compresses_to_the_same_size(model):
    one = comcat.compress(model, calibration=pictures(), reduce=0.5)
    other = comcat.compress(model, calibration=pictures(), reduce=0.5, sequential=True)
    assert count_parameters(one) == count_parameters(other)
    assert not torch.equal(one(pictures()[0]), other(pictures()[0]))


def test_max_drop_stays_within_it_on_the_held_out_pictures(model):
    held = pictures(64, 32, seed=2)
    small = comcat.compress(model, calibration=pictures(), held_out=held, max_drop=10.0)
    assert 100 - evaluate(small, held, against=model).agreement <= 10.0
    assert count_parameters(small) < count_parameters(model)
    with pytest.raises(SettingsError, match="held_out"):
        comcat.compress(model, calibration=pictures(), max_drop=1.0)


def test_max_drop_with_labels_is_about_top1(model):
    held = [(x, model(x).argmax(-1)) for x in pictures(64, 32, seed=2)]
    small = comcat.compress(model, calibration=pictures(), held_out=held, max_drop=10.0)
    assert evaluate(small, held).top1 >= 90.0


def test_only_some_sites(model):
    small = comcat.compress(model, calibration=pictures(), reduce=0.1, only=("qk", "vo"))
    assert all(n.endswith((":qk", ":vo")) for n in small.comcat_record.plan.sites)
    with pytest.raises(SettingsError, match="did you mean"):
        comcat.compress(model, calibration=pictures(), reduce=0.1, only=("blocks.0.atn",))


def test_step_by_step_and_back(model):
    x = pictures()[0]
    before = model(x)
    sites = comcat.find_sites(model)
    statistics = comcat.calibrate(model, pictures(), statistic="activation", sites=sites)
    plan = comcat.allocate(model, statistics, reduce=0.5)
    handle = comcat.apply_(model, plan, statistics)
    assert not torch.equal(model(x), before)
    handle.revert()
    handle.revert()
    assert torch.equal(model(x), before)


def test_a_backbone_without_classifier(model):
    backbone = tiny_vit(num_classes=0)
    small = comcat.compress(backbone, calibration=pictures(), reduce=0.4)
    result = evaluate(small, pictures(), against=backbone)
    assert result.top1 is None and result.agreement is None and result.cosine > 0.8


def test_one_picture_is_enough_to_calibrate(model):
    small = comcat.compress(model, calibration=[torch.randn(1, 3, 32, 32)], reduce=0.5)
    assert torch.isfinite(small(pictures()[0])).all()


def test_a_constant_picture_makes_singular_grams_and_finite_weights(model):
    small = comcat.compress(model, calibration=[torch.zeros(4, 3, 32, 32)], reduce=0.5)
    assert torch.isfinite(small(pictures()[0])).all()


def test_no_pictures(model):
    for nothing in ([], [torch.zeros(0, 3, 32, 32)]):
        with pytest.raises(DataError):
            comcat.compress(model, calibration=nothing, reduce=0.5)
    with pytest.raises(SettingsError, match="needs calibration"):
        comcat.compress(model, reduce=0.5)
    assert count_parameters(comcat.compress(model, reduce=0.5, statistic="weights")) < count_parameters(model)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.qkv.weight",
        "blocks.0.mlp.fc2.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc2.bias",
        "norm.weight",
        "pos_embed",
    ],
)
def test_nan_weights_are_named(model, name):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter(name).view(-1)[0] = float("nan")
    for how in ({"calibration": pictures()}, {"statistic": "weights"}):
        with pytest.raises(NumericsError, match=f"^{re.escape(name)} holds NaN"):
            comcat.compress(broken, reduce=0.5, **how)


def test_nan_pictures_are_told(model):
    with pytest.raises(NumericsError):
        comcat.compress(model, calibration=[torch.full((2, 3, 32, 32), float("nan"))], reduce=0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"reduce": 0.5, "max_drop": 1.0},
        {"reduce": 1.5},
        {"reduce": -0.1},
        {"max_drop": 0.0},
        {"reduce": 0.5, "statistic": "los"},
        {"reduce": 0.5, "pictures": 0},
        {"redce": 0.5},
        {"reduce": 0.5, "budget": "mac"},
        {"reduce": 0.5, "multiple": 0},
    ],
)
def test_absurd_settings(model, bad):
    with pytest.raises(SettingsError):
        comcat.compress(model, calibration=pictures(), **bad)


def test_a_budget_out_of_reach_says_what_is_possible(model):
    with pytest.raises(BudgetError, match="at most"):
        comcat.compress(model, calibration=pictures(), reduce=0.98)


def test_plans_that_do_not_fit_name_the_first_site(model):
    plan = comcat.allocate(model, reduce=0.5)
    other = tiny_vit(embed_dim=96, num_heads=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match=r"blocks\.0\.attn:qk|blocks\.0"):
        comcat.apply_(other, plan)
    shallow = tiny_vit(depth=1)
    with pytest.raises(PlanError, match=r"blocks\.1"):
        comcat.apply_(shallow, plan)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_ranks_above_full_are_refused(model):
    plan = comcat.Plan(sites={"blocks.0.attn:qk": comcat.SitePlan(keep=17, full=16)})
    with pytest.raises(PlanError, match="got rank 17, expected 1 to 16"):
        comcat.apply_(model, plan)


def test_a_bad_plan_file_is_told(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no plan at"):
        comcat.Plan.load(path)
    for text, said in (
        ("{", "line 1"),
        ("[]", "not a plan"),
        ('{"comcat_plan": 9, "sites": {}}', "version 9"),
        ('{"comcat_plan": 1, "sites": {"a": {"rank": 1}}}', "'full_rank'"),
        ('{"comcat_plan": 1, "sites": {"a": {"rank": "1", "full_rank": 2}}}', "whole numbers"),
        ('{"comcat_plan": 1, "sites": {"a": {"rank": 1, "full_rank": 2, "head_ranks": 5}}}', "list of whole numbers"),
        (
            '{"comcat_plan": 1, "sites": {"a": {"rank": 1, "full_rank": 2, "head_ranks": ["a"]}}}',
            "list of whole numbers",
        ),
        ('{"comcat_plan": 1, "sites": {}, "made_by": 3}', "made_by 3"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=said):
            comcat.Plan.load(path)


def test_compressing_twice_is_refused_by_name(model):
    small = comcat.compress(model, reduce=0.5, statistic="weights", forms="ranks")
    refused = comcat.find_sites(small).refused
    assert any("already compressed" in r.reason for r in refused)
    with pytest.raises(ModelError, match=r"compressed already.*begin from the original"):
        comcat.compress(small, reduce=0.2, statistic="weights")


def test_a_plan_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        comcat.Plan.load(tmp_path / "plan.json")


def test_ranks_are_as_round_as_they_may_be_without_costing_more(model):
    """The default multiple: no finer than it must be, and within a tenth of the finest plan's predicted loss."""
    plan = comcat.compress(model, calibration=pictures(), reduce=0.4).comcat_record.plan
    fine = comcat.compress(model, calibration=pictures(), reduce=0.4, multiple=1).comcat_record.plan
    assert plan.made_by["error"] <= 1.1 * fine.made_by["error"] + 1e-3
    assert plan.made_by["multiple"] in (1, 2, 4, 8, 16)
    rounder = 2 * plan.made_by["multiple"]
    if rounder <= 16:
        try:
            coarse = comcat.compress(model, calibration=pictures(), reduce=0.4, multiple=rounder).comcat_record.plan
        except BudgetError:
            return
        assert coarse.made_by["error"] > 1.1 * fine.made_by["error"] + 1e-3


def test_per_head_says_what_padding_costs(model):
    small = comcat.compress(model, calibration=pictures(), reduce=0.5, per_head=True, multiple=1)
    made_by = small.comcat_record.plan.made_by
    assert made_by["saved_with_padding"] == pytest.approx(
        1 - count_parameters(small) / count_parameters(model), abs=1e-9
    )
    assert made_by["saved_with_padding"] <= made_by["saved"]


@pytest.mark.parametrize("kind", ["qk", "vo"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_one_product_of_the_two_alone(kind, library):
    if library == "timm":
        model = tiny_vit()
    else:
        import transformers

        config = transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
        model = transformers.ViTForImageClassification(config).eval()
        shake(model)
    small = comcat.compress(model, calibration=pictures(), reduce=0.1, only=(kind,))
    assert all(n.endswith(f":{kind}") for n in small.comcat_record.plan.sites)
    assert count_parameters(small) <= 0.9 * count_parameters(model)
    assert evaluate(small, pictures(), against=model).cosine > 0.9


def test_an_iterator_of_batches_serves_sequential_calibration_too(model):
    listed = comcat.compress(model, calibration=pictures(), reduce=0.5, sequential=True)
    small = comcat.compress(model, calibration=iter(pictures()), reduce=0.5, sequential=True)
    assert torch.equal(small(pictures()[0]), listed(pictures()[0]))


def test_attention_over_a_grid_of_tokens():
    """MaxViT's, (batch, height, width, channels)."""
    from timm.models.maxxvit import AttentionCl

    net = torch.nn.Sequential(AttentionCl(64, dim_head=16, head_first=False)).eval()
    shake(net)
    grid = torch.randn(2, 3, 5, 64)
    sites = comcat.find_sites(net)
    assert {s.kind for s in sites.values()} >= {"qk", "vo"}
    plan = {n: comcat.SitePlan(keep=s.full_rank, full=s.full_rank) for n, s in sites.items() if s.kind in ("qk", "vo")}
    with torch.no_grad():
        before = net(grid)
        comcat.apply_(net, comcat.Plan(sites=plan))
        torch.testing.assert_close(net(grid), before, atol=1e-5, rtol=1e-5)


class Convolved(torch.nn.Module):
    """Attention over maps (batch, channels, height, width)."""

    def __init__(self, kernel: int):
        super().__init__()
        self.num_heads, self.proj = 2, torch.nn.Conv2d(8, 8, 1)
        self.qkv = torch.nn.Conv2d(8, 24, kernel, padding=kernel // 2)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, 4)).mT.unbind(1)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(o.mT.flatten(1, 2).unflatten(-1, x.shape[-2:]))


def test_attention_of_convolutions_over_single_points_shrinks_by_all_statistics():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), Convolved(1), torch.nn.Flatten(), torch.nn.Linear(128, 5))
    shake(net.eval())
    for statistic in ("weights", "activation", "loss"):
        small = comcat.compress(net, pictures(), reduce=0.06, statistic=statistic, forms="ranks")
        assert {"1:qk", "1:vo"} & set(small.comcat_record.plan.sites)
        with torch.no_grad():
            assert small(pictures()[0]).shape == net(pictures()[0]).shape


def test_attention_of_larger_convolutions_is_refused_with_its_path():
    class ConvolvedAttention(Convolved):
        pass

    net = torch.nn.ModuleDict({"stage": torch.nn.Sequential(ConvolvedAttention(3)), "head": torch.nn.Linear(64, 64)})
    sites = comcat.find_sites(net)
    assert list(sites) == ["stage.0.proj", "head"]
    assert [(r.name, r.reason) for r in sites.refused] == [
        ("stage.0", "attention of no known shape: ConvolvedAttention")
    ]


def test_a_plan_that_saves_more_than_was_asked_says_so(model):
    def notes(**settings):
        done = compress_(copy.deepcopy(model), pictures(), CompressSettings(statistic="weights", **settings))
        assert "saved" in done.plan.made_by
        return done.plan.made_by["saved"], [n for n in done.notes if "steps are coarse" in n]

    saved, said = notes(reduce=0.1, ranks="equal", forms="ranks", multiple=8)
    assert saved > 0.13 and said == [
        f"Asked to save 10 %, the plan saves {100 * saved:.1f} %: its steps are coarse with ranks 'equal'; "
        "multiple=1 or ranks='waterfill' comes nearer."
    ]
    assert notes(reduce=0.3, multiple=1)[1] == []


@pytest.mark.parametrize(("statistic", "weak"), [("weights", True), ("activation", False)])
def test_a_statistic_that_sees_no_pictures_is_called_weak(model, statistic, weak):
    """Ranks read off the weights alone were shown as if they said what is lost."""
    done = compress_(copy.deepcopy(model), pictures(), CompressSettings(reduce=0.3, statistic=statistic))
    assert any("by the weights alone, a weak guide" in note for note in done.notes) == weak


class Towers(nn.Module):
    """Two towers, of which the first alone sees what comes in."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.seeing, self.reading, self.reads = tiny_vit(), tiny_vit(), reads

    def forward(self, x: Tensor) -> Tensor:
        return self.seeing(x) if self.reads else x.flatten(1)[:, :5]


def test_a_tower_that_no_calibration_input_reached_is_named():
    model = Towers().eval()
    with pytest.warns(UserWarning, match=r"No calibration input reached reading\.blocks \(10 sites\): they stay"):
        small = comcat.compress(model, pictures(), reduce=0.2)
    assert {name.split(".")[0] for name in small.comcat_record.plan.sites} == {"seeing"}
    done = compress_(Towers().eval(), pictures(), CompressSettings(reduce=0.2))
    assert any("reached reading.blocks (10 sites)" in note for note in done.notes)
    with pytest.raises(ModelError, match=r"No calibration input reached seeing\.blocks .* give inputs that reach"):
        comcat.compress(Towers(reads=False), pictures(), reduce=0.2)

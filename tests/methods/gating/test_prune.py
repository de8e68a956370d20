"""Pruning by gates from end to end: what comes out, that it is what the gates computed, and going on after a kill."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.data import Pictures, Preprocess, open_pictures
from comcat.errors import BudgetError, ModelError, SettingsError, StoreError
from comcat.measure import count_macs, count_parameters
from comcat.methods.gating import PruneSettings, prune_, run
from comcat.methods.gating.training import GatedTraining
from comcat.runs.watching import LossWatch
from tests.parallel import in_processes
from tests.tuning.material import folder, model

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.3,) * 3)
FAST = {"steps": 10, "batch_size": 8, "pictures": 16, "choices": 3, "lr": 1e-3, "gate_lr": 1e-2, "log_every": 5}
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    return open_pictures(folder(tmp_path_factory.mktemp("pictures"), 40))


def pruned(pictures, net: nn.Module | None = None, **settings) -> nn.Module:
    net = model() if net is None else net
    return comcat.prune(net, pictures, preprocess=PREPROCESS, **{**FAST, **settings})  # type: ignore[arg-type]


@torch.no_grad()
def said(net: nn.Module) -> Tensor:
    return net.eval()(IMAGES)


@pytest.mark.parametrize(
    "settings",
    [
        {"reduce": 0.4},
        {"reduce": 0.4, "start": "blind"},
        {"reduce": 0.4, "budget": "macs", "ramp": 0.5},
        {"reduce": 0.3, "budget": "macs", "start": "blind", "tie": False, "multiple": 2},
        {"reduce": 0.3, "statistic": "activation", "ema": 0.5, "accumulate": 2},
        {"reduce": 0.2, "statistic": "weights", "sites": ("units", "blocks.0"), "drop_path": 0.1},
        {"reduce": 0.3, "distillation": "none", "precision": "bf16"},
    ],
    ids=["closed", "blind", "macs", "macs-blind", "activation", "some", "labels"],
)
def test_an_ordinary_plan_within_the_budget(pictures, tmp_path, settings) -> None:
    net = model()
    before = {n: p.clone() for n, p in net.named_parameters()}
    small = pruned(pictures, net, **settings)
    assert all(p.equal(before[n]) for n, p in net.named_parameters()), "the model given was changed"
    plan = small.comcat_record.plan
    cost = (lambda m: count_macs(m, IMAGES[:1])) if settings.get("budget") == "macs" else count_parameters
    padding = 0.02 if settings.get("tie") is False else 0  # of the narrower of QK and VO, which no plan counts
    assert 1 - cost(small) / cost(net) == pytest.approx(plan.made_by["saved"], abs=1e-9 + padding)
    assert plan.made_by["saved"] >= settings["reduce"] and plan.made_by["rule"] == "gates"
    assert {e.form for e in plan.sites.values()} <= {"product", "units"}
    assert all(e.head_ranks is None for e in plan.sites.values()), "all heads of a layer keep equally many"
    choices = plan.made_by["gates"]["choices"]
    assert [c["step"] for c in choices] == [0, 1, 2] and choices[-1]["saves"] == plan.made_by["saved"]
    if "multiple" in settings:
        assert all(e.keep % 2 == 0 or e.keep == e.full for e in plan.sites.values())
    if "sites" in settings:
        assert not any("blocks.1.attn" in name for name in plan.sites)
    json.dumps(plan.to_dict())
    comcat.save(small, tmp_path / "small")
    assert said(comcat.load(tmp_path / "small")).equal(said(small))
    tuning = small.comcat_record.results.tuning
    assert tuning["steps"] == 10 and tuning["settings"]["reduce"] == settings["reduce"] and len(tuning["curve"]) == 2


@pytest.mark.parametrize("start", ["closed", "blind"])
@pytest.mark.parametrize("changed", [{}, {"ema": 0.5}], ids=["last", "ema"])
def test_what_is_cut_computes_what_the_gates_computed(pictures, monkeypatch, start, changed) -> None:
    """At the end all marked gates are exactly shut, and nothing changes when gates fold and channels go."""
    seen: dict = {}
    cut = run._cut

    def watched(net: nn.Module, training: GatedTraining, teacher: str | None):
        seen["gates"] = {n: g.opening.detach().clone() for n, g in training.gates.items()}
        seen["marks"] = {n: training.marks.mask(n) for n in training.gates}
        seen["said"] = said(training.learner.judged)
        return cut(net, training, teacher)

    monkeypatch.setattr(run, "_cut", watched)
    small = pruned(pictures, reduce=0.4, start=start, **changed)
    assert torch.allclose(said(small), seen["said"], rtol=1e-4, atol=1e-5)
    for name, opening in seen["gates"].items():
        assert opening[seen["marks"][name]].eq(0).all() and opening[~seen["marks"][name]].ne(0).all()
        assert not opening.eq(1).all() or not opening.numel(), "open gates learn"


@pytest.mark.parametrize(
    ("sites", "refit"),
    [(("qk", "vo"), False), (("units",), True), (("units",), False)],
    ids=["heads", "units", "units-plain"],
)
def test_without_learning_the_closed_form_comes_out(pictures, sites, refit) -> None:
    """Marks that stand at the start, gates that close, weights that learn nothing: what is left is the refit.

    (Heads are refitted too, but their covariance is shrunk in another basis, so that is the same for many pictures.)
    """
    still = {"lr": 0.0, "min_lr": 0.0, "gate_lr": 0.0, "choices": 1, "weight_decay": 0.0, "take_over": refit}
    net, asked = model(), {"reduce": 0.15, "statistic": "activation"}
    small = pruned(pictures, net, sites=sites, **asked, **still)
    loader = list(comcat.batches(pictures.take(16, 0), PREPROCESS, batch_size=8))
    closed = comcat.compress(
        net,
        loader,
        only=sites,
        multiple=1,
        joint_refit=refit,
        **asked,  # type: ignore[arg-type]
    )
    assert small.comcat_record.plan.sites == closed.comcat_record.plan.sites  # type: ignore[union-attr]
    moved = (said(closed) - said(net)).norm()
    apart = (said(small) - said(closed)).norm() / moved
    assert apart > 0.1 if sites == ("units",) and not refit else apart < 1e-3, float(apart)


def test_a_marked_channel_comes_back(pictures, monkeypatch) -> None:
    """What was marked first is worth most the second time: its gates are let go, learn again, and stay."""
    steps: list[dict[str, Tensor]] = []
    original = GatedTraining.update

    def scored(self: GatedTraining, number: int) -> dict[str, Tensor]:
        marked = {n: self.marks.mask(n).double() for n in self.gates}
        if number == 0:
            return {n: torch.arange(m.numel()).view_as(m).double() + 1 for n, m in marked.items()}
        return {n: 1 + 1000 * m for n, m in marked.items()}

    def noted(self: GatedTraining, number: int) -> None:
        original(self, number)
        steps.append({n: g.opening.detach().clone() for n, g in self.gates.items()})

    monkeypatch.setattr(GatedTraining, "_scores", scored)
    monkeypatch.setattr(GatedTraining, "update", noted)
    small = pruned(pictures, reduce=0.2, start="blind", choices=2, settle=0.4, closing=0.6, sites=("units",))
    first, second = small.comcat_record.plan.made_by["gates"]["choices"]
    assert first["returned"] == 0 and second["returned"] > 0
    name = "blocks.0.mlp:units"
    back = (steps[1][name] < 0.9) & (steps[-1][name] > 0)
    assert back.any(), "some were being closed and are open in the end"
    assert (steps[-1][name] != steps[2][name])[back].all(), "and learn again"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("start", ["closed", "blind"])
def test_a_killed_run_goes_on_bit_for_bit(pictures, tmp_path, monkeypatch, start) -> None:
    asked = {"reduce": 0.4, "start": start, "checkpoint_every": 1, "settle": 0.6, "ema": 0.9}
    undisturbed = pruned(pictures, **asked)
    original = GatedTraining.update
    for kill in (1, 5, 9):

        def dies(self: GatedTraining, number, kill=kill):
            if number == kill:
                raise Killed
            original(self, number)

        monkeypatch.setattr(GatedTraining, "update", dies)
        with pytest.raises(Killed):
            pruned(pictures, out=tmp_path, **asked)
    monkeypatch.setattr(GatedTraining, "update", original)
    for _ in range(2):  # a finished run is read back
        again = pruned(pictures, out=tmp_path, **asked)
        assert again.comcat_record.plan.to_json() == undisturbed.comcat_record.plan.to_json()
        assert all(p.equal(again.state_dict()[n]) for n, p in undisturbed.state_dict().items())
    with pytest.raises(StoreError, match=r"reduce was 0.4, now 0.3.*--restart"):
        pruned(pictures, out=tmp_path, **{**asked, "reduce": 0.3})


def test_bad_input_is_told_before_the_work(pictures, monkeypatch) -> None:
    monkeypatch.setattr(GatedTraining, "step", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr(run, "begin_closed", lambda *_, **__: pytest.fail("calibration began"))
    with pytest.raises(BudgetError, match="at most 0"):
        pruned(pictures, reduce=0.99)
    with pytest.raises(SettingsError, match="unknown setting 'reduse'; did you mean 'reduce'"):
        pruned(pictures, reduse=0.5)
    with pytest.raises(SettingsError, match="got 1 step, expected at least 2"):
        pruned(pictures, steps=1)
    with pytest.raises(ModelError, match="compressed already"):
        pruned(pictures, comcat.compress(model(), statistic="weights", reduce=0.2))
    with pytest.raises(SettingsError, match="no classes"):
        pruned(pictures, model(num_classes=0))
    with pytest.raises(SettingsError, match="expected the same ones"):
        comcat.prune(model(), pictures, preprocess=PREPROCESS, teacher=model(num_classes=3), **FAST)  # type: ignore[arg-type]


def test_a_model_without_classes_learns_its_own_features(pictures) -> None:
    small = pruned(pictures, model(num_classes=0), reduce=0.3, features=("all",))
    assert small.comcat_record.plan.made_by["saved"] >= 0.3


def test_labels_are_not_needed(tmp_path) -> None:
    from tests.tuning.material import picture

    for i in range(16):
        picture(i % 4, i).save(tmp_path / f"{i}.png")
    assert pruned(open_pictures(tmp_path), reduce=0.3).comcat_record.plan.made_by["saved"] >= 0.3


def test_open_gates_follow_the_task_and_marked_ones_do_not(pictures) -> None:
    """The first step, in detail: marked gates move by the pull alone, others by at most the learning rate."""
    from comcat.methods.gating.run import check_pruning
    from comcat.runs.processes import Processes

    settings = PruneSettings(reduce=0.4, start="blind", warmup=0.0, **FAST)  # type: ignore[arg-type]
    net = model()
    setup, ground = check_pruning(net, pictures, settings, Processes(cpu=True), teacher=net, preprocess=PREPROCESS)
    gates = run.gate_(setup.model, ground.sites)
    training = GatedTraining(setup, settings, ground, gates, None)
    with training.ready():
        training.step(0, LossWatch())
    for name, gate in gates.items():
        marked, moved = training.marks.mask(name), gate.opening.detach() - 1
        assert torch.allclose(moved[marked], torch.tensor(-1 / training.schedule.closing))
        assert moved[~marked].abs().max() <= 1.001e-2
        assert gate.opening.grad is None
    assert sum(int((g.opening[~training.marks.mask(n)] != 1).sum()) for n, g in gates.items()) > 10


# ---------------------------------------------------------------- several processes


def _in_one(place: str) -> tuple:
    small = pruned(open_pictures(place), reduce=0.4)
    return small.comcat_record.plan.to_dict(), said(small).tolist()


def test_two_processes_prune_as_one(tmp_path) -> None:
    place = folder(tmp_path, 24)
    plan, output = _in_one(place)
    two = in_processes(2, _in_one, place)
    assert two[0] == two[1]
    assert two[0][0]["sites"] == plan["sites"]
    assert torch.allclose(torch.tensor(two[0][1]), torch.tensor(output), atol=1e-3)


def test_a_copy_of_the_result_is_whole(pictures) -> None:
    small = pruned(pictures, reduce=0.3)
    assert said(copy.deepcopy(small)).equal(said(small))
    prunable = prune_(
        model(),
        pictures,
        PruneSettings(reduce=0.3, **FAST),
        preprocess=PREPROCESS,  # type: ignore[arg-type]
    )
    assert prunable.done.handle.revert() is prunable.model, "there is no way back: the weights were trained"

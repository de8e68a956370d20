"""The search of ranks: its loss, its rounds, its budget, what it never sees, and going on after a kill."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch

from comcat.apply import apply_
from comcat.data import Pictures, Preprocess, open_pictures
from comcat.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError, StoreError
from comcat.measure import count_parameters
from comcat.methods.search import SearchOptions, SearchSettings, search, search_
from comcat.methods.search.run import Search
from comcat.methods.search.schedule import Schedule
from comcat.plan import Plan
from comcat.runs.seeding import derive_seed
from comcat.runs.watching import LossWatch
from tests.models import tiny_vit
from tests.parallel import in_processes
from tests.tuning.material import rows

PREPROCESS = Preprocess(size=(32, 32), mean=(0.3,), std=(0.4,))
FAST = {"rounds": 2, "rank_steps": 3, "weight_steps": 2, "batch_size": 8, "pictures": 16, "statistic": "activation"}


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return open_pictures("digits:train").take(60, 0)


def model_of_digits():
    return tiny_vit(num_classes=10)


def run(pictures: Pictures, **settings):
    return search(model_of_digits(), pictures, preprocess=PREPROCESS, **{**FAST, **settings})


def start(pictures: Pictures, **settings) -> Search:
    """A search that has prepared all and not yet made a step."""
    made = Search(model_of_digits(), pictures, SearchSettings(**{**FAST, **settings}), PREPROCESS)
    made.prepare()
    made.begin()
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"reduce": 0.5},
        {"reduce": 0.7, "start": "blind", "grid": "even", "penalty": "above"},
        {"reduce": 0.4, "budget": "macs", "weight_steps": 0},
        {"reduce": 0.5, "grid": "paper", "statistic": "weights", "start": "blind"},
        {"reduce": 0.4, "multiple": 4},
    ],
    ids=["default", "blind", "macs", "paper", "multiple"],
)
def test_the_plan_meets_the_budget(pictures: Pictures, settings: dict) -> None:
    model = model_of_digits()
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = search(model, pictures, preprocess=PREPROCESS, **{**FAST, **settings})
    assert all(p.equal(before[n]) for n, p in model.named_parameters()), "the model given was changed"
    assert plan.made_by["saved"] >= settings["reduce"] - 1e-9
    if settings.get("budget") != "macs":
        dense = count_parameters(model)
        apply_(model, plan)
        assert 1 - count_parameters(model) / dense == pytest.approx(plan.made_by["saved"], abs=1e-9)
    if "multiple" in settings:
        assert all(e.keep % 4 == 0 or e.keep == e.full for e in plan.sites.values())
    json.dumps(plan.to_dict())


def test_the_curve_says_what_happened(pictures: Pictures) -> None:
    curve = run(pictures).made_by["search"]["curve"]
    assert [p["step"] for p in curve] == list(range(1, 9))
    assert [p["round"] for p in curve] == [0] * 5 + [1] * 3
    assert [("top1" in p) for p in curve] == [False, False, True, False, False, False, False, True]
    assert all(0 < p["cost"] < 1 for p in curve)


def test_eq_6(pictures: Pictures) -> None:
    """The loss is cross-entropy times (expected cost / ε)^β, its gradient what autograd finds for that product."""
    made = start(pictures, beta=1.5, start="blind", penalty="always")
    mixture, objective = made.mixture, made.objective
    batch, count = made.feeds["ranks"].batch(0)
    p = mixture.probabilities()
    dense = count_parameters(model_of_digits())
    cost = dense - sum(s.parameters() for s in made.space.sites.values())
    for name, site in made.space.sites.items():
        for probability, rank in zip(p[name], made.space.candidates[name].ranks, strict=True):
            kept = rank < site.full_rank or site.parameters(rank) < site.parameters()
            cost = cost + probability * site.parameters(rank if kept else None)
    assert made.space.expected_cost(p).item() == pytest.approx(cost.item(), rel=1e-5)
    fixed = dense - sum(s.parameters() for s in made.space.sites.values())
    over = (cost.item() - fixed) / (0.5 * dense - fixed)
    assert fixed > 0 and objective.penalty(cost).item() == pytest.approx(over**1.5, rel=1e-5)
    seen: dict[str, torch.Tensor] = {}
    mixture.rank_optimizer.step = lambda: seen.update({n: q.grad.clone() for n, q in mixture.relaxation.logits()})  # type: ignore[method-assign]
    made.step(0, LossWatch())
    noise = torch.Generator().manual_seed(derive_seed(0, "gumbel", 0))
    mixture.relaxation.sample(made.schedule.temperature(0), noise)
    penalty = objective.penalty(made.space.expected_cost(mixture.probabilities()))
    whole = objective.cross_entropy(made.model, batch, count) * penalty
    assert made.curve[0]["loss"] == pytest.approx(whole.item(), rel=1e-5)
    for name, q in mixture.relaxation.logits():
        (expected,) = torch.autograd.grad(whole, q, retain_graph=True)
        assert torch.allclose(seen[name], expected, rtol=1e-3, atol=1e-7), name


def test_the_cost_weighs_above_the_budget_alone_by_default(pictures: Pictures) -> None:
    made = start(pictures, beta=2.0, penalised="model")
    assert made.objective.penalty(torch.tensor(0.5 * made.space.goal)).item() == 1.0
    assert made.objective.penalty(torch.tensor(2.0 * made.space.goal)).item() == pytest.approx(4.0)
    always = start(pictures, penalty="always", beta=2.0, penalised="model")
    assert always.objective.penalty(torch.tensor(0.5 * made.space.goal)).item() == pytest.approx(0.25)


def test_beta_is_not_weakened_by_what_cannot_shrink(pictures: Pictures) -> None:
    """Half as much again as the sites may cost weighs 1.5^β, however large the rest of the model is."""
    for penalised, expected in (("sites", 1.5**2), ("model", None)):
        made = start(pictures, beta=2.0, penalised=penalised, penalty="always")
        fixed, goal = made.space.fixed, made.space.goal
        cost = fixed + 1.5 * (goal - fixed)
        expected = (cost / goal) ** 2 if expected is None else expected
        assert made.objective.penalty(torch.tensor(cost)).item() == pytest.approx(expected, rel=1e-5)


def test_the_papers_grid_can_settle_on_a_rank_that_saves_nothing(pictures: Pictures) -> None:
    """Its 320 of 384 stays at low rank, as in its code, and the plan says so."""
    model = model_of_digits()
    made = Search(
        model, pictures, SearchSettings(**{**FAST, "reduce": 0.3, "candidates": (8, 45), "forms": "ranks"}), PREPROCESS
    )
    made.prepare()
    layers = [n for n, site in made.space.sites.items() if site.kind == "linear" and site.full_rank == 48]
    choice = {n: len(c.ranks) - 1 if n == layers[0] else 0 for n, c in made.space.candidates.items()}
    entries = made.space.entries(choice)
    assert entries[layers[0]].keep == 45 and made.space.cost(choice) > 0
    apply_(model, Plan(sites=entries))
    assert count_parameters(model) == made.space.cost(choice)


def test_an_impossible_budget_names_the_setting_that_makes_it_possible(pictures: Pictures) -> None:
    """Blind and in even steps the message's own proposal works."""
    settings: dict = {"start": "blind", "grid": "even", "grid_size": 3, "reduce": 0.7}
    with pytest.raises(BudgetError, match=r"as grid='even' with grid_size=\d+ has$") as refused:
        start(pictures, **settings)
    size = int(str(refused.value).rpartition("grid_size=")[2].split()[0])
    assert start(pictures, **{**settings, "grid_size": size}).space
    with pytest.raises(BudgetError, match=f"grid_size={size} has"):
        start(pictures, **{**settings, "grid_size": size - 1})
    with pytest.raises(BudgetError, match=r"no grid has smaller ones"):
        start(pictures, **{**settings, "reduce": 0.99})


def test_weight_decay_of_the_probabilities_is_heeded(pictures: Pictures) -> None:
    """AdamW takes lr · decay of every α away before its step, which is the same for both at the first."""
    moved = []
    for decay in (0.0, 2.0):
        made = start(pictures, rank_weight_decay=decay, rank_lr=0.1)
        before = {n: p.detach().clone() for n, p in made.mixture.relaxation.logits()}
        made.step(0, LossWatch())
        moved.append({n: p.detach() - before[n] for n, p in made.mixture.relaxation.logits()})
    for name, start_ in before.items():
        assert torch.allclose(moved[0][name] - moved[1][name], 0.2 * start_, atol=1e-5), name


def test_probabilities_and_weights_learn_from_different_pictures(pictures: Pictures) -> None:
    made = start(pictures)
    ranks, weights = ({s.key for s in made.parts[phase]} for phase in ("ranks", "weights"))
    assert ranks and weights and not ranks & weights and len(ranks | weights) == 60
    for phase, part in made.parts.items():
        shown = [image for number in range(2) for image in made.feeds[phase].batch(number)[0].images]
        own = [PREPROCESS(s.image) for s in part]
        assert all(any(image.equal(o) for o in own) for image in shown)


def test_phases_move_what_they_should(pictures: Pictures) -> None:
    made = start(pictures)

    def state() -> tuple[dict, dict]:
        return (
            {n: p.detach().clone() for n, p in made.mixture.relaxation.logits()},
            {n: p.detach().clone() for n, p in made.mixture.relaxation.weights()},
        )

    alphas, weights = state()
    made.step(0, LossWatch())
    moved_alphas, same_weights = state()
    assert all(not moved_alphas[n].equal(alphas[n]) for n in alphas)
    assert all(same_weights[n].equal(weights[n]) for n in weights)
    assert made.schedule.at(3) == (0, "weights", 0)
    made.step(3, LossWatch())
    same_alphas, moved_weights = state()
    assert all(same_alphas[n].equal(moved_alphas[n]) for n in alphas)
    assert sum(not moved_weights[n].equal(weights[n]) for n in weights) > 0.9 * len(weights)


def test_the_schedule_counts_what_each_phase_has_seen() -> None:
    schedule = Schedule(SearchOptions(rounds=2, rank_steps=3, weight_steps=2))
    assert schedule.steps == 8
    moments = [schedule.at(step) for step in range(8)]
    assert [m.phase[0] for m in moments] == list("rrrwwrrr") and [m.round for m in moments] == [0] * 5 + [1] * 3
    assert [schedule.seen(step) for step in range(8)] == [0, 1, 2, 0, 1, 3, 4, 5]
    assert Schedule(SearchOptions(rounds=3, rank_steps=2, weight_steps=0)).steps == 6


def test_temperature_falls_geometrically() -> None:
    schedule = Schedule(SearchOptions(rounds=3, rank_steps=3, weight_steps=2))
    at = [schedule.temperature(step) for step in range(13) if schedule.at(step).phase == "ranks"]
    assert at[0] == 5.0 and at[-1] == pytest.approx(0.1)
    ratios = [b / a for a, b in itertools.pairwise(at)]
    assert all(r == pytest.approx(ratios[0]) for r in ratios)


def test_a_search_prefers_what_the_loss_needs(pictures: Pictures) -> None:
    """With one block's MLP made useless, the search gives its ranks to the other's."""
    model = model_of_digits()
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc2").weight.mul_(1e-4)
    plan = search(
        model, pictures, preprocess=PREPROCESS, reduce=0.45, only=("linear",), grid="even", grid_size=8, start="blind",
        statistic="weights",
        rounds=1, rank_steps=80, weight_steps=0, batch_size=16, rank_lr=0.2, pictures=16,
    )  # fmt: skip
    ranks = {
        n: plan.sites[n].keep if n in plan.sites else 48
        for n in (f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2))
    }
    assert ranks["blocks.1.mlp.fc1"] == ranks["blocks.1.mlp.fc2"] == min(ranks.values())
    assert ranks["blocks.0.mlp.fc1"] + ranks["blocks.0.mlp.fc2"] > 2 * min(ranks.values())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [(4,), (1, 6), (5, 7)])
def test_a_killed_search_goes_on_bit_for_bit(pictures: Pictures, tmp_path, monkeypatch, steps: tuple[int, ...]) -> None:
    undisturbed = run(pictures, checkpoint_every=1)
    original = Search._learn
    for kill in steps:

        def dies(self: Search, number, *more, kill=kill):
            if number == kill:
                raise Killed
            return original(self, number, *more)

        monkeypatch.setattr(Search, "_learn", dies)
        with pytest.raises(Killed):
            run(pictures, checkpoint_every=1, out=tmp_path)
    monkeypatch.setattr(Search, "_learn", original)
    assert run(pictures, checkpoint_every=1, out=tmp_path).to_json() == undisturbed.to_json()
    assert run(pictures, checkpoint_every=1, out=tmp_path).to_json() == undisturbed.to_json(), (
        "a finished one is read back"
    )


def test_checkpoints_of_other_settings_are_refused(pictures: Pictures, tmp_path) -> None:
    run(pictures, out=tmp_path)
    with pytest.raises(StoreError, match=r"beta was 1.5, now 2.0.*--restart"):
        run(pictures, out=tmp_path, beta=2.0)
    assert run(pictures, out=tmp_path, beta=2.0, restart=True).made_by["search"]["settings"]["beta"] == 2.0


def test_without_labels_the_model_labels(tmp_path) -> None:
    for i, sample in enumerate(open_pictures("digits:train").take(24, 1)):
        sample.image.save(tmp_path / f"{i}.png")
    found = open_pictures(tmp_path)
    assert not found.has_labels
    assert run(found).made_by["saved"] >= 0.5


def test_bad_settings_and_data(pictures: Pictures, tmp_path) -> None:
    with pytest.raises(BudgetError, match="at most 0"):
        run(pictures, reduce=0.98)
    with pytest.raises(SettingsError, match="unknown setting 'betta'; did you mean 'beta'"):
        run(pictures, betta=1)
    with pytest.raises(SettingsError, match=r"reduce=1\.2"):
        run(pictures, reduce=1.2)
    with pytest.raises(DataError, match="falls on the part that"):
        run(pictures.take(2, 0), held_out=0.01)
    rows(tmp_path / "train.parquet", 20)
    with pytest.raises(DataError, match="a stream of unknown length: a search needs pictures that can be counted"):
        run(open_pictures(f"hf:{tmp_path}"))
    # without labels its own are learned
    with pytest.warns(UserWarning, match="has 10 classes, the model 4: the labels were left out"):
        search(tiny_vit(num_classes=4), pictures, preprocess=PREPROCESS, **FAST)
    with pytest.raises(ModelError, match="no classes"):
        search(tiny_vit(num_classes=0), pictures, preprocess=PREPROCESS, **FAST)


def test_a_loss_that_is_no_number_stops_with_step_and_place(pictures: Pictures, tmp_path, monkeypatch) -> None:
    original = Search._learn

    def poisoned(self: Search, number, *more):
        if number == 4:
            with torch.no_grad():
                self.model.get_submodule("blocks.1.mlp").fc1.weight[0, 0] = float("nan")
        return original(self, number, *more)

    monkeypatch.setattr(Search, "_learn", poisoned)
    with pytest.raises(NumericsError, match=r"step 5.*blocks.1.mlp.fc1.weight.*step-00000004"):
        run(pictures, out=tmp_path, checkpoint_every=2)


def test_one_class_and_batches_of_one(pictures: Pictures, tmp_path) -> None:
    assert run(pictures, batch_size=1).made_by["saved"] >= 0.5
    (tmp_path / "only").mkdir()
    for i, sample in enumerate(pictures.take(20, 0)):
        sample.image.save(tmp_path / "only" / f"{i}.png")
    one = open_pictures(tmp_path)
    assert one.class_names == ("only",)
    assert run(one).made_by["saved"] >= 0.5


# ---------------------------------------------------------------- several processes

TOGETHER = {**FAST, "rank_steps": 6, "weight_steps": 8, "weight_lr": 1e-3}


def _searched(out=None, **settings) -> dict:
    plan = search(
        model_of_digits(), open_pictures("digits:train").take(70, 0), preprocess=PREPROCESS, out=out,
        **{**TOGETHER, **settings},
    )  # fmt: skip
    return plan.to_dict()


def _killed_then_on(out) -> dict:
    learn = Search._learn

    def dies(self: Search, number, *more):
        if number == 9:
            raise Killed
        return learn(self, number, *more)

    Search._learn = dies
    with pytest.raises(Killed):
        _searched(out, checkpoint_every=4)
    Search._learn = learn
    return _searched(out, checkpoint_every=4)


def test_two_processes_search_as_one(tmp_path) -> None:
    """The same global batches and the same noise: the same losses over 20 steps, and the same plan; killed or not."""
    one = _searched()
    (two, same), (killed, _) = (in_processes(2, work, *a) for work, *a in ((_searched,), (_killed_then_on, tmp_path)))
    assert two == same
    for found in (two, killed):
        curves = [f["made_by"]["search"]["curve"] for f in (one, found)]
        assert len(curves[0]) == len(curves[1]) == 20
        assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in zip(*curves, strict=True))
        assert one["sites"] == found["sites"]
    two["made_by"]["search"]["settings"]["checkpoint_every"] = 4
    assert killed == two  # bit for bit


def _told(path) -> tuple:
    try:
        search(
            model_of_digits(),
            open_pictures(path).take(24, 0),
            preprocess=PREPROCESS,
            **{**FAST, "statistic": "weights", "weight_steps": 4},
        )
    except DataError as error:
        return str(error), error.everywhere
    return ()


def test_a_label_that_one_process_meets_stops_all(tmp_path) -> None:
    """They would wait for it for ever. Nobody knows a stream's labels before it is read."""
    import pyarrow
    from pyarrow import parquet

    encoded = []
    for sample in open_pictures("digits:train").take(24, 1):
        buffer = io.BytesIO()
        sample.image.save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{len(encoded)}.png"})
    labels = [10 if number == 9 else 1 for number in range(24)]
    parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), tmp_path / "train.parquet")
    told = in_processes(2, _told, f"hf:{tmp_path}")
    assert told == [("got the label 10, expected 0 to 9: the model has 10 classes", True)] * 2


def test_labels_count_as_the_model_counts_them(tmp_path, monkeypatch):
    from PIL import Image

    for name in ("ship", "truck"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    model = tiny_vit(num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["car", "ship", "truck"]}

    class Seen(Exception):
        pass

    def prepare(self: Search, **_):
        raise Seen([sample.label for sample in self.pictures])

    monkeypatch.setattr(Search, "prepare", prepare)
    with pytest.raises(Seen, match=r"\[1, 2\]"):
        search_(model, tmp_path, SearchSettings(reduce=0.5), preprocess=PREPROCESS)

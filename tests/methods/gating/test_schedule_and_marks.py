"""When gates close, which are marked, and how they are pulled."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from comcat.errors import BudgetError, ModelError, SettingsError
from comcat.forms.gates import gate_
from comcat.hosts import find_sites
from comcat.measure import model_output
from comcat.methods.gating.ground import survey
from comcat.methods.gating.marks import Marks, ranked, scores
from comcat.methods.gating.schedule import Schedule
from comcat.methods.gating.settings import PruneSettings
from comcat.methods.gating.takeover import StandIn, stand_ins
from comcat.methods.gating.training import pull_
from comcat.modules.gates import Gate
from comcat.plan import Plan, SitePlan
from tests.models import pictures, tiny_vit

GATED = ("qk", "vo", "units")


def test_marks_are_chosen_evenly_then_settled_and_all_is_shut_before_the_end() -> None:
    schedule = Schedule(PruneSettings(choices=4, settle=0.4, closing=0.2), 100)
    assert schedule.choices == (0, 10, 20, 30) and schedule.settled == 40
    assert schedule.closing == 20 and schedule.shut == 60
    short = Schedule(PruneSettings(choices=8, settle=0.5, closing=0.5), 2)
    assert short.choices == (0,) and short.shut == 1


def test_the_saving_rises_along_the_ramp_to_all_of_it() -> None:
    schedule = Schedule(PruneSettings(reduce=0.6, choices=4, ramp=0.5, settle=0.4), 100)
    assert [schedule.reduce(step) for step in schedule.choices] == pytest.approx([0.3, 0.6, 0.6, 0.6])
    assert Schedule(PruneSettings(reduce=0.6, ramp=1.0), 100).reduce(35) == pytest.approx(0.6)
    assert Schedule(PruneSettings(reduce=0.6), 100).reduce(0) == 0.6


def test_heads_are_pulled_together_and_each_keeps_its_share() -> None:
    gate = Gate(2, 3)
    with torch.no_grad():
        gate.opening.copy_(torch.tensor([[1.0, 0.6, 0.3], [1.0, 0.8, 0.1]]))
    columns = torch.tensor([[1], [1]])
    pull_(gate, columns, 0.1)
    norm = (0.5 * (0.36 + 0.64)) ** 0.5
    expected = torch.tensor([[1.0, 0.6, 0.3], [1.0, 0.8, 0.1]])
    expected[:, 1] *= 1 - 0.1 / norm
    assert torch.allclose(gate.opening, expected)
    for _ in range(7):
        pull_(gate, columns, 0.1)
    assert gate.opening[:, 1].tolist() == [0.0, 0.0], "exactly shut, no rest of it"
    pull_(gate, torch.tensor([[0], [2]]), 0.1, shut=True)
    assert gate.opening.tolist() == [[0.0, 0.0, pytest.approx(0.3)], [1.0, 0.0, 0.0]]


def test_scores_are_half_the_mean_square_of_each_pictures_gradient(monkeypatch) -> None:
    """Against one backward pass for every picture, with the loss that the model's own labels would give."""
    model = tiny_vit().double()
    calibrate = sys.modules["comcat.statistics.calibrate"]  # the package has a function of that name
    monkeypatch.setattr(calibrate, "sampled_loss", lambda output, classes, labels: output.square().sum())
    sites = find_sites(model).only(*GATED)
    gates = gate_(model, sites)
    with torch.no_grad():
        for gate in gates.values():
            gate.opening.uniform_(0.2, 1.0)
    shown = [batch.double() for batch in pictures(6, 4)]
    found = scores(model, gates, shown, seed=0)
    for name, gate in gates.items():
        expected = torch.zeros_like(gate.opening)
        for image in torch.cat(shown):
            (gradient,) = torch.autograd.grad(model_output(model, image[None]).square().sum(), gate.opening)
            expected += (gate.opening * gradient).square().detach() / 12
        assert torch.allclose(found[name], expected.detach(), rtol=1e-6), name
        assert gate.watched is None


def test_what_a_shut_gate_would_lose_is_nothing() -> None:
    model = tiny_vit()
    sites = find_sites(model).only("units")
    gates = gate_(model, sites)
    first = next(iter(gates))
    with torch.no_grad():
        gates[first].opening[0, :5] = 0
    found = scores(model, gates, pictures(4), seed=0)[first][0]
    assert found[:5].eq(0).all() and found[5:].gt(0).any()


def test_marked_are_those_of_least_score_for_their_cost_in_every_head_equally_many() -> None:
    model = tiny_vit()
    settings = PruneSettings(reduce=0.3)
    ground = survey(model, settings, torch.zeros(1, 3, 32, 32))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {
        name: torch.rand(getattr(site, "heads", 1), site.full, generator=generator)
        for name, site in ground.sites.items()
    }
    cheap = "blocks.1.mlp:units"
    found[cheap] *= 1e-3
    spectra, orders = ranked(ground.sites, found)
    plan = ground.plan(spectra, settings.reduce)
    marks = Marks(plan, orders)
    kept = {n: e.keep / e.full for n, e in plan.sites.items()}
    assert kept[cheap] == min(kept.values()) and plan.made_by["saved"] >= 0.3
    for name, site in ground.sites.items():
        mask = marks.mask(name)
        assert mask.sum(1).tolist() == [site.full - plan.sites[name].keep if name in plan.sites else 0] * len(mask)
        for head, marked in enumerate(mask):
            if marked.any():
                assert found[name][head][marked].max() <= found[name][head][~marked].min()
    other = Marks(Plan(sites={cheap: SitePlan(form="units", keep=1, full=ground.sites[cheap].full)}), orders)
    assert marks.returned(other) == plan.sites[cheap].keep - 1 and marks.returned(marks) == 0


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"reduce": 0.99}, BudgetError, "got reduce=0.99, but the sites that can shrink allow at most 0."),
        ({"reduce": 0.97, "budget": "macs"}, BudgetError, "allow at most 0.* of the model's macs"),
        ({"sites": ("linear",)}, SettingsError, "got sites=linear, expected qk, vo, units or path prefixes"),
        ({"sites": ("blocs.1",)}, SettingsError, r"only=blocs.1 leaves no site; did you mean 'blocks.1"),
        ({"sites": ("head",)}, ModelError, "nothing in head has channels that gates can close"),
    ],
)
def test_what_cannot_be_is_said_at_once(settings, error, said) -> None:
    with pytest.raises(error, match=said):
        survey(tiny_vit(), PruneSettings(**settings), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reduce": 1.0}, "got reduce=1.0"),
        ({"settle": 0.8, "closing": 0.3}, "expected at most 1 together"),
        ({"precision": "fp16"}, "do not suit gates"),
        ({"start": "shut"}, "expected one of closed, blind"),
        ({"choices": 0}, "got choices=0"),
    ],
)
def test_settings_are_checked(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        PruneSettings(**settings)


def test_a_reader_takes_over_what_closing_channels_did() -> None:
    """Shut in any number of moves, the layer is the least-squares fit of what it was on the channels that stay."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixed + 2.0
    reader = nn.Linear(6, 3).double()
    y, rest = reader(z).detach(), torch.full((6,), 0.5, dtype=torch.float64)
    kept, marked = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5])
    c = torch.cov(z.T)
    weights = torch.linalg.solve(c[kept][:, kept], c[kept][:, marked]).mT
    stand_in = StandIn(weights=weights, mean=z.mean(0), opening=torch.ones(3).double(), kept=kept, marked=marked)
    moves = [torch.ones(6).double()]
    for g in (0.7, 0.2, 0.0):
        moves.append(moves[-1].clone())
        moves[-1][marked] = g
        stand_in.take_over_(reader, moves[-2], moves[-1], rest)
    shut = z.clone()
    shut[:, marked] = rest[marked]
    told = torch.cat([z[:, kept], torch.ones(500, 1).double()], 1)
    best = told @ torch.linalg.lstsq(told, y).solution
    assert torch.allclose(reader(shut), best, atol=1e-6)
    assert (y - best).abs().mean() > 0.1


def test_stand_ins_are_measured_behind_the_gates_and_of_what_is_still_open() -> None:
    model = tiny_vit()
    sites = find_sites(model).only(*GATED)
    gates = gate_(model, sites)
    marked = {n: torch.zeros_like(g.opening, dtype=torch.bool) for n, g in gates.items()}
    vo, units = "blocks.0.attn:vo", "blocks.1.mlp:units"
    for name in (vo, units, "blocks.1.attn:qk"):
        marked[name][:, 3:7] = True
    with torch.no_grad():
        gates[units].opening[0, 3] = 0
        gates[units].opening[0, 4] = 0.5
    found = stand_ins(model, sites, gates, marked, pictures(8))
    assert set(found) == {vo, units}, "logits are not linear in Q and K, and the others lose nothing"
    assert found[units].marked.tolist() == [4, 5, 6] and found[units].opening.tolist() == [0.5, 1.0, 1.0]
    assert 3 not in found[units].kept.tolist() and len(found[units].kept) == sites[units].full - 4
    assert found[vo].marked.tolist() == [16 * h + c for h in range(3) for c in range(3, 7)]
    seen: list[Tensor] = []
    down = model.get_submodule("blocks.1.mlp.fc2")
    handle = down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in pictures(8):
            model(batch)
    handle.remove()
    assert torch.allclose(found[units].mean.float(), torch.cat(seen).mean((0, 1)), atol=1e-5)

"""Candidate ranks, and settling on one a site."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comcat.errors import BudgetError, SettingsError
from comcat.hosts import find_sites
from comcat.methods.search.candidates import Candidates, candidates_of, settle, start_near
from comcat.sites import Site
from tests.models import tiny_vit

SITES = find_sites(tiny_vit())


def parameters(site: Site, rank: int | None) -> float:
    return float(site.parameters(rank))


def test_even_steps_end_with_the_site_as_it_is() -> None:
    found = candidates_of(SITES, parameters, grid="even", size=4)
    for name, c in found.items():
        assert c.ranks[-1] == SITES[name].full_rank and c.costs[-1] <= SITES[name].parameters()
        assert list(c.ranks) == sorted(set(c.ranks)) and list(c.costs) == sorted(c.costs)
    assert found["blocks.0.attn:qk"].ranks == (4, 7, 11, 15, 16)
    assert found["blocks.0.mlp.fc1"].ranks == (9, 19, 28, 38, 48)


def test_near_a_plan_from_a_quarter_to_four_times() -> None:
    near = candidates_of(SITES, parameters, grid="near", size=5, near={"blocks.0.mlp.fc1": 8})
    assert near["blocks.0.mlp.fc1"].ranks == (2, 4, 8, 16, 32, 48)
    assert near["head"].ranks[-1] == SITES["head"].full_rank


def test_the_papers_ranks_are_summed_over_heads() -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, embed_dim=384, depth=1, num_heads=6, img_size=32
    )
    found = candidates_of(find_sites(model), parameters, grid="paper")
    assert found["blocks.0.attn:qk"].ranks == (10, 21, 32, 42, 53)  # rounded down
    layer = found["blocks.0.mlp.fc1"]
    assert layer.ranks == (64, 128, 192, 256, 320)
    assert layer.costs[-1] > layer.site.parameters(), "320 stays at low rank though it costs more than the layer"
    given_ = candidates_of(SITES, parameters, totals=(6, 12))
    assert given_["blocks.0.attn:qk"].ranks == (2, 4) and given_["blocks.0.mlp.fc1"].ranks == (6, 12)


def test_multiples_where_there_are_any() -> None:
    found = candidates_of(SITES, parameters, grid="even", size=8, multiple=8)
    for name, c in found.items():
        assert all(r % 8 == 0 or r == SITES[name].full_rank or SITES[name].full_rank < 8 for r in c.ranks), name


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="got a grid of 0"):
        candidates_of(SITES, parameters, grid="even", size=0)


def test_start_prefers_a_candidate_and_its_neighbours() -> None:
    p = start_near(2, 5).softmax(-1)
    assert p.argmax() == 2 and torch.allclose(p[1], p[3]) and p[0] < p[1] < p[2]


def fake(costs: list[float]) -> Candidates:
    return Candidates(SITES["head"], tuple(range(1, len(costs) + 1)), tuple(costs))


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5), st.integers(1, 20)), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_settling_is_the_best_for_what_it_spends(tables: list, share: float) -> None:
    """Losses that fall ever more slowly: then no choice of the same cost or less loses less."""
    candidates = {str(i): fake([cost, 2.0 * cost, 3.0 * cost]) for i, (_, _, cost) in enumerate(tables)}
    losses = {str(i): [a + b, min(a, b), 0.0] for i, (a, b, _) in enumerate(tables)}
    least, most = (sum(c.costs[i] for c in candidates.values()) for i in (0, -1))
    budget = least + share * (most - least)
    choice = settle(candidates, losses, budget)

    def cost_and_loss(positions: tuple[int, ...]) -> tuple[float, float]:
        chosen = dict(zip(candidates, positions, strict=True))
        return sum(candidates[n].costs[i] for n, i in chosen.items()), sum(losses[n][i] for n, i in chosen.items())

    spent, lost = cost_and_loss(tuple(choice.values()))
    assert spent <= budget + 1e-9
    step = max(c.costs[0] for c in candidates.values())
    for other in itertools.product(range(3), repeat=len(candidates)):
        cost, loss = cost_and_loss(other)
        if cost <= spent - step:
            assert loss >= lost - 1e-9


def test_settling_takes_the_likeliest_where_they_just_fit_and_spends_what_is_left() -> None:
    candidates = {"a": fake([1, 2, 4]), "b": fake([1, 2, 4])}
    losses = {"a": [2.0, 0.1, 3.0], "b": [0.1, 2.0, 2.5]}
    assert settle(candidates, losses, 3) == {"a": 1, "b": 0}
    assert settle(candidates, losses, 2) == {"a": 0, "b": 0}
    assert settle(candidates, losses, 100) == {"a": 2, "b": 2}
    assert sum(candidates[n].costs[i] for n, i in settle(candidates, losses, 6).items()) in (5, 6)


def test_a_budget_below_the_smallest_candidates_says_so() -> None:
    with pytest.raises(BudgetError, match=r"cost 2, the budget leaves 1"):
        settle({"a": fake([2, 3])}, {"a": [0.0, 0.0]}, 1.0)

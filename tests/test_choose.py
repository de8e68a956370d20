"""One choice a decision, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.errors import SettingsError
from comcat.methods.choose import Table, in_step, least_loss, same_share
from comcat.methods.settings import check_forms

NUMBERS = st.floats(0.01, 10, allow_nan=False)


def table(costs: list[float], losses: list[float]) -> Table:
    order = np.argsort(costs, kind="stable")
    kept = np.linspace(0.2, 1, len(costs))
    return Table(np.array(costs)[order], np.array(losses)[order], kept, float(max(costs)))


TABLES = st.lists(
    st.integers(2, 5)
    .flatmap(lambda n: st.tuples(st.lists(NUMBERS, min_size=n, max_size=n), st.lists(NUMBERS, min_size=n, max_size=n)))
    .map(lambda pair: table(*pair)),
    min_size=1,
    max_size=4,
)


@given(TABLES, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_choice_fits_and_no_price_does_better(tables, share):
    """Of all combinations none costs as little and loses less than the hull allows: within one step of the optimum."""
    least = sum(t.costs.min() for t in tables)
    budget = least + share * (sum(t.costs.max() for t in tables) - least)
    chosen = least_loss(tables, budget)
    cost = sum(t.costs[i] for t, i in zip(tables, chosen, strict=True))
    loss = sum(t.losses[i] for t, i in zip(tables, chosen, strict=True))
    assert cost <= budget * (1 + 1e-9) + 1e-9
    best = min(
        sum(t.losses[i] for t, i in zip(tables, places, strict=True))
        for places in itertools.product(*(range(len(t.costs)) for t in tables))
        if sum(t.costs[i] for t, i in zip(tables, places, strict=True)) <= budget + 1e-9
    )
    largest = max(float(t.losses.max() - t.losses.min()) for t in tables)
    assert best - 1e-9 <= loss <= best + largest + 1e-9


@given(TABLES)
@settings(max_examples=50, deadline=None)
def test_with_all_the_budget_every_decision_takes_its_best_option(tables):
    chosen = least_loss(tables, sum(t.costs.max() for t in tables) + 1)
    assert all(t.losses[i] == t.losses.min() for t, i in zip(tables, chosen, strict=True))


def test_a_budget_is_spent_even_where_it_hurts():
    tables = [table([1, 2, 3], [0, 1, 5]), table([1, 2, 3], [0, 2, 3])]
    assert least_loss(tables, 4) == [0, 0]
    spent = least_loss(tables, 4, spend=True)
    assert sum(t.costs[i] for t, i in zip(tables, spent, strict=True)) == 4


def test_exclusive_options_are_taken_where_they_are_best():
    """Units are better below, ranks above: the hull holds both, and each budget finds its own."""
    mixed = table([2, 4, 6, 8, 10], [5, 3, 2.5, 0.5, 0])
    picked = {budget: least_loss([mixed], budget)[0] for budget in (2, 4, 8, 10)}
    assert picked == {2: 0, 4: 1, 8: 3, 10: 4}


@given(TABLES, st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_the_same_share_is_kept_of_everything(tables, share):
    budget = max(share * sum(t.dense for t in tables), sum(t.costs.min() for t in tables))
    chosen = same_share(tables, budget, "share")
    assert sum(t.costs[i] for t, i in zip(tables, chosen, strict=True)) <= budget * (1 + 1e-9) + 1e-9


def test_layers_go_in_step_by_price_and_by_share():
    first, second = table([1, 2, 4], [4, 1, 0]), table([1, 3, 4], [9, 1, 0])
    assert in_step([first, second], "price") == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
    assert in_step([first, second], "share") == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]


def test_forms_are_words_with_commas_or_a_list():
    assert check_forms("units, ranks") == check_forms(("units", "ranks")) == ("ranks", "units")
    assert check_forms("units") == ("units",)
    with pytest.raises(SettingsError, match="did you mean 'units'"):
        check_forms("unit")
    with pytest.raises(SettingsError, match="no forms"):
        check_forms("")

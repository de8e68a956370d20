"""Reductions of tokens: against plain loops, and what must hold for all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat.tokens import Chosen, Groups, Windows, bipartite, highest, look_alikes


def published(metric, merges):
    """Token merging as its paper tells it, one picture and one token at a time: lists of merged tokens in order."""
    found = []
    for picture in metric:
        unit = picture / picture.norm(dim=-1, keepdim=True)
        a, b = list(range(0, len(unit), 2)), list(range(1, len(unit), 2))
        scores = [max((float(unit[i] @ unit[j]), -j) for j in b) for i in a]  # the first of equals
        best = sorted(range(len(a)), key=lambda n: -scores[n][0])
        gone = set(best[:merges])
        alone = [[a[n]] for n in range(len(a)) if n not in gone]
        joined = {j: [j] for j in b}
        for n in gone:
            joined[-scores[n][1]].append(a[n])
        found.append(alone + [joined[j] for j in b])
    return found


@pytest.mark.parametrize("tokens", [2, 7, 12, 25])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_bipartite_is_what_was_published(tokens, share):
    metric = torch.randn(3, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    merges = max(1, int(share * tokens))
    groups = bipartite(metric, merges)
    x = torch.randn(3, tokens, 4)
    for picture, members in enumerate(published(metric, merges)):
        expected = torch.stack([x[picture, m].mean(0) for m in members])
        torch.testing.assert_close(groups.mean(x)[picture], expected)
        assert [len(m) for m in members] == groups.sizes()[picture].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.data())
def test_groups_are_a_partition(batch, tokens, data):
    count = data.draw(st.integers(1, tokens))
    metric = torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    groups = look_alikes(metric, count)
    assert groups.count == count and groups.index.shape == (batch, tokens)
    assert groups.sizes().sum(1).tolist() == [tokens] * batch
    assert (groups.sizes() >= 1).all()
    x = torch.randn(batch, tokens, 2)
    alone = groups.spread(groups.sizes()[..., None]) == 1
    back = groups.spread(groups.mean(x))
    torch.testing.assert_close(back[alone.expand_as(x)], x[alone.expand_as(x)])  # tokens that were not merged
    torch.testing.assert_close(groups.mean(back), groups.mean(x))


def test_pictures_do_not_see_each_other():
    metric = torch.randn(4, 16, 6)
    together = look_alikes(metric, 5).index
    for i in (2, 0, 3, 1):
        assert torch.equal(look_alikes(metric[i : i + 1], 5).index[0], together[i])


def test_equal_tokens_are_merged_first_and_order_of_equals_is_fixed():
    x = torch.eye(8)[None].repeat(1, 1, 1)
    x[0, 4] = x[0, 5]
    assert bipartite(x, 1).sizes()[0].max() == 2
    same = bipartite(torch.ones(2, 9, 3), 4)
    assert torch.equal(same.index[0], same.index[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1), (1, 1)]))
def test_windows_are_means_of_neighbours(rows, columns, window):
    w = Windows((rows, columns), window)
    x = torch.randn(2, rows * columns, 3)
    picture = x.view(2, rows, columns, 3)
    expected = [
        picture[:, i : i + window[0], j : j + window[1]].mean((1, 2))
        for i in range(0, rows, window[0])
        for j in range(0, columns, window[1])
    ]
    assert w.count == len(expected)
    torch.testing.assert_close(w.mean(x), torch.stack(expected, 1))
    spread = w.spread(w.mean(x)).view(2, rows, columns, 3)
    assert torch.equal(spread[:, 0, 0], w.mean(x)[:, 0]) and torch.equal(spread[:, -1, -1], w.mean(x)[:, -1])
    torch.testing.assert_close(w.mean(w.spread(w.mean(x))), w.mean(x))


def test_chosen_tokens_are_run_and_the_others_rest():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [1.0, 0.0, 2.0, 3.0]])
    chosen = highest(scores, 2)
    assert chosen.index.tolist() == [[1, 3], [2, 3]] and isinstance(chosen, Chosen)
    x = torch.randn(2, 4, 3)
    back = chosen.spread(chosen.mean(x))
    assert torch.equal(back[0, 1], x[0, 1]) and torch.equal(back[0, 0], torch.zeros(3))


@pytest.mark.parametrize(
    "reduction",
    [
        look_alikes(torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)), 7),
        highest(torch.randn(2, 12, generator=torch.Generator().manual_seed(1)), 5),
        *(Windows((3, 4), w) for w in [(1, 2), (2, 1), (2, 2), (3, 2), (3, 4)]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_added_is_handed_to_all_and_can_be_learned_from(reduction):
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    y = reduction.mean(x).detach().sin().requires_grad_()
    torch.testing.assert_close(reduction.added(x, y), x + reduction.spread(y), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x, y: reduction.added(x, y + reduction.mean(x) ** 2), (x, y))


def test_bad_counts_are_told():
    x = torch.randn(1, 4, 2)
    for call in (
        lambda: bipartite(x, 3),
        lambda: look_alikes(x, 0),
        lambda: look_alikes(x, 5),
        lambda: highest(x[..., 0], 9),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_products_for_export_are_equal_to_gathering(monkeypatch):
    metric, x = torch.randn(2, 11, 4), torch.randn(2, 11, 3)
    groups = look_alikes(metric, 6)
    plain = groups.mean(x), groups.spread(groups.mean(x))
    monkeypatch.setattr("comcat.tokens.similar.exporting", lambda: True)
    assert torch.equal(look_alikes(metric, 6).index, groups.index)
    torch.testing.assert_close(groups.mean(x), plain[0])
    torch.testing.assert_close(groups.spread(plain[0]), plain[1])


def test_groups_of_groups():
    first = Groups(torch.tensor([[0, 0, 1, 2]]), 3)
    assert first.then(Groups(torch.tensor([[0, 1, 1]]), 2)).index.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("count", [12, 9, 6, 5, 2])
def test_tokens_in_front_are_groups_of_their_own(count):
    metric = torch.randn(2, 12, 4)
    alone, behind = look_alikes(metric, count), look_alikes(metric, count, 3)
    assert behind.count == count + 3 and behind.index[:, :3].tolist() == [[0, 1, 2]] * 2
    assert torch.equal(behind.index[:, 3:], alone.index + 3)
    assert torch.equal(behind.sizes(), torch.cat((torch.ones(2, 3), alone.sizes()), 1))


def test_lengths_do_not_matter_nor_do_tokens_of_zeros():
    metric = torch.randn(2, 12, 4)
    scaled = metric * torch.logspace(-3, 3, 12)[None, :, None]
    assert torch.equal(look_alikes(metric, 8).index, look_alikes(scaled, 8).index)
    groups = bipartite(torch.zeros(2, 9, 3), 4)
    assert groups.sizes().sum(1).tolist() == [9, 9]
    large = (1000 * metric).half()  # products of two such would be infinite in half precision
    assert torch.equal(bipartite(large, 3).index, bipartite(large.float(), 3).index)

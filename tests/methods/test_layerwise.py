"""FWSVD, SVD-LLM's whitening and feature PCA, each against its paper's own formula on what really flows."""

import copy

import pytest
import torch

from comcat.apply import apply_
from comcat.errors import ComcatError, PlanError
from comcat.forms.matrix import nearest_factors
from comcat.hosts import find_sites
from comcat.measure.running import call
from comcat.methods.baselines import BASELINES, ffn_sites, layerwise, mha_sites
from comcat.methods.baselines.layerwise import input_fisher, rows_of
from comcat.statistics.examples import examples_of
from comcat.statistics.losses import sampled_loss

from ..models import pictures, tiny_vit

KINDS = ("fwsvd", "svd-llm", "feature-pca")


@pytest.fixture
def model():
    return tiny_vit(embed_dim=24, mlp_ratio=2)


def shown():
    """Some pictures, each a batch of its own."""
    return [x[None] for x in pictures(4)[0]]


def flows(model, path):
    """What enters and leaves a layer on the pictures: (rows, in) and (rows, out), float64."""
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, i, o: found.append((i[0], o)))
    with torch.no_grad():
        for x in shown():
            model(x)
    hook.remove()
    return (torch.cat([pair[side].flatten(0, -2) for pair in found]).double() for side in (0, 1))


def weighed(weight, root, rank):
    """The best W' of a rank under ``‖(W − W') root‖``, by the SVD of ``W root``."""
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(root)


def expected(kind, model, rows, rank):
    """The weight (out, in) of one matrix as its paper has it."""
    weight = rows.weight(model)
    x, y = flows(model, rows.path)
    if kind == "fwsvd":
        return weighed(weight, input_fisher(model, [rows], shown())[rows].sqrt().diag(), rank)
    if kind == "svd-llm":
        return weighed(weight, torch.linalg.cholesky(x.mT @ x / len(x)), rank)
    vectors = torch.linalg.eigh(y[:, rows.start : rows.stop].mT.cov()).eigenvectors[:, -rank:]
    return vectors @ vectors.mT @ weight


def stands_for(module):
    with torch.no_grad():
        zero = module(torch.zeros(module.in_features))
        return (module(torch.eye(module.in_features)) - zero).mT.double(), zero.double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_forward_becomes_what_the_paper_says(kind, model):
    dense, baseline = copy.deepcopy(model), BASELINES[kind]
    sites = find_sites(model)
    seen = baseline.measured(model, sites, shown())
    plan = baseline(model, sites, 0.5, statistic=seen)
    assert set(plan.sites) == set(ffn_sites(sites)) and plan.made_by["statistic"] == kind
    apply_(model, plan, seen, sites=sites)
    for name, entry in plan.sites.items():  # fc1 is wide, fc2 is tall
        (rows,) = rows_of(dense, sites.only(name))
        got, bias = stands_for(model.get_submodule(name))
        torch.testing.assert_close(got, expected(kind, dense, rows, entry.keep), atol=2e-4, rtol=1e-3)
        x, y = flows(dense, name)
        if kind == "feature-pca":
            torch.testing.assert_close((x @ got.mT + bias).mean(0), y.mean(0), atol=1e-4, rtol=1e-3)
        else:
            torch.testing.assert_close(bias, dense.get_submodule(name).bias.detach().double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_an_attention_is_decomposed_apart(kind, model):
    dense, baseline = copy.deepcopy(model), BASELINES[f"matrix-{kind}"]
    sites = find_sites(model)
    seen = baseline.measured(model, sites, shown())
    plan = baseline(model, sites, 0.5, statistic=seen)
    assert set(plan.sites) == set(mha_sites(sites)) and plan.made_by["statistic"] == kind
    handle = apply_(model, plan, seen, sites=sites)
    path = "blocks.1.attn"
    for kinds in ("qk", "vo"):
        rank = plan.sites[f"{path}:{kinds}"].keep
        for rows in rows_of(dense, sites.only(path).only(kinds)):
            module = model.get_submodule(rows.path)
            thin = module if rows.path.endswith("proj") else module.layers[rows.start // 24]
            got, bias = stands_for(thin)
            torch.testing.assert_close(got, expected(kind, dense, rows, rank), atol=2e-4, rtol=1e-3)
            x, y = flows(dense, rows.path)
            said = x @ got.mT + bias
            if kind == "feature-pca":
                torch.testing.assert_close(said.mean(0), y[:, rows.start : rows.stop].mean(0), atol=1e-4, rtol=1e-3)
    handle.revert()
    x = shown()[0]
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (9, 9)])
def test_nearest_factors_are_the_best_of_their_rank(size):
    weight, x = torch.randn(size, dtype=torch.float64), torch.randn(50, size[1], dtype=torch.float64)
    metric = x.mT @ x / 50
    given = metric if size[1] <= size[0] else weight @ metric @ weight.mT
    for rank in (1, 4, 9):
        first, last = nearest_factors(weight, given, rank)
        torch.testing.assert_close(
            last @ first, weighed(weight, torch.linalg.cholesky(metric), rank), atol=1e-6, rtol=0
        )


def test_fisher_is_that_of_each_picture_alone(model):
    """The gradients of whole weights by autograd, picture by picture, with the same labels drawn."""
    sites = find_sites(model)
    rows = [*rows_of(model, sites.only("blocks.0.attn")), *rows_of(model, sites.only("blocks.1.mlp.fc2"))]
    found = input_fisher(model, rows, shown(), seed=3)
    labels, totals = torch.Generator().manual_seed(3), dict.fromkeys(rows, torch.zeros(()))
    for example in examples_of(model, shown()):
        model.zero_grad()
        inputs = example.on(torch.device("cpu"), torch.float32, gradients=True)
        sampled_loss(call(model, inputs), frozenset({5}), labels).backward()
        for r in rows:
            slopes = model.get_submodule(r.path).weight.grad[r.start : r.stop]
            totals[r] = totals[r] + slopes.square().sum(0)
    for r in rows:
        torch.testing.assert_close(found[r], (totals[r] / len(shown())).double(), atol=1e-8, rtol=1e-3)
    batched = input_fisher(model, rows, [pictures(4)[0]], seed=3)
    assert all(f.shape == (r.weight(model).shape[1],) and f.min() >= 0 for r, f in batched.items())


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_changes_nothing(kind, model):
    from comcat.plan import Plan, SitePlan

    sites = find_sites(model)
    expected, x = model(shown()[0]), shown()[0]
    seen = layerwise(kind, model, sites, shown())
    plan = {n: SitePlan(keep=24, full=s.full, form="matrix") for n, s in mha_sites(sites).items()}
    plan |= {n: SitePlan(keep=s.full, full=s.full) for n, s in ffn_sites(sites).items()}
    apply_(model, Plan(sites=plan), seen, sites=sites)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_what_was_not_measured_is_refused(model):
    sites = find_sites(model)
    seen = layerwise("svd-llm", model, sites.only("blocks.0"), shown())
    plan = BASELINES["matrix-svd-llm"](model, sites, 0.3, statistic=seen)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PlanError, match=r"blocks\.1\.attn\.qkv: got a plan for it, but svd-llm was measured without it"
    ):
        apply_(model, plan, seen, sites=sites)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ComcatError, match="pass statistic="):
        BASELINES["fwsvd"](model, sites, 0.3)
    with pytest.raises(ComcatError, match="no pictures"):
        layerwise("fwsvd", model, sites, [])

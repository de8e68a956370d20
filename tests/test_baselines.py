"""Matrix, Tucker and tensor-train forms, and the plans of the paper's baselines."""

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from comcat.apply import apply_
from comcat.errors import BudgetError, ComcatError, ModelError, NumericsError, PlanError, SettingsError
from comcat.factors import PaperCode, Statistic, Unilateral, Weights
from comcat.forms import check_plan
from comcat.hosts import find_sites
from comcat.measure import count_parameters
from comcat.methods.baselines import (
    BASELINES,
    Baseline,
    ffn_sites,
    hidden_sites,
    matrix_plan,
    mha_sites,
    near_equal,
    tensor_train_plan,
    tucker_plan,
    uniform_plan,
)
from comcat.modules.lowrank import LowRankLinear
from comcat.modules.tensor import (
    TENSOR_FORMS,
    TensorTrainLinear,
    TuckerLinear,
    matrix_factors,
)
from comcat.modules.tensor_shapes import check_shape, shape_parameters
from comcat.plan import Plan, SitePlan
from comcat.sites import Sites

FULL = [
    # form, in, out, shape at full rank
    ("tucker", 24, 36, {"out": [36], "in": [24], "ranks": [24, 24]}),
    ("tucker", 24, 36, {"out": [9, 4], "in": [6, 4], "ranks": [9, 4, 6, 4]}),
    ("tucker", 23, 17, {"out": [17], "in": [23], "ranks": [17, 17]}),
    ("tucker", 12, 17, {"out": [17], "in": [3, 4], "ranks": [12, 3, 4]}),
    ("tensor_train", 24, 36, {"out": [4, 9], "in": [6, 4], "ranks": [24]}),
    ("tensor_train", 24, 36, {"out": [3, 3, 4], "in": [4, 3, 2], "ranks": [12, 8]}),
    ("tensor_train", 23, 17, {"out": [1, 17], "in": [23, 1], "ranks": [17]}),
]


class Attention(nn.Module):
    """A plain attention as timm's is, so that nothing but torch is needed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, dim: int = 24, hidden: int = 48, heads: int = 3, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, hidden, heads) for _ in range(depth)))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean(1))


@pytest.fixture(scope="module")
def sites() -> Sites:
    """Sites are data: found once, they are good for every model of this shape."""
    return find_sites(Transformer().eval())


@pytest.fixture
def model() -> Transformer:
    return Transformer().eval()


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight a module stands for, from what it does to unit vectors: (out, in)."""
    with torch.no_grad():
        return (module(torch.eye(module.in_features)) - module(torch.zeros(module.in_features))).T


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(("form", "into", "out", "shape"), FULL)
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_reproduces_the_dense_layer(form: str, into: int, out: int, shape: dict, bias: bool) -> None:
    dense = nn.Linear(into, out, bias=bias)
    module = TENSOR_FORMS[form](dense, shape, True)
    for size in ((into,), (5, into), (2, 3, 4, into), (0, into)):
        x = torch.randn(size)
        torch.testing.assert_close(module(x), dense(x), atol=1e-5, rtol=1e-5)


def test_features_are_numbered_as_view_does() -> None:
    """The formulas of the docstrings, written out with einsum, on factors that are not symmetric in any mode."""
    x = torch.randn(7, 24)
    tucker = TuckerLinear(24, 36, {"out": [9, 4], "in": [6, 4], "ranks": [3, 2, 4, 3]})
    core = tucker.core.view(3, 2, 4, 3)
    tensor = torch.einsum(
        "abcd,ia,jb,ck,dl->ijkl", core, *(f.weight for f in (*tucker.out_factors, *tucker.in_factors))
    )
    torch.testing.assert_close(tucker(x), x @ tensor.reshape(36, 24).T, atol=1e-5, rtol=1e-5)
    train = TensorTrainLinear(24, 36, {"out": [2, 3, 6], "in": [4, 3, 2], "ranks": [5, 4]})
    first, second, last = (c.weight for c in train.cores)
    matrices = first.view(2, 5, 1, 4), second.view(3, 4, 5, 3), last.view(6, 1, 4, 2)  # (o, r, r', i)
    tensor = torch.einsum("aszi,btsj,cytk->abcijk", *matrices)
    torch.testing.assert_close(train(x), x @ tensor.reshape(36, 24).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "into", "out", "shape"), FULL)
def test_parameters_equal_what_the_shape_says(form: str, into: int, out: int, shape: dict) -> None:
    shape = {**shape, "ranks": [min(2, r) for r in shape["ranks"]]}
    module = TENSOR_FORMS[form](nn.Linear(into, out), shape, True)
    assert sum(p.numel() for p in module.parameters()) == shape_parameters(form, shape) + out


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_matrix_and_tucker_of_order_two_are_the_best_of_their_rank(rank: int) -> None:
    """Eckart and Young: the error is the norm of the singular values left out."""
    dense = nn.Linear(16, 20)
    sigma = torch.linalg.svdvals(dense.weight.double())
    expected = sigma[rank:].square().sum().sqrt().item()
    first, last = matrix_factors(dense.weight.detach(), rank)
    assert (last @ first - dense.weight).norm().item() == pytest.approx(expected, rel=1e-6)
    tucker = TENSOR_FORMS["tucker"](dense, {"out": [20], "in": [16], "ranks": [rank, rank]}, True)
    assert (dense_weight(tucker) - dense.weight).norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_train_of_two_is_the_best_sum_of_kronecker_products() -> None:
    dense = nn.Linear(12, 20)
    rearranged = dense.weight.double().view(4, 5, 4, 3).transpose(1, 2).reshape(16, 15)
    expected = torch.linalg.svdvals(rearranged)[3:].square().sum().sqrt().item()
    module = TENSOR_FORMS["tensor_train"](dense, {"out": [4, 5], "in": [4, 3], "ranks": [3]}, True)
    assert (dense_weight(module) - dense.weight).norm().item() == pytest.approx(expected, rel=1e-4)


def test_sweeps_improve_on_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Linear(24, 36)
    shape = {"out": [9, 4], "in": [6, 4], "ranks": [3, 2, 3, 2]}
    swept = (dense_weight(TENSOR_FORMS["tucker"](dense, shape, True)) - dense.weight).norm()
    monkeypatch.setattr("comcat.modules.tensor.SWEEPS", 0)
    start = (dense_weight(TENSOR_FORMS["tucker"](dense, shape, True)) - dense.weight).norm()
    assert swept < start - 1e-3


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_an_exact_low_rank_weight_is_found(form: str) -> None:
    """A weight that has the form comes back, whatever basis it was written in."""
    shape = {"out": [4, 9], "in": [6, 4], "ranks": [3, 2, 3, 2] if form == "tucker" else [3]}
    source = TENSOR_FORMS[form](nn.Linear(24, 36, bias=False), shape, False)
    dense = nn.Linear(24, 36)
    dense.weight.data.copy_(dense_weight(source))
    found = TENSOR_FORMS[form](dense, shape, True)
    torch.testing.assert_close(dense_weight(found), dense.weight.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_decomposition_is_deterministic_and_leaves_tensorly_alone(form: str) -> None:
    import tensorly

    tensorly.set_backend("pytorch")
    try:
        dense = nn.Linear(24, 36)
        shape = {"out": [4, 9], "in": [6, 4], "ranks": [3, 2, 3, 2] if form == "tucker" else [3]}
        once, again = (TENSOR_FORMS[form](dense, shape, True).state_dict() for _ in range(2))
        assert all(torch.equal(once[k], again[k]) for k in once)
        assert tensorly.get_backend() == "pytorch"
        assert tensorly.backend.BackendManager._backend.backend_name == "pytorch"
    finally:
        tensorly.set_backend("numpy")


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_modules_survive_copies_gradients_and_half_precision(form: str) -> None:
    shape = {"out": [4, 9], "in": [6, 4], "ranks": [3, 2, 3, 2] if form == "tucker" else [3]}
    module = TENSOR_FORMS[form](nn.Linear(24, 36, dtype=torch.bfloat16), shape, True)
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    module.float()(x.float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_a_weight_of_zeros_stays_zero_and_nan_is_refused(form: str) -> None:
    shape = {"out": [4, 9], "in": [6, 4], "ranks": [3, 2, 3, 2] if form == "tucker" else [3]}
    dense = nn.Linear(24, 36)
    nn.init.zeros_(dense.weight)
    assert not dense_weight(TENSOR_FORMS[form](dense, shape, True)).any()
    dense.weight.data[0, 0] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        TENSOR_FORMS[form](dense, shape, True)


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("tucker", {"out": [36], "in": [24]}, "expected an object with 'out', 'in' and 'ranks'"),
        ("tucker", None, "expected an object"),
        ("tucker", {"out": [36], "in": [24], "ranks": [3.0, 3]}, r"got ranks \[3.0, 3\], expected whole numbers"),
        (
            "tucker",
            {"out": [6, 5], "in": [24], "ranks": [3, 3, 3]},
            r"got out \[6, 5\], expected modes whose product is 36",
        ),
        ("tucker", {"out": [36], "in": [24], "ranks": [3]}, "got 1 rank, expected 2"),
        ("tucker", {"out": [36], "in": [24], "ranks": [4, 3]}, "expected 1 to 3 for number 1"),
        ("tucker", {"out": [36], "in": [24], "ranks": [0, 0]}, "expected whole numbers from 1 on"),
        ("tensor_train", {"out": [6, 6], "in": [24], "ranks": [3]}, "expected as many modes of each"),
        ("tensor_train", {"out": [6, 6], "in": [6, 4], "ranks": []}, "got 0 ranks, expected 1"),
        ("tensor_train", {"out": [6, 6], "in": [6, 4], "ranks": [25]}, "expected 1 to 24 for number 1"),
        ("tensor_trian", {}, "did you mean 'tensor_train'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(form: str, shape: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_shape(form, shape, 24, 36)


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_without_tensorly_the_message_names_the_extra(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"out": [4, 9], "in": [6, 4], "ranks": [3, 2, 3, 2] if form == "tucker" else [3]}
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ComcatError, match=r"comcat\[baselines\]"):
        TENSOR_FORMS[form](nn.Linear(24, 36), shape, True)
    structure = TENSOR_FORMS[form](nn.Linear(24, 36), shape, False)  # loading needs no decomposition
    assert structure(torch.zeros(2, 24)).shape == (2, 36)


# ---------------------------------------------------------------- sites


def test_a_model_is_split_into_attention_feed_forward_and_rest(sites: Sites) -> None:
    mha, ffn = mha_sites(sites), ffn_sites(sites)
    assert [s.kind for s in mha.values()] == ["qk", "vo"] * 2
    assert list(ffn) == ["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2"]
    assert list(hidden_sites(sites)) == ["blocks.0.mlp:units", "blocks.1.mlp:units"]
    assert set(sites) - set(mha) - set(ffn) - set(hidden_sites(sites)) == {"head"}


# ---------------------------------------------------------------- plans


def statistic_of(baseline: Baseline, model: nn.Module, sites: Sites) -> Statistic:
    """What a baseline's plans are made and applied with."""
    tokens = [torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return baseline.measured(model, sites, tokens) if baseline.needs_pictures else baseline.statistic


@pytest.mark.parametrize("name", BASELINES)
def test_budgets_are_met_within_one_step_and_counted_right(name: str, model: Transformer, sites: Sites) -> None:
    reduce = 0.3
    baseline = BASELINES[name]
    part = sum(s.parameters() for s in baseline.sites(sites).values())
    statistic = statistic_of(baseline, model, sites)
    plan = baseline(model, sites, reduce, statistic=statistic)
    before = count_parameters(model)
    x = torch.randn(2, 5, 24)
    expected = model(x)
    handle = apply_(model, plan, statistic, sites=sites)
    saved = before - count_parameters(model)
    assert set(plan.sites) == set(baseline.sites(sites))
    assert saved == pytest.approx(plan.made_by["saved"] * part, abs=1e-6)
    # The largest step there is: a column more in each head of a product, in both matrices of a pair, of a
    # feed-forward layer (Tucker: and in its core), or in one mode of a tensor.
    step = {"mha": 3 * (48 + 1), "ffn": 72, "units": 2 * 24 + 1 + 24}[baseline.part]
    step = {"matrix": 96, "tucker": 72 + 48, "tucker-4": 400, "tensor-train": 72}.get(name, step)
    assert reduce * part <= saved < reduce * part + step
    assert model(x).shape == expected.shape
    handle.revert()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", BASELINES)
def test_total_is_what_reduce_is_a_share_of(name: str, model: Transformer, sites: Sites) -> None:
    baseline = BASELINES[name]
    part, statistic = sum(s.parameters() for s in baseline.sites(sites).values()), statistic_of(baseline, model, sites)
    of_part = baseline(model, sites, 0.4, statistic=statistic)
    of_twice = baseline(model, sites, 0.2, total=2 * part, statistic=statistic)
    assert dict(of_part.sites) == dict(of_twice.sites)
    assert of_twice.made_by["saved"] == pytest.approx(of_part.made_by["saved"] / 2)


@pytest.mark.parametrize("name", BASELINES)
def test_a_plan_from_json_builds_the_structure_for_saved_weights(name: str, model: Transformer, sites: Sites) -> None:
    baseline = BASELINES[name]
    twin = copy.deepcopy(model)
    statistic = statistic_of(baseline, model, sites)
    plan = baseline(model, sites, 0.5, statistic=statistic)
    again = Plan.from_json(plan.to_json())
    assert again.sites == plan.sites and dict(again.made_by) == dict(plan.made_by)
    apply_(model, plan, statistic, sites=sites)
    apply_(twin, again, sites=sites, weights=False)
    x = torch.randn(2, 5, 24)
    assert not torch.allclose(twin(x), model(x))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(x), model(x))


def test_equal_sites_have_one_rank_or_the_next(model: Transformer, sites: Sites) -> None:
    for reduce in (0.2, 0.4, 0.6, 0.8):
        ranks = [s.keep for s in matrix_plan(model, sites, reduce).sites.values()]
        assert max(ranks) - min(ranks) <= 1
        assert ranks == sorted(ranks, reverse=True)  # what is left over goes to the first


def test_the_matrix_form_is_each_matrix_at_low_rank(model: Transformer, sites: Sites) -> None:
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    plan = matrix_plan(model, sites, 0.5)
    apply_(model, plan, sites=sites)
    attention = model.blocks[0].attn
    rank = plan.sites["blocks.0.attn:qk"].keep
    for thin, matrix in zip(attention.qkv.layers, before.split(24), strict=True):
        assert isinstance(thin, LowRankLinear)
        sigma = torch.linalg.svdvals(matrix.double())
        error = (dense_weight(thin) - matrix).norm().item()
        assert error == pytest.approx(sigma[thin.rank :].square().sum().sqrt().item(), rel=1e-4)
    assert attention.qkv.layers[0].rank == attention.qkv.layers[1].rank == rank


def test_products_need_the_lesser_rank_of_their_two_matrices(model: Transformer, sites: Sites) -> None:
    """W_Q nearly of rank 2 a head, W_K not: their product loses nothing at rank 2, W_K alone does."""
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight[:48] *= 4  # logits that matter
        for q in attention.qkv.weight[:24].split(8):
            q.copy_(torch.randn(8, 2) @ torch.randn(2, 8) @ q / 4)
        attention.qkv.bias[:24] = 0
    first = Sites({n: s for n, s in sites.only("qk").items() if s.path == "blocks.0.attn"})
    x = torch.randn(2, 5, 24)
    expected = model(x)
    errors = {}
    for name in ("product", "matrix"):
        handle = apply_(model, BASELINES[name](model, first, 0.7), sites=sites)
        errors[name] = (model(x) - expected).abs().max().item()
        handle.revert()
    assert errors["product"] < 1e-4 < 1e-3 < errors["matrix"]


def test_tables_carry_the_statistic_to_apply_with() -> None:
    assert BASELINES["product"].statistic == BASELINES["svd"].statistic == Weights()
    assert BASELINES["paper-code"].statistic == PaperCode()
    assert BASELINES["unilateral"].statistic == Unilateral()


@pytest.mark.parametrize("propose", [uniform_plan, tucker_plan, tensor_train_plan])
def test_heads_stay_where_no_sites_are_given(propose, model: Transformer, sites: Sites) -> None:
    assert propose(model, None, 0.2).sites and "head" not in propose(model, None, 0.2).sites
    assert "head" in propose(model, sites, 0.2).sites  # asked for


def test_sites_are_found_where_none_are_given(model: Transformer, sites: Sites) -> None:
    found, given = (BASELINES["unilateral"](model, s, 0.5) for s in (None, sites))
    assert dict(found.sites) == dict(given.sites)
    assert found.made_by["statistic"] == "unilateral"


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [
        (1536, 2, [32, 48]),
        (384, 2, [16, 24]),
        (384, 3, [6, 8, 8]),
        (17, 2, [1, 17]),
        (1, 3, [1, 1, 1]),
        (36, 2, [6, 6]),
    ],
)
def test_near_equal(number: int, parts: int, expected: list[int]) -> None:
    assert near_equal(number, parts) == expected


@pytest.mark.parametrize("propose", [tucker_plan, tensor_train_plan])
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize(("dim", "hidden"), [(17, 23), (15, 45), (16, 30)])
def test_odd_and_prime_sizes(propose, order: int, dim: int, hidden: int) -> None:
    model = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)).eval()
    sites = ffn_sites(find_sites(model))
    dense = count_parameters(model)
    plan = propose(model, sites, 0.3, order=order)
    for name, entry in plan.sites.items():
        check_shape(entry.form, entry.shape, sites[name].in_features, sites[name].out_features)
        assert 1 not in entry.shape["out"] or entry.form == "tensor_train"
    apply_(model, plan, sites=sites)
    assert dense - count_parameters(model) == pytest.approx(plan.made_by["saved"] * dense, abs=1e-6)
    assert 0.3 <= plan.made_by["saved"]
    assert torch.isfinite(model(torch.randn(3, dim))).all()


def test_every_step_of_a_ladder_is_a_shape_that_fits() -> None:
    """At any budget the plan passes its own check, so no rank is more than its neighbours can carry."""
    model = nn.Sequential(nn.Linear(12, 48), nn.Linear(48, 12))
    sites = find_sites(model)
    seen: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for propose, order in ((tucker_plan, 2), (tucker_plan, 4), (tensor_train_plan, 2), (tensor_train_plan, 3)):
        for reduce in np.linspace(0.05, 0.8, 10):
            plan = propose(model, sites, float(reduce), order=order)
            check_plan(plan, sites)
            for name, entry in plan.sites.items():
                check_shape(entry.form, entry.shape, sites[name].in_features, sites[name].out_features)
                seen.setdefault((entry.form, order), set()).add(tuple(entry.shape["ranks"]))
    assert len(seen) == 4 and min(len(ranks) for ranks in seen.values()) > 5


def test_budgets_and_settings_that_cannot_be_are_refused(model: Transformer, sites: Sites) -> None:
    for propose in (matrix_plan, uniform_plan, tucker_plan, tensor_train_plan):
        with pytest.raises(BudgetError, match="at most 0"):
            propose(model, sites, 0.9999)
        with pytest.raises(SettingsError, match="share between 0 and 1"):
            propose(model, sites, 1.5)
        with pytest.raises(SettingsError, match="got total=0"):
            propose(model, sites, 0.5, total=0)
    with pytest.raises(SettingsError, match="got order=3"):
        tucker_plan(model, sites, 0.5, order=3)
    with pytest.raises(SettingsError, match="got order=1"):
        tensor_train_plan(model, sites, 0.5, order=1)
    with pytest.raises(ModelError, match="no attention"):
        matrix_plan(model, sites.only("linear"), 0.5)
    with pytest.raises(ModelError, match="no feed-forward layer"):
        BASELINES["tucker"](model, sites.only("head"), 0.5)


def test_a_shape_that_does_not_fit_leaves_the_model_as_it_was(model: Transformer, sites: Sites) -> None:
    before = dict(model.named_modules())
    good = tucker_plan(model, ffn_sites(sites), 0.5).sites
    bad = SitePlan(keep=3, full=24, form="tucker", details={"shape": {"out": [7], "in": [24], "ranks": [3, 3]}})
    with pytest.raises(PlanError, match=r"got out \[7\], expected modes whose product is 24"):
        apply_(model, Plan(sites={**good, "blocks.1.mlp.2": bad}), sites=sites)
    assert dict(model.named_modules()) == before

"""The identity that everything rests on, on a real model: k × k Grams of what flows by give the best product under d ×
d metrics.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights, factorize_site, truncate_site
from comcat.linalg import factorize
from comcat.plan import Plan, SitePlan
from comcat.sites import Site
from comcat.statistics import calibrate

from .conftest import Subject, subject_of
from .zoo import relative_error, run

PATH = "blocks.1.attn"


@pytest.fixture
def vit() -> Subject:
    return subject_of("timm-vit")


def root(metric: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite metric."""
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT


def captured(model: nn.Module, path: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and leaves a module, (pictures, tokens, channels), float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.extend([i[0].detach(), o.detach()]))
    run(model, images)
    handle.remove()
    return seen[0].double(), seen[1].double()


def per_head(model: nn.Module, site: Site) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V (heads, in, width), b_Q, b_V (heads, width) and W_O (heads, width, out), float64."""
    a = site.attention
    q, k, v = (p.weight(model).detach().double().unflatten(0, (a.heads, -1)).mT for p in (a.q, a.k, a.v))
    b_q, b_v = (p.bias_or_none(model).detach().double().view(a.heads, -1) for p in (a.q, a.v))
    return (
        q,
        k,
        v,
        b_q,
        b_v,
        model.get_submodule(a.out).weight.detach().double().unflatten(1, (a.heads, -1)).permute(1, 2, 0),
    )


def attention_weights(model: nn.Module, site: Site, x: Tensor) -> Tensor:
    q, k, _, b_q, _, _ = per_head(model, site)
    x = x[:, None]
    return (site.attention.scale * (x @ q + b_q[:, None]) @ (x @ k).mT).softmax(-1)  # (pictures, heads, tokens, tokens)


def assert_best(product: Tensor, truncated: Tensor, left: Tensor, right: Tensor, rank: int) -> None:
    """The weighted error of a truncation is the smallest there is: the tail of the dense weighted SVD, head by head."""
    least = torch.linalg.svdvals(left @ product @ right)[..., rank:].square().sum(-1)
    error = (left @ (product - truncated) @ right).square().sum((-2, -1))
    assert least.min() > 0
    torch.testing.assert_close(error, least, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_qk_under_activations(vit: Subject, rank: int) -> None:
    model, site = vit.copy(), vit.sites[f"{PATH}:qk"]
    moments = calibrate(model, [vit.images], statistic="activation", sites=vit.sites)
    x, _ = captured(model, PATH, vit.images)
    extended = F.pad(x, (0, 1), value=1.0)  # [x; 1]
    queries = torch.einsum("bti,btj->ij", extended, extended) / x[..., 0].numel()
    centred = x - x.mean(1, keepdim=True)
    keys = torch.einsum("bti,btj->ij", centred, centred) / x[..., 0].numel()
    q, k, _, b_q, _, _ = per_head(model, site)
    product = torch.cat([q, b_q[:, None]], 1) @ k.mT  # (heads, in + 1, in)
    found = factorize(moments.of(site, "a").moment, moments.of(site, "b").moment)
    thin = truncate_site(model, site, found, rank, Weights())
    truncated = torch.cat([thin.q, thin.q_bias[..., None]], -1).mT @ thin.k
    assert_best(product, truncated, root(queries), root(keys), rank)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_vo_under_the_loss(vit: Subject, rank: int) -> None:
    model, site = vit.copy(), vit.sites["blocks.0.attn:vo"]  # the last block's gradients are of the class token alone
    moments = calibrate(model, [vit.images], statistic="loss", sites=vit.sites)
    x, _ = captured(model, site.path, vit.images)
    mixed = attention_weights(model, site, x) @ x[:, None]  # (pictures, heads, tokens, in)
    values = torch.stack([torch.cov(m.flatten(0, 1).mT, correction=0) for m in mixed.transpose(0, 1)])
    _, _, v, _, _, out = per_head(model, site)
    seen: list[Tensor] = []
    model.get_submodule(site.path).register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    labels = torch.multinomial(model(vit.images).detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[
        :, 0
    ]
    F.cross_entropy(model(vit.images.clone().requires_grad_()), labels, reduction="sum").backward()
    gradients = torch.einsum("bti,btj->ij", seen[0].double(), seen[0].double()) / len(vit.images)
    found = factorize(moments.of(site, "a").moment, moments.of(site, "b").moment)
    thin = truncate_site(model, site, found, rank, Weights())
    truncated = thin.v.mT @ thin.out.unflatten(1, (site.heads, -1)).permute(1, 2, 0)
    assert_best(v @ out, truncated, root(values), root(gradients).expand(site.heads, -1, -1), rank)


@pytest.mark.parametrize(("path", "rank"), [("blocks.0.mlp.fc1", 5), ("blocks.0.mlp.fc2", 5)])
def test_linear_layers_under_activations(vit: Subject, path: str, rank: int) -> None:
    """Whichever side is narrower: of the input, weighted by its covariance; of the output, plain principal components
    of it.
    """
    model, site = vit.copy(), vit.sites[path]
    found = calibrate(model, [vit.images], statistic="activation", sites=vit.sites)
    x, _ = captured(model, path, vit.images)
    covariance = torch.cov(x.flatten(0, 1).mT, correction=0)
    weight = model.get_submodule(path).weight.detach().double()
    prior = Weights().grams(model, site)
    thin = truncate_site(model, site, factorize(found.moments[path, "a"].moment[0], prior[1]), rank, found)
    eye = torch.eye(site.out_features, dtype=torch.float64)
    assert_best(weight.mT, (thin.last @ thin.first).mT, root(covariance), eye, rank)


@pytest.mark.parametrize("kind", ["vo", "linear"])
def test_what_truncation_loses_on_average_goes_into_the_bias(vit: Subject, kind: str) -> None:
    model = vit.copy().double()
    site = vit.sites[f"{PATH}:vo" if kind == "vo" else "blocks.1.mlp.fc1"]
    found = calibrate(model, [vit.images], statistic="activation", sites=vit.sites)
    _, before = captured(model, site.path, vit.images)
    apply_(model, Plan(sites={site.name: SitePlan(keep=2, full=site.full_rank)}), found)
    _, after = captured(model, site.path, vit.images)
    assert relative_error(after, before) > 0.05
    assert relative_error(after.mean((0, 1)), before.mean((0, 1))) < 1e-5


def test_the_key_bias_is_nothing(vit: Subject) -> None:
    plan = Plan(sites={n: SitePlan(keep=3, full=s.full_rank) for n, s in vit.sites.only("qk").items()})
    outputs = []
    for model in (vit.copy().double(), vit.copy().double()):
        if outputs:
            for site in vit.sites.only("qk").values():
                site.attention.k.bias_or_none(model).data.add_(torch.randn(24, dtype=torch.float64))
        whole = run(model, vit.images).detach()
        apply_(model, plan)
        outputs.append((whole, run(model, vit.images).detach()))
    for same, changed in zip(*outputs, strict=True):
        assert relative_error(changed, same) < 1e-10


def test_query_and_value_biases_are_exact(vit: Subject) -> None:
    """A truncated attention is attention with the truncated products, b_Q a row of the one and b_V W_O in the output
    bias.
    """
    model = vit.copy().double()
    qk, vo = vit.sites[f"{PATH}:qk"], vit.sites[f"{PATH}:vo"]
    q, k, v, b_q, b_v, out = per_head(model, qk)
    out_bias = model.get_submodule(qk.attention.out).bias.detach()

    def best(product: Tensor, rank: int) -> Tensor:
        u, s, vh = torch.linalg.svd(product, full_matrices=False)
        return u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]

    x, dense = captured(model, PATH, vit.images)
    logits_product = best(torch.cat([q, b_q[:, None]], 1) @ k.mT, 3)
    values_product = best(v @ out, 2)
    extended = F.pad(x, (0, 1), value=1.0)[:, None]
    weights = (qk.attention.scale * extended @ logits_product @ x[:, None].mT).softmax(-1)
    expected = (weights @ x[:, None] @ values_product).sum(1) + out_bias + torch.einsum("hk,hko->o", b_v, out)
    apply_(model, Plan(sites={qk.name: SitePlan(keep=3, full=8), vo.name: SitePlan(keep=2, full=8)}))
    _, got = captured(model, PATH, vit.images)
    assert relative_error(got, dense) > 0.01
    assert relative_error(got, expected) < 1e-10


def test_zero_heads_and_repeated_channels_survive(vit: Subject) -> None:
    """A dead head and one of rank 1 make every Gram singular; full rank still reproduces the output, and rank 1 is
    enough for both.
    """
    model = vit.copy().double()
    for name in (f"{PATH}:qk", f"{PATH}:vo"):
        a = vit.sites[name].attention
        for projection in (a.q, a.v):
            weight = projection.weight(model).data.unflatten(0, (a.heads, -1))
            weight[0], weight[1] = 0, weight[1, :1]
            projection.bias_or_none(model).data.unflatten(0, (a.heads, -1))[:2] = 0
    before = run(model, vit.images)
    for heads in (None, (1, 1, 8)):
        plan = Plan(
            sites={n: SitePlan(keep=8, full=8, details={"head_ranks": heads}) for n in (f"{PATH}:qk", f"{PATH}:vo")}
        )
        handle = apply_(model, plan)
        assert relative_error(run(model, vit.images), before) < 1e-5
        handle.revert()
    found = factorize_site(model, vit.sites[f"{PATH}:qk"], Weights())
    assert (found.singular_values[0] < 1e-4).all() and (found.singular_values[1, 1:] < 1e-4).all()

"""On every model: a soft rank stands exactly for the candidates it mixes, and folding gives the dense model back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights
from comcat.forms.relax import Relaxation, relax_
from comcat.modules.relaxed import RelaxedLinear, SoftRank
from comcat.sites import Site, Sites
from comcat.statistics import calibrate

from .conftest import Subject, subject_of
from .test_apply import low_plan
from .zoo import relative_error, run


def candidates_of(site: Site) -> tuple[int, ...]:
    return tuple(sorted({1, max(1, site.full_rank // 2), site.full_rank}))


def relaxed(model: nn.Module, sites: Sites, statistic=None) -> Relaxation:
    return relax_(model, sites, {n: candidates_of(s) for n, s in sites.items()}, statistic or Weights())


def test_all_channels_change_nothing_and_fold_back(subject: Subject) -> None:
    model = subject.copy().double()
    before = run(model, subject.images)
    relaxation = relaxed(model, subject.sites)
    relaxation.decide({n: s.full_rank for n, s in subject.sites.items()})
    with torch.no_grad():
        assert relative_error(run(model, subject.images), before) < 1e-9
        for _, p in relaxation.weights():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
        trained = run(model, subject.images)
        assert relative_error(trained, before) > 1e-6
        folded = relaxation.fold()
        assert relative_error(run(folded, subject.images), trained) < 1e-9
    assert not any(isinstance(m, RelaxedLinear) for m in folded.modules())
    assert not any(m._forward_hooks for m in folded.modules())


@pytest.mark.parametrize("statistic", ["weights", "activation"])
def test_a_decided_rank_is_what_the_plan_makes_of_the_model(subject: Subject, statistic: str) -> None:
    model, small = subject.copy().double(), subject.copy().double()
    measured = (
        Weights() if statistic == "weights" else calibrate(model, [subject.images.double()], statistic="activation")
    )
    sites = Sites({n: s for n, s in subject.sites.items() if n not in getattr(measured, "unreached", ())})
    plan = low_plan(sites)
    apply_(small, plan, measured, joint_refit=False)
    expected = run(small, subject.images)
    relaxation = relaxed(model, sites, measured)
    relaxation.decide({n: e.keep for n, e in plan.sites.items()})
    with torch.no_grad():
        assert relative_error(run(model, subject.images), expected) < 1e-7


def test_gradients_reach_every_distribution_and_no_frozen_weight(subject: Subject) -> None:
    model = subject.copy()
    reached = {
        n: s
        for n, s in subject.sites.items()
        if n not in calibrate(model, [subject.images], sites=subject.sites).unreached
    }
    relaxation = relaxed(model, Sites(reached))
    for _, p in relaxation.weights():
        p.requires_grad_(False)
    relaxation.sample(1.0, torch.Generator().manual_seed(0))
    run(model, subject.images).square().mean().backward()
    for name, logits in relaxation.logits():
        assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().max() > 0, name
    assert all(p.grad is None for _, p in relaxation.weights())


def test_one_forward_is_the_sum_over_candidates() -> None:
    """Eq. 5: Σ_a p_a f_a at the logits of attention, at the heads' contribution to its output, and at a linear layer's
    output.
    """
    subject = subject_of("timm-vit")
    for name, place in (
        ("blocks.0.attn:qk", "logits"),
        ("blocks.0.attn:vo", "blocks.0.attn"),
        ("blocks.1.mlp.fc1", "blocks.1.mlp.fc1"),
        ("blocks.1.mlp.fc2", "blocks.1.mlp.fc2"),
        ("head", "head"),
    ):
        model = subject.copy().double()
        measured = calibrate(model, [subject.images.double()], statistic="activation")
        sites = Sites({name: subject.sites[name]})
        relaxation = relaxed(model, sites, measured)
        soft = relaxation.soft[name]
        with torch.no_grad():
            soft.logits.copy_(torch.tensor([0.3, -0.5, 0.9])[: len(soft.candidates)])
        relaxation.sample(3.0, torch.Generator().manual_seed(3))
        p = soft.probabilities()
        assert p.max() < 0.95 and abs(p.sum().item() - 1) < 1e-6
        with torch.no_grad():
            mixed = observed(model, subject.images, place)
            apart = torch.zeros_like(mixed)
            for weight, rank in zip(p, soft.candidates, strict=True):
                relaxation.decide({name: rank})
                apart += weight * observed(model, subject.images, place)
        assert relative_error(mixed, apart) < 1e-6, name


def observed(model: nn.Module, images: Tensor, place: str) -> Tensor:
    """What a module puts out, or the logits of the first attention."""
    kept: list[Tensor] = []
    path = "blocks.0.attn.qkv" if place == "logits" else place
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, o: kept.append(o))
    run(model, images)
    handle.remove()
    if place != "logits":
        return kept[0]
    heads = model.get_submodule("blocks.0.attn").num_heads
    q, k, _ = kept[0].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, width) each
    return q @ k.mT


def test_mask_counts_the_candidates_that_keep_a_channel() -> None:
    soft = SoftRank((1, 3), 4)
    with torch.no_grad():
        soft.logits.copy_(torch.tensor([0.25, 0.75]).log())
    assert torch.allclose(soft.mask(), torch.tensor([1.0, 0.75, 0.75, 0.0]))
    soft.rank = 2
    assert soft.mask().tolist() == [1, 1, 0, 0]


def test_a_rank_chosen_low_grows_back() -> None:
    """Training at a low rank touches the channels that stay; those that were cut are still in the dense model
    afterwards.
    """
    subject = subject_of("timm-vit")
    model = subject.copy().double()
    before = run(model, subject.images)
    relaxation = relaxed(model, subject.sites)
    relaxation.decide(dict.fromkeys(subject.sites, 1))
    with torch.no_grad():
        assert relative_error(run(model, subject.images), before) > 0.05
    output = run(model, subject.images)
    output.square().mean().backward()
    cut = [m for m in model.modules() if isinstance(m, RelaxedLinear)]
    assert cut and all(m.kept is not None and m.kept[0].grad is not None and m.kept[0].shape[0] == 1 for m in cut)
    assert all(m.first.weight.grad is None or not m.first.weight.grad.any() for m in cut)
    with torch.no_grad():
        cut[0].kept[0].add_(1)  # what is learned is learned by the master weights
        assert cut[0].kept[0].equal(cut[0].first.weight[:1])
        cut[0].kept[0].sub_(1)
    with torch.no_grad():
        assert relative_error(run(relaxation.fold(), subject.images), before) < 1e-9


def test_structure_alone_takes_a_saved_state() -> None:
    subject = subject_of("timm-beit")
    model, twin = subject.copy(), subject.copy()
    measured = calibrate(model, [subject.images], statistic="activation")
    candidates = {n: candidates_of(s) for n, s in subject.sites.items()}
    first = relax_(model, subject.sites, candidates, measured)
    second = relax_(twin, subject.sites, candidates, None)
    twin.load_state_dict(model.state_dict())
    for name, center in second.centers.items():
        center.copy_(first.centers[name])
    ranks = {n: c[1] if len(c) > 1 else c[0] for n, c in candidates.items()}
    first.decide(ranks), second.decide(ranks)
    assert run(twin, subject.images).equal(run(model, subject.images))

"""On every model: open gates change nothing, any gates fold into the weights, and what is closed can be cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.factors import Weights, decompose_site
from comcat.forms.basis import change_basis
from comcat.forms.gates import Gates, fold_, gate_, selection
from comcat.hosts import find_sites
from comcat.modules.gates import Gate
from comcat.plan import Plan, SitePlan
from comcat.sites import HiddenSite, ProductSite, Sites
from comcat.statistics import calibrate

from .conftest import Subject, subject_of
from .zoo import relative_error, run


def gated_sites(model: nn.Module) -> Sites:
    return find_sites(model).only("qk", "vo", "units")


def rests_of(sites: Sites, seed: int = 3) -> dict[str, Tensor]:
    """Somewhere to rest that nothing makes trivially right."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {n: s.full * (1 if isinstance(s, HiddenSite) else s.heads) for n, s in sites.items()}  # type: ignore[union-attr]
    return {n: torch.randn(size, generator=generator, dtype=torch.float64) for n, size in sizes.items()}


def set_gates(gates: Gates, keep: float | None, seed: int = 5) -> dict[str, Tensor]:
    """Random gates, of which a share stays open in every head and the others are closed; the order of the channels."""
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for name, gate in gates.items():
        g = gate.opening
        orders[name] = torch.rand(g.shape, generator=generator).argsort(1)
        with torch.no_grad():
            g.copy_(0.5 + torch.rand(g.shape, generator=generator, dtype=g.dtype))
            if keep is not None:
                g.scatter_(1, orders[name][:, kept(g.shape[1], keep) :], 0.0)
    return orders


def kept(channels: int, share: float) -> int:
    return max(1, int(channels * share))


def test_gates_fold_and_what_is_closed_can_be_cut(subject: Subject) -> None:
    plain = subject.copy().double()
    sites = gated_sites(plain)
    if not len(sites):
        pytest.skip("nothing here has channels of its own")
    before = run(plain, subject.images)
    gated = copy.deepcopy(plain)
    gates = gate_(gated, sites, rests_of(sites))
    with torch.no_grad():
        assert relative_error(run(gated, subject.images), before) < 1e-9
        orders = set_gates(gates, keep=0.6)
        shut = run(gated, subject.images)
        assert relative_error(shut, before) > 1e-4
        fold_(plain, sites, gates)
        assert relative_error(run(plain, subject.images), shut) < 1e-9
        entries = {
            n: SitePlan(form="units" if s.kind == "units" else "product", keep=kept(s.full, 0.6), full=s.full)
            for n, s in sites.items()
        }
        chosen = {n: selection(s, orders[n]) for n, s in sites.items()}
        apply_(plain, Plan(sites=entries), Weights(), sites=sites, factorizations=chosen)
        assert relative_error(run(plain, subject.images), shut) < 1e-9
    gates.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gated.modules())
    with torch.no_grad():
        assert relative_error(run(gated, subject.images), before) < 1e-9


def test_a_picture_is_told_from_another(subject: Subject) -> None:
    """The gradient of the gates of one picture among others is that of the picture alone, windows or not."""
    model = subject.copy().double().requires_grad_(False)
    sites = gated_sites(model)
    if not len(sites):
        pytest.skip("nothing here has channels of its own")
    gates = gate_(model, sites)

    def gradients(images: Tensor) -> dict[str, Tensor]:
        for gate in gates.values():
            gate.watch(len(images))
        run(model, images).square().sum().backward()
        return {n: g.watched.grad for n, g in gates.items() if g.watched is not None and g.watched.grad is not None}

    together, alone = gradients(subject.images), gradients(subject.images[:1])
    for name, found in alone.items():
        assert torch.allclose(together[name][:1], found, rtol=1e-6, atol=1e-9 * float(found.abs().max())), name


@pytest.mark.parametrize("statistic", ["weights", "activation"])
def test_in_the_basis_of_the_factorisation_closing_is_truncating(statistic: str) -> None:
    """So the closed form is what gates come to that close without anything being learned."""
    subject = subject_of("timm-vit")
    model, small = subject.copy().double(), subject.copy().double()
    sites = find_sites(model).only("qk", "vo")
    measured = (
        Weights() if statistic == "weights" else calibrate(model, [subject.images.double()], statistic="activation")
    )
    plan = Plan(sites={n: SitePlan(keep=max(1, s.full // 2), full=s.full) for n, s in sites.items()})
    apply_(small, plan, measured, sites=sites, joint_refit=False)
    rests = {}
    for name, site in sites.items():
        assert isinstance(site, ProductSite)
        rests[name] = change_basis(model, site, decompose_site(model, site, measured), measured.mean(site))  # type: ignore[arg-type]
    gates = gate_(model, sites, rests)
    with torch.no_grad():
        assert relative_error(run(model, subject.images), subject.output.double()) < 1e-4
        for name, gate in gates.items():
            gate.opening[:, plan.sites[name].keep :] = 0
        assert relative_error(run(model, subject.images), run(small, subject.images)) < 1e-9


def test_without_a_bias_to_take_it_up_channels_rest_at_zero() -> None:
    model = subject_of("timm-vit").copy()
    down = next(s.down for s in gated_sites(model).values() if isinstance(s, HiddenSite))
    model.get_submodule(down).bias = None
    sites = find_sites(model).only("units")
    gates = gate_(model, sites, rests_of(sites))
    assert [gate.rest is None for gate in gates.values()].count(True) == 1


def test_a_gate_computes_in_the_type_of_what_flows() -> None:
    gate = Gate(2, 3, rest=torch.ones(6))
    assert gate(torch.ones(4, 5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16

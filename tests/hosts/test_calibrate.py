"""Calibration on every model leaves no trace, and what it records is what a naive computation gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat import compress, count_parameters
from comcat.apply import apply_
from comcat.errors import ModelError, NumericsError
from comcat.hosts import find_sites
from comcat.measure import is_classifier
from comcat.sites import Site
from comcat.statistics import calibrate

from ..models import tiny_vit
from .conftest import Subject, subject_of
from .test_apply import full_plan, low_plan
from .zoo import relative_error, run

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(model: nn.Module) -> list[int]:
    return [len(getattr(m, h)) for m in model.modules() for h in HOOKS]


@pytest.mark.parametrize("statistic", ["activation", "loss"])
def test_calibration_leaves_no_trace_and_its_plan_applies(subject: Subject, statistic: str) -> None:
    model = subject.copy()
    next(model.parameters()).requires_grad_(False)
    model.train()
    wanted = [p.requires_grad for p in model.parameters()]
    state, hooked = copy.deepcopy(model.state_dict()), hooks(model)
    modules = dict(model.named_modules())
    found = calibrate(model, [subject.case.images(2, seed=s) for s in (1, 2)], statistic=statistic, sites=subject.sites)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == hooked
    assert all(model.state_dict()[n].equal(t) for n, t in state.items())
    assert dict(model.named_modules()) == modules
    model.eval()
    assert run(model, subject.images).equal(subject.output)

    assert found.pictures == 4 and found.unreached == ()
    for site in subject.sites.values():
        for g in found.grams(model, site):
            assert g.isfinite().all() and g.diagonal(dim1=-2, dim2=-1).sum() > 0
            assert torch.linalg.eigvalsh(g).min() >= -1e-6 * g.abs().max()
    with torch.no_grad():
        handle = apply_(model, full_plan(subject.sites), found, joint_refit=False)
        assert relative_error(run(model, subject.images), subject.output) < 1e-3
        handle.revert()
        apply_(model, full_plan(subject.sites), found)  # the ridge of the refit shows a little
        assert relative_error(run(model, subject.images), subject.output) < 1e-2
        apply_(copied := subject.copy(), low_plan(subject.sites), found)
        assert run(copied, subject.images).isfinite().all()


def _sampled_labels(model: nn.Module, batches: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [torch.multinomial(model(b).softmax(-1), 1, generator=generator)[:, 0] for b in batches]


class _Naive:
    """The same model with attention written out, so that autograd tells the gradient at every tensor of interest."""

    def __init__(self, model: nn.Module, site: Site, bias: Callable[[nn.Module], Tensor | None]) -> None:
        self.model, self.seen = model, {}
        a = site.attention
        module = model.get_submodule(site.path)

        def naive(x: Tensor, mask: Tensor | None = None, **_: object) -> Tensor:
            q, k, v = (F.linear(x, p.weight(model), p.bias_or_none(model)) for p in (a.q, a.k, a.v))
            k.retain_grad()
            split = [t.unflatten(-1, (a.heads, -1)).transpose(1, 2) for t in (q, k, v)]
            logits = a.scale * split[0] @ split[1].mT
            own = bias(module)
            logits = logits if own is None else logits + own
            if mask is not None:
                windows = len(mask)
                logits = (logits.unflatten(0, (-1, windows)) + mask[None, :, None]).flatten(0, 1)
            o = (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)
            o.retain_grad()
            self.seen = {"q": q, "k": k, "o": o}
            return module.proj(o)

        module.forward = naive

    def pictures(self, batches: list[Tensor], labels: list[Tensor]) -> list[dict[str, Tensor]]:
        """For each picture: q, k, o and the gradients of its loss at k and o, (softmax sets, rows, heads · width)."""
        found = []
        for batch, targets in zip(batches, labels, strict=True):
            for image, target in zip(batch, targets, strict=True):
                F.cross_entropy(self.model(image[None]), target[None], reduction="sum").backward()
                found.append(
                    {
                        **{n: t.detach() for n, t in self.seen.items()},
                        "gk": self.seen["k"].grad,
                        "go": self.seen["o"].grad,
                    }
                )
        return found


def _outer(t: Tensor, heads: int) -> Tensor:
    """Σ of outer products over all rows, head by head: (heads, width, width)."""
    t = t.flatten(0, -2).unflatten(-1, (heads, -1)).double()
    return torch.einsum("rhi,rhj->hij", t, t)


CASES = [
    ("timm-vit", "blocks.1.attn", lambda m: None),
    ("timm-beit", "blocks.1.attn", lambda m: m._get_rel_pos_bias()),
    ("timm-swin", "layers.0.blocks.1.attn", lambda m: m._get_rel_pos_bias()),
]


@pytest.mark.parametrize(("name", "path", "bias"), CASES, ids=["vit", "beit-biases-apart", "swin-shifted-windows"])
def test_moments_of_products_are_those_of_a_naive_computation(name: str, path: str, bias: Callable) -> None:
    subject = subject_of(name)
    model = subject.copy()
    batches = [subject.case.images(2, seed=s) for s in (1, 2)]
    qk, vo = subject.sites[f"{path}:qk"], subject.sites[f"{path}:vo"]
    activation = calibrate(model, batches, statistic="activation", sites=subject.sites)
    loss = calibrate(model, batches, statistic="loss", sites=subject.sites, seed=3)
    pictures = _Naive(model, qk, bias).pictures(batches, _sampled_labels(subject.original, batches, 3))
    heads, rows = qk.heads, pictures[0]["q"].shape[:-1].numel()
    assert rows == (256 if name == "timm-swin" else 17)

    def mean(f: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return torch.stack([f(p) for p in pictures]).mean(0)

    queries = mean(lambda p: _outer(p["q"], heads) / rows)
    keys = mean(lambda p: _outer(p["k"] - p["k"].mean(1, keepdim=True), heads) / rows)  # centred in each softmax set
    outputs = torch.cat([p["o"].flatten(0, 1) for p in pictures]).double()
    joint = torch.cov(outputs.mT, correction=0)[None]
    by_head = torch.stack(
        [joint[0, i : i + vo.full_rank, i : i + vo.full_rank] for i in range(0, heads * vo.full_rank, vo.full_rank)]
    )
    table = [
        (activation, qk, "a", queries),
        (activation, qk, "b", keys),
        (activation, vo, "a", by_head),
        (activation, vo, "joint", joint),
        (loss, qk, "a", mean(lambda p: _outer(p["gk"], heads))),
        (loss, qk, "b", keys),
        (loss, vo, "a", by_head),
        (loss, vo, "b", mean(lambda p: _outer(p["go"], heads))),
    ]
    for moments, site, side, value in table:
        recorded = moments.moments[site.name, side] if side == "joint" else moments.of(site, side)
        assert relative_error(recorded.moment, value) < 1e-4, (site.name, side)


def test_moments_of_linear_layers_are_those_of_a_naive_computation() -> None:
    subject = subject_of("timm-vit")
    model = subject.copy()
    batches = [subject.case.images(2, seed=s) for s in (1, 2)]
    found = calibrate(model, batches, statistic="loss", sites=subject.sites, seed=3)
    seen: dict[str, Tensor] = {}
    wide, narrow = (
        subject.sites["blocks.0.mlp.fc1"],
        subject.sites["blocks.0.mlp.fc2"],
    )  # more outputs than inputs, and fewer

    def keep_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        seen["wide"] = inputs[0].clone().requires_grad_()
        seen["wide"].retain_grad()
        return (seen["wide"],)

    def keep_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen["narrow"], seen["narrow input"] = output, inputs[0]

    model.get_submodule(wide.path).register_forward_pre_hook(keep_input)
    model.get_submodule(narrow.path).register_forward_hook(keep_output)
    rows: dict[str, list[Tensor]] = {"wide": [], "narrow": [], "narrow input": []}
    gradients: dict[str, list[Tensor]] = {"wide": [], "narrow": []}
    for batch, targets in zip(batches, _sampled_labels(subject.original, batches, 3), strict=True):
        for image, target in zip(batch, targets, strict=True):
            F.cross_entropy(model(image[None]), target[None]).backward()
            for name, value in seen.items():
                rows[name].append(value.detach()[0].double())
            for name in gradients:
                gradients[name].append(_outer(seen[name].grad, 1))
    for name, site, inputs in (("wide", wide, "wide"), ("narrow", narrow, "narrow input")):
        covariance = torch.cov(torch.cat(rows[name]).mT, correction=0)
        assert relative_error(found.moments[site.name, "a"].moment[0], covariance) < 1e-4
        assert relative_error(found.moments[site.name, "b"].moment, torch.stack(gradients[name]).mean(0)) < 1e-4
        mean = found.mean(site)
        assert mean is not None and relative_error(mean, torch.cat(rows[inputs]).mean(0)) < 1e-4


class Wrapped(nn.Module):
    """A classifier with a criterion beside it, as training code has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_a_wrapper_does_not_change_the_method() -> None:
    """What the output is, is decided by what the forward returns, not by how many children there are."""
    subject = subject_of("timm-vit")
    bare, wrapped = (
        calibrate(m, [subject.images], sites=find_sites(m)) for m in (subject.copy(), Wrapped(subject.copy()))
    )
    for (site, side), moments in bare.moments.items():
        assert torch.equal(moments.outer, wrapped.moments[f"model.{site}", side].outer), (site, side)
    assert is_classifier(Wrapped(subject.copy()))


class Decoded(nn.Module):
    """A backbone with a dense decoder of so many channels."""

    def __init__(self, backbone: nn.Module, channels: int, bias: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.decode = backbone, nn.Conv2d(24, channels, 1)
        self.num_classes, self.bias = channels if channels > 1 else 0, bias

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)[:, 1:]
        return self.decode(tokens.mT.unflatten(2, (4, 4))).repeat_interleave(2, -1) + self.bias


@pytest.mark.parametrize(("channels", "bias"), [(1, 0.0), (1, 50.0), (5, 0.0)])
def test_dense_outputs_take_a_label_for_every_pixel(channels: int, bias: float) -> None:
    """Drawn from the pixels' own distribution: Bernoulli for a mask, classes for a class map, noise for a depth map."""
    subject = subject_of("timm-dinov2")
    model = Decoded(subject.copy(), channels, bias).eval()
    images = subject.case.images(6)
    found = []
    for seed in range(3):
        seen = calibrate(model, [images], seed=seed, sites=find_sites(model).only("vo"))
        found.append(float(seen.moments["backbone.blocks.1.attn:vo", "b"].moment.diagonal(dim1=-2, dim2=-1).sum()))
    assert min(found) > 0 and max(found) < 3 * min(found)
    with torch.no_grad():
        model.decode.weight[:] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        calibrate(model, [images], sites=find_sites(model).only("vo"))


@pytest.mark.parametrize("forms", ["ranks", "units", "ranks,units"])
def test_a_head_of_zeros_is_refused_since_nothing_would_cost_anything(forms: str) -> None:
    """It says the same whatever the blocks compute, so the choice would cut them all to nothing."""
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    shown = [torch.randn(4, 3, 32, 32)]
    with pytest.raises(ModelError, match=r"no gradient reaches any layer: .*head of zeros.*'activation'"):
        compress(model, shown, reduce=0.4, forms=forms)
    small = compress(model, shown, reduce=0.4, forms=forms, statistic="activation")
    assert count_parameters(small) > 0.55 * count_parameters(model)


def test_activation_needs_nothing_of_the_output() -> None:
    """A list of feature maps, a dictionary without logits: what flows in is what counts."""
    subject = subject_of("timm-vit")

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = subject.copy()

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"maps": [self.vit.forward_features(x)], "text": "nothing"}

    for statistic in ("activation", "loss"):
        seen = calibrate(Features(), [subject.images], statistic=statistic)
        assert not seen.unreached or set(seen.unreached) == {"vit.head"}


def test_batches_that_are_mappings_pass_whole() -> None:
    """What a forward takes by name goes along, cut to as many pictures."""
    subject, seen = subject_of("timm-vit"), []

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = subject.copy()

        def forward(self, pixel_values: Tensor, scale: Tensor, note: str = "") -> Tensor:
            seen.append((len(pixel_values), len(scale), note))
            return self.vit(pixel_values) * scale[:, None]

    batch = {"pixel_values": subject.case.images(4), "scale": torch.ones(4), "note": "kept", "labels": torch.zeros(4)}
    calibrate(Two(), [batch], limit=3)
    assert seen == [(3, 3, "kept")]

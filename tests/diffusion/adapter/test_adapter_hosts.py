"""What every host of adapters owes, and that nothing else has to be known of one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat import diffusion
from comcat.diffusion.adapter import hosts
from comcat.diffusion.adapter.hosts import CHANNELS, AdaptableAttention, AdapterHost, Found, Widened, find_in, host_of
from comcat.modules.adapters import ExtraChannels, LowRankTerms

from .. import tiny
from ..denoisers import CASES, random


class ToyAttention(nn.Module):
    """Attention of a library that nobody has heard of."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.head_width, self.factor = heads, width // heads, (width // heads) ** -0.5
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))
        self.mounted = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.heads, self.head_width)) for w in (self.wq, self.wk, self.wv))
        if self.mounted:
            channels = getattr(self, CHANNELS)
            o, extra = channels.attend(q, k, v, tuple(channels.read(s, x) for s in "qkv"), scale=self.factor)
            return channels.write(self.wo(o.flatten(2)), extra)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, scale=self.factor).transpose(1, 2).flatten(2))


class ToyHost:
    name = "toy"

    def resembles(self, model: nn.Module) -> bool:
        return any(isinstance(m, ToyAttention) for m in model.modules())

    def find(self, model: nn.Module) -> Found:
        attention = ((path, m) for path, m in model.named_modules() if isinstance(m, ToyAttention))
        names = ("q_up", "k_down", "v_down", "out_up")
        return Found(
            [
                AdaptableAttention(
                    p, "text", dict.fromkeys(names, m.wq.in_features), m.heads, m.wq.in_features // m.heads
                )
                for p, m in attention
            ],
            [],
        )

    def projections(self, attention: Any) -> dict[str, str]:
        return {"q_up": "wq", "k_down": "wk", "v_down": "wv", "out_up": "wo"}

    def frozen(self, attention: Any, path: str) -> Any:
        return attention.get_submodule(path)

    def mount(self, attention: Any) -> None:
        attention.mounted = True

    def refresh(self, attention: Any) -> None: ...

    def unmount(self, attention: Any) -> None:
        attention.mounted = False

    def why_not(self, attention: Any) -> str | None:
        return None

    def reclaim(self, attention: Any) -> str | None:
        return None

    def copied(self, attention: Any) -> str | None:
        return None

    def shared(self, attention: Any) -> str | None:
        return None

    def sweep(self, model: nn.Module) -> None: ...

    def between(self, attention: Any) -> str | None:
        return None

    def widened(self, attention: Any, width: int) -> Widened:
        return Widened(1.0, {"head_width": width})


class ToyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(ToyAttention(), nn.Tanh(), ToyAttention())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline whose text encoder is of the unknown library."""
    known: tuple[AdapterHost, ...] = (*hosts.HOSTS, ToyHost())
    monkeypatch.setattr(hosts, "HOSTS", known)
    torch.manual_seed(0)
    return SimpleNamespace(unet=CASES["sd1"].model(torch.float64), text_encoder=ToyEncoder().double(), config={})


@torch.no_grad()
def test_a_host_is_all_that_an_unknown_library_needs(toy: Any, tmp_path: Path) -> None:
    """Attaching, saving, loading, scaling, fusing and merging ask the host and nothing else."""
    x = random(2, 5, 8).double()
    before = toy.text_encoder(x)
    adapter = diffusion.attach(toy, name="dog", text_encoder=True, init="random", dtype=torch.float64)
    assert {p for p in adapter.modules if p.startswith("text")} == {"text_encoder.layers.0", "text_encoder.layers.2"}
    attached = toy.text_encoder(x)
    assert not torch.allclose(attached, before)
    file = diffusion.save(toy, tmp_path / "dog.safetensors", name="dog", dtype=torch.float64)
    diffusion.fuse(toy)
    assert torch.allclose(toy.text_encoder(x), attached)
    diffusion.unfuse(toy)
    assert toy.text_encoder(x).equal(attached)
    diffusion.unload(toy)
    assert toy.text_encoder(x).equal(before)
    diffusion.load(toy, file, name="dog", scale=0.0)
    assert torch.allclose(toy.text_encoder(x), before)
    diffusion.set_scale(toy, dog=1.0)
    assert torch.allclose(toy.text_encoder(x), attached)
    assert any(site.startswith("text_encoder.layers.0:") for site in diffusion.merge(toy, "dog").errors)
    assert diffusion.adapters(toy) == {}


def attention_of(kind: str, folder: Path) -> tuple[nn.Module, AdapterHost]:
    model = tiny.stable_diffusion(folder).text_encoder if kind == "clip" else CASES[kind].model()
    host = host_of(model)
    assert host is not None
    return model, host


@pytest.mark.parametrize("kind", ["clip", "sd1", "sd3", "flux"])
def test_mounting_tells_the_same_anatomy_and_is_taken_back_whole(kind: str, tmp_path: Path) -> None:
    model, host = attention_of(kind, tmp_path)
    found, _ = find_in(model)
    kept = {name: id(module) for name, module in model.named_modules()}
    for one in found:
        attention: Any = model.get_submodule(one.path)
        paths = host.projections(attention)
        assert set(paths) >= set(one.widths)
        channels = ExtraChannels()
        channels.add("dog", LowRankTerms(one.widths, one.heads, 2))
        attention.add_module(CHANNELS, channels)
        before = {path: host.frozen(attention, path) for path in paths.values()}
        host.mount(attention)
        host.refresh(attention)
        assert host.projections(attention) == paths
        assert host.why_not(attention) is None
        assert all(host.frozen(attention, path) is module for path, module in before.items())
    assert find_in(model).adaptable == found
    for one in found:
        host.unmount(model.get_submodule(one.path))
        delattr(model.get_submodule(one.path), CHANNELS)
    assert {name: id(module) for name, module in model.named_modules()} == kept


@pytest.mark.parametrize("kind", ["clip", "sd1", "sd3", "flux"])
def test_a_host_keeps_nothing_outside_the_attention(kind: str, tmp_path: Path) -> None:
    """Copies and pickles of an adapted attention stand alone."""
    model, host = attention_of(kind, tmp_path)
    one = find_in(model).adaptable[0]
    attention: Any = model.get_submodule(one.path)
    channels = ExtraChannels()
    channels.add("dog", LowRankTerms(one.widths, one.heads, 2))
    attention.add_module(CHANNELS, channels)
    host.mount(attention)
    host.refresh(attention)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert getattr(copied, CHANNELS) is not channels and host.why_not(copied) is None
        host.unmount(copied)
    assert getattr(attention, CHANNELS) is channels

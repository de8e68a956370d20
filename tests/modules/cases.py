"""Every module of ours, and what each is called with. A new module is tested by one line in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from comcat.apply import apply_
from comcat.diffusion.adapter.hosts import CHANNELS, find_in, host_of
from comcat.hosts import find_sites
from comcat.modules.adapters import ExtraChannels, LowRankTerms
from comcat.modules.crossed import LowRankCrossAttention
from comcat.modules.lowrank import ConcatLinear, LowRankAttention, LowRankLinear, NarrowHeads
from comcat.modules.maps import OverMaps
from comcat.modules.padded import PaddedRows
from comcat.modules.relaxed import RelaxedLinear, SoftRank
from comcat.modules.tensor import TensorTrainLinear, TuckerLinear
from comcat.plan import Plan, SitePlan

WIDTH = 12


class Holder(nn.Module):
    """A model around one module of ours, ``inner``, as a host has it: PEFT and quantisation exchange children."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class MaskedHolder(Holder):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(self.norm(x), mask)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One module of ours.

    Attributes:
        build: makes the module, anew at every call. inputs: makes its arguments, (2, tokens, 12) and a mask if any.
        layers: names of its linear layers, by which PEFT finds them. unasked: names of modules of the host that the
            host itself reads and never calls. steady: False where it is made for the search alone, which no other
            library meets. traced: False where torch.fx and TorchScript do not read it: our tokens refuse that with the
            reason, and attention that carries adapters is not read by them without an adapter either. often: names of
            modules that are called several times in one forward.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = field(default=lambda: (torch.randn(2, 5, WIDTH),))
    layers: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()
    steady: bool = True
    traced: bool = True
    often: tuple[str, ...] = ()

    def model(self) -> Holder:
        """The module in a model, the same at every call, every parameter random, in evaluation mode."""
        torch.manual_seed(0)
        model = (MaskedHolder if len(self.inputs()) > 1 else Holder)(self.build()).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
        return model

    def arguments(self) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return self.inputs()


def attention(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: LowRankAttention(WIDTH, WIDTH, 3, **{"rank_qk": 2, "rank_vo": 3, "scale": 0.5, **settings})


def of_timm(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    """One of timm's attention modules at low rank: what ``apply_`` puts in its place."""

    def build() -> nn.Module:
        import importlib

        host = getattr(importlib.import_module(f"timm.models.{module}"), name)
        model = nn.Sequential(host(WIDTH, num_heads=3, qkv_bias=True, **settings), nn.Linear(WIDTH, WIDTH))
        sites = find_sites(model)
        ranks = {"0:qk": 2, "0:vo": 3}
        plan = {n: SitePlan(keep=r, full=sites[n].full) for n, r in ranks.items() if n in sites}
        apply_(model, Plan(sites=plan))
        return model[0]

    return build


class Mapped(nn.Module):
    """A module of maps, called on tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)[..., None]).flatten(2).transpose(1, 2)


class Apart(nn.Module):
    """An attention of three inputs, called on one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.attention = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:, 1:], x[:, 1:])[0]


def crossed(**settings: Any) -> Callable[[], nn.Module]:
    ranks = {"rank_qk": 2, "rank_vo": 3, "scale": 0.5}
    return lambda: Apart(LowRankCrossAttention((WIDTH, WIDTH, WIDTH), WIDTH, 3, **{**ranks, **settings}))


def multihead(**settings: Any) -> Callable[[], nn.Module]:
    """``torch.nn.MultiheadAttention`` at low rank: what ``apply_`` puts in its place."""

    def build() -> nn.Module:
        model = Apart(nn.MultiheadAttention(WIDTH, 3, batch_first=True, **settings))
        apply_(model, Plan(sites={n: SitePlan(keep=2, full=4) for n in ("attention:qk", "attention:vo")}))
        return model

    return build


def fewer_units() -> nn.Module:
    """A feed-forward with fewer hidden units: plain linear layers of another width."""
    layers = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
    model = nn.Sequential(layers, nn.Linear(WIDTH, WIDTH))
    apply_(model, Plan(sites={"0:units": SitePlan(form="units", keep=7, full=20)}))
    return model[0]


def reduced(name: str, form: str, keep: int, inputs: Callable[[], tuple[Tensor, ...]], **more: Any) -> Case:
    """A block of timm that runs on fewer of eight tokens, which follow a class token."""

    def build() -> nn.Module:
        from timm.models.vision_transformer import Block

        told = {"prefix": 1, "channels": WIDTH, "stream": "x", **more}
        model = nn.Sequential(Block(WIDTH, num_heads=3, mlp_ratio=2, qkv_bias=True))
        apply_(model, Plan(sites={"0:tokens": SitePlan(form=form, keep=keep, full=8, details={"tokens": told})}))
        return model[0]

    return Case(name=name, build=build, inputs=inputs, layers=("qkv", "proj", "fc1", "fc2"), traced=False)


def pairs() -> tuple[Tensor, ...]:
    """A class token, and eight tokens of which two and two are almost equal, so that no rounding changes the pairs."""
    tokens = torch.randn(2, 4, WIDTH).repeat_interleave(2, 1)
    return (torch.cat((torch.randn(2, 1, WIDTH), tokens + 0.03 * torch.randn(2, 8, WIDTH)), 1),)


class First(nn.Module):
    """A module that returns several things, of which the first alone is wanted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.attention = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)[0]


def adapted(attention: Callable[[], nn.Module], names: tuple[str, ...] = ("dog",)) -> nn.Module:
    """An attention that carries low-rank terms, as ``comcat.diffusion.attach`` leaves it."""
    model = nn.Sequential(attention())
    host: Any = host_of(model)
    (found,) = find_in(model).adaptable
    inner, channels = model.get_submodule(found.path), ExtraChannels()
    for rank, name in enumerate(names, 2):
        channels.add(name, LowRankTerms(found.widths, found.heads, rank))
    inner.add_module(CHANNELS, channels)
    host.mount(inner)
    host.refresh(inner)
    return model[0]


def of_diffusers() -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(query_dim=WIDTH, heads=3, dim_head=4, bias=True)


def of_clip() -> nn.Module:
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPAttention

    return First(CLIPAttention(CLIPTextConfig(hidden_size=WIDTH, num_attention_heads=3, attn_implementation="sdpa")))


def rel_pos(kind: str) -> Callable[[int], nn.Module]:
    def build(num_heads: int, **factory: Any) -> nn.Module:
        from timm import layers

        return getattr(layers, kind)(window_size=(2, 3), num_heads=num_heads, **factory)

    return build


def tokens(count: int, *more: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, *more, count, WIDTH),)


def masked(count: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, count, WIDTH), torch.randn(*shape))


def tucker(out: list[int], into: list[int], ranks: list[int]) -> Callable[[], nn.Module]:
    return lambda: TuckerLinear(WIDTH, 8, {"out": out, "in": into, "ranks": ranks})


CROSSED = ("q", "v", "proj")
QKV, HEADS = ("qkv", "proj"), ("linear",)
CASES = [
    Case(name="linear", build=lambda: LowRankLinear(WIDTH, 8, 3), layers=("first", "last")),
    Case(name="linear-no-bias", build=lambda: LowRankLinear(WIDTH, 8, 3, bias=False), layers=("first", "last")),
    Case(name="attention", build=attention(), layers=QKV),
    Case(name="attention-no-biases", build=attention(qkv_bias=False, out_bias=False), layers=QKV),
    Case(name="attention-wide-queries", build=attention(rank_qk=4), layers=QKV),
    Case(name="attention-equal-ranks", build=attention(rank_qk=3), layers=QKV),
    Case(name="attention-unpadded", build=attention(pad=False), layers=QKV),
    Case(name="attention-norm", build=lambda: attention(norm=nn.LayerNorm(9))(), layers=QKV),
    Case(name="attention-gate", build=lambda: attention(gate=nn.Linear(WIDTH, 9))(), layers=(*QKV, "gate")),
    Case(name="attention-dropout", build=attention(attention_dropout=0.5, projection_dropout=0.5), layers=QKV),
    Case(name="attention-mask", build=attention(), inputs=masked(5, 5, 5), layers=QKV),
    Case(name="attention-boolean-mask", build=attention(), layers=QKV,
         inputs=lambda: (torch.randn(2, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).tril())),
    Case(name="attention-on-a-grid", build=attention(), inputs=tokens(3, 2), layers=QKV),
    Case(name="beit", build=of_timm("beit", "Attention", window_size=(2, 3)), inputs=tokens(7), layers=QKV),
    Case(name="beit-shared", build=of_timm("beit", "Attention", window_size=(2, 3)), inputs=masked(7, 1, 3, 7, 7),
        layers=QKV),
    Case(name="window", build=of_timm("swin_transformer", "WindowAttention", window_size=(2, 3)), inputs=tokens(6),
        layers=QKV),
    Case(name="window-shifted", build=of_timm("swin_transformer", "WindowAttention", window_size=(2, 3)),
        inputs=masked(6, 2, 6, 6), layers=QKV),
    Case(name="relative-bias", build=of_timm("vision_transformer_relpos", "RelPosAttention",
        rel_pos_cls=rel_pos("RelPosBias")), inputs=tokens(6), layers=QKV, unasked=("rel_pos",)),
    Case(name="relative-mlp", build=of_timm("vision_transformer_relpos", "RelPosAttention",
        rel_pos_cls=rel_pos("RelPosMlp")), inputs=tokens(6), layers=QKV),
    Case(name="relative-shared", build=of_timm("vision_transformer_relpos", "RelPosAttention"),
        inputs=masked(6, 1, 3, 6, 6), layers=QKV),
    Case(name="padded-heads", build=lambda: PaddedRows(WIDTH, ((3, 2, 4),), bias=True), layers=HEADS),
    Case(name="narrow-heads", build=lambda: NarrowHeads(3, 2, 4, 8), layers=HEADS),
    Case(name="padded-rows", build=lambda: PaddedRows(WIDTH, ((1, 8, 8), (3, 2, 4)), bias=True), layers=HEADS),
    Case(name="padded-rows-interleaved",
        build=lambda: PaddedRows(WIDTH, ((3, 1, 2), (3, 2, 2)), interleaved=True), layers=HEADS),
    Case(name="over-maps", build=lambda: Mapped(OverMaps(LowRankLinear(WIDTH, 8, 3))), layers=("first", "last")),
    Case(name="crossed", build=crossed(), layers=CROSSED),
    Case(name="crossed-more-keys", build=crossed(extra=True, zero=True, biases=(True,) * 4), layers=CROSSED),
    Case(name="multihead", build=multihead(), layers=CROSSED),
    Case(name="multihead-more-keys", build=multihead(add_bias_kv=True, add_zero_attn=True), layers=CROSSED),
    Case(name="concat", build=lambda: ConcatLinear([LowRankLinear(WIDTH, 4, 2), nn.Linear(WIDTH, 3, bias=False)]),
        layers=("first", "last")),
    Case(name="units", build=fewer_units, layers=("0", "2")),
    reduced("tokens-alike", "similar", 4, pairs, mask="attn_mask", norm="norm1"),
    reduced("tokens-alike-unweighted", "similar", 4, pairs),
    reduced("tokens-alike-replaced", "similar", 4, pairs, norm="norm1", residual=False),
    reduced("tokens-windows", "grid", 4, tokens(9), grid=[2, 4], window=[1, 2]),
    reduced("tokens-windows-odd", "grid", 3, tokens(9), grid=[1, 8], window=[1, 3]),
    reduced("tokens-chosen", "drop", 6, tokens(9), query=["attn.qkv", 0, 12], key=["attn.qkv", 12, 24], heads=3,
            scale=0.5, norm="norm1"),
    Case(name="adapter", build=lambda: adapted(of_diffusers), layers=("to_q", "to_k", "to_v"), traced=False,
        often=("terms.0",)),
    Case(name="adapters-two", build=lambda: adapted(of_diffusers, ("dog", "cat")), layers=("to_q", "to_k", "to_v"),
        traced=False, often=("terms.0", "terms.1")),
    Case(name="adapter-of-a-text-encoder", build=lambda: adapted(of_clip), layers=("base",), traced=False,
        often=("terms.0",)),
    Case(name="tucker", build=tucker(out=[8], into=[WIDTH], ranks=[3, 3])),
    Case(name="tucker-of-modes", build=tucker(out=[2, 4], into=[3, 4], ranks=[2, 3, 2, 3])),
    Case(name="tensor-train", build=lambda: TensorTrainLinear(WIDTH, 8, {"out": [2, 4], "in": [3, 4], "ranks": [3]})),
    Case(name="relaxed", build=lambda: RelaxedLinear(WIDTH, 8, SoftRank((2, 4), 8)), layers=("first", "last"),
        unasked=("soft",), steady=False),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}

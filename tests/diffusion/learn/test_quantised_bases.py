"""A base in few bits under training: it learns as in full precision, and what would write to its weights is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import comcat.diffusion as cd
from comcat.diffusion.learn.beforehand import Holdings, check_fits, holdings_of
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import family_of
from comcat.errors import MemoryShortage, ModelError, UnsupportedSite

from .. import tiny
from ..newer import NEWER

PROMPT = "a photo of V* dog"
WRITERS = [
    lambda pipe, folder: cd.fuse(pipe),
    lambda pipe, folder: cd.merge(pipe, "default"),
    lambda pipe, folder: cd.export_lora(pipe, folder / "lora.safetensors", steps=2),
]
FAMILIES = {"sd": tiny.stable_diffusion, "sd3": tiny.stable_diffusion_3, "flux2": NEWER["flux2"]}


class Linear4bit(nn.Linear):
    """As bitsandbytes holds 4 bits: two numbers a byte, and a layer of its own kind that multiplies with them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        weight = plain.weight.detach()
        scale = weight.abs().max() / 7
        codes = (weight / scale).round().to(torch.int8) + 8
        self.scale, self.shape = scale, codes.shape
        packed = (codes.flatten()[::2] * 16 + codes.flatten()[1::2]).to(torch.uint8)
        self.weight: Any = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([self.weight // 16, self.weight % 16], dim=1).reshape(self.shape)
        return nn.functional.linear(input, (codes.to(input.dtype) - 8) * self.scale, self.bias)


def to_8_bit(model: nn.Module) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())


def to_4_bit(model: nn.Module) -> None:
    """Every linear layer, also the one that reads the latents: the first weights are whole numbers then."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.numel() % 2 == 0:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Linear4bit(module))


def picture(pipe: Any) -> torch.Tensor:
    how = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), **how).images


@pytest.mark.parametrize("quantise", [to_8_bit, to_4_bit])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_learns_and_is_given_back(family: str, quantise: Any, tmp_path: Path) -> None:
    pipe = FAMILIES[family](tmp_path / "parts")
    denoiser = family_of(pipe).denoiser
    quantise(denoiser)
    before = picture(pipe)
    adapter = cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=2, resolution=16, lr=0.05)
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in adapter.parameters())
    learned = picture(pipe)
    assert not torch.equal(learned, before)
    cd.save(pipe, tmp_path / "dog.safetensors", dtype=torch.float32)
    cd.unload(pipe)
    assert torch.equal(picture(pipe), before)
    cd.load(pipe, tmp_path / "dog.safetensors")
    torch.testing.assert_close(picture(pipe), learned)


@pytest.mark.parametrize(
    ("quantise", "said"), [(to_8_bit, r"are quantised \(Int8Tensor\)"), (to_4_bit, "is a Linear4bit")]
)
def test_its_weights_are_not_written_to(quantise: Any, said: str, tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    quantise(pipe.unet)
    cd.attach(pipe, init="random")
    before = picture(pipe)
    for write in WRITERS:
        with pytest.raises(UnsupportedSite, match=said):
            write(pipe, tmp_path)
    assert torch.equal(picture(pipe), before) and not (tmp_path / "lora.safetensors").exists()


class State:
    packing_format_for_cpu = False


class Packing(nn.Linear):
    """As bitsandbytes' layers of 4 bit on CPUs with AVX-512 in bfloat16: a call without gradients packs the weights,
    and then none passes.
    """

    support_avx512bf16_for_cpu = False

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.load_state_dict(plain.state_dict())
        self.support_avx512bf16_for_cpu = True
        self.weight.quant_state = State()  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        state = self.weight.quant_state  # type: ignore[attr-defined]
        if self.support_avx512bf16_for_cpu and not self.training and not input.requires_grad:
            state.packing_format_for_cpu = True
        made = super().forward(input)
        return made.detach() if state.packing_format_for_cpu else made

    def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> None:
        self.weight.quant_state.packing_format_for_cpu = False  # type: ignore[attr-defined]
        super()._save_to_state_dict(destination, prefix, keep_vars)


def exchanged(model: nn.Module, kind: Any) -> list[Any]:
    made = []
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            made.append(kind(module).eval())
            setattr(model.get_submodule(parent), last, made[-1])
    return made


def test_layers_that_pack_themselves_for_inference_learn_all_the_same(tmp_path: Path) -> None:
    learned = {}
    for kind in (None, Packing):
        pipe = tiny.stable_diffusion(tmp_path / "parts")
        layers = exchanged(pipe.unet, kind) if kind else []
        picture(pipe)
        assert all(one.weight.quant_state.packing_format_for_cpu for one in layers)
        adapter = cd.customize(
            pipe, tiny.pictures(2), prompt=PROMPT, steps=2, resolution=16, lr=0.05, sample_every=1, sample_steps=1,
            out=tmp_path / f"{kind}.safetensors",
        )  # fmt: skip
        assert all(one.support_avx512bf16_for_cpu for one in layers)
        learned[kind] = adapter.named_parameters()
    for name, parameter in learned[None].items():
        torch.testing.assert_close(learned[Packing][name], parameter)


def test_layers_that_cannot_be_unpacked_are_told(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    stuck = exchanged(pipe.unet, Packing)[0]
    stuck._save_to_state_dict = lambda *args: None
    picture(pipe)
    with pytest.raises(ModelError, match=r"packed its weights for inference on this CPU.*load the pipeline anew"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16)


def test_layers_that_are_not_quantised_yet_are_told_before_the_work(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    pipe.unet.time_embedding.linear_1.weight.quant_state = None
    with pytest.raises(ModelError, match=r"unet.time_embedding.linear_1 is a Linear whose weights are not quantised"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16)


def test_bitsandbytes_learns_on_a_cpu(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    pipe = tiny.stable_diffusion(tmp_path / "parts")

    def of_4_bit(plain: nn.Linear) -> Any:
        made = library.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, torch.float32)
        made.load_state_dict(plain.state_dict())
        return made

    exchanged(pipe.unet, of_4_bit)
    with pytest.raises(ModelError, match="is a Linear4bit whose weights are not quantised yet"):
        cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=1, resolution=16)
    pipe.unet.to("cpu")
    adapter = cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=2, resolution=16, lr=0.05)
    assert all(p.isfinite().all() and p.any() for p in adapter.parameters())
    for write in WRITERS:
        with pytest.raises(UnsupportedSite, match="is a Linear4bit"):
            write(pipe, tmp_path)


def test_what_a_run_holds_is_said_before_it(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    family, settings = family_of(pipe), CustomizeSettings()
    weights = sum(p.numel() * 4 for p in pipe.unet.parameters())
    adapter = cd.attach(pipe)
    learned = sum(p.numel() for p in adapter.parameters())
    cd.unload(pipe)
    assert holdings_of(family, "cross", settings) == Holdings(weights, learned)
    live = holdings_of(family, "cross", CustomizeSettings(new_token="dog"))
    assert live.weights > weights and live.learned == learned
    adapter = cd.attach(pipe, where="all", text_encoder=True)
    assert holdings_of(family, "all", CustomizeSettings(text_encoder=True)).learned == sum(
        p.numel() for p in adapter.parameters()
    )
    cd.unload(pipe)
    to_8_bit(pipe.unet)
    assert holdings_of(family, "cross", settings).weights < 0.9 * weights
    assert "GB of weights" in Holdings(8_000_000_000, 17_694_720).note()
    assert "17,694,720 numbers that learn" in Holdings(8_000_000_000, 17_694_720).note()


def test_a_card_that_is_too_small_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 4 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card())
    with pytest.raises(MemoryShortage, match=r"holds 8\.\d GB throughout.*has 4\.0 GB; what needs less: a base in 16"):
        check_fits(Holdings(8 * 10**9, 10**6), torch.device("cuda"))
    check_fits(Holdings(10**9, 10**6), torch.device("cuda"))
    check_fits(Holdings(10**15, 10**6), torch.device("cpu"))

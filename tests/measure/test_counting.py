"""Parameters, bytes and multiply-accumulates."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.errors import DataError, ModelError
from comcat.measure import count_macs, count_parameters, counting, is_classifier, peak_memory, size_on_disk

from .models import Calls, hub, timm_vit


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    assert count_parameters(model) == 20 + 16 + 10
    model[1].weight = model[0].weight
    assert count_parameters(model) == 30
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another parameter on the same memory
    assert count_parameters(model) == 30
    with torch.device("meta"):
        assert count_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == 40
    with pytest.raises(ModelError, match="'weight' has no shape yet"):
        count_parameters(nn.LazyLinear(3))


def test_size_on_disk_is_the_length_of_the_file(tmp_path):
    from safetensors.torch import save, save_file

    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Linear(5, 3).to(torch.bfloat16))
    model.register_buffer("mask", torch.ones(7, dtype=torch.bool))
    model.register_buffer("naïve", torch.ones(2, dtype=torch.float64))
    model.register_buffer("scratch", torch.ones(99), persistent=False)
    assert size_on_disk(model) == len(save(model.state_dict()))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert size_on_disk(model) == (tmp_path / "m.safetensors").stat().st_size
    assert size_on_disk(model.to("meta")) == (tmp_path / "m.safetensors").stat().st_size


def test_size_on_disk_knows_every_type():
    from safetensors.torch import save

    for length in (1, 9, 10, 97, 1000):  # the header's length hangs on the order of the tensors
        model = nn.Module()
        for kind in counting._SAFETENSORS:
            model.register_buffer(f"a_{kind}", torch.zeros(length).to(getattr(torch, kind)))
            model.register_buffer(f"b_{kind}", torch.zeros(3).to(getattr(torch, kind)))
        assert size_on_disk(model) == len(save(model.state_dict()))
    with pytest.raises(ModelError, match="'odd' is of type complex128"):
        model.register_buffer("odd", torch.zeros(1, dtype=torch.complex128))
        size_on_disk(model)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_size_on_disk_of_tied_weights(device):
    from safetensors.torch import save

    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).to(device)
    model[1].weight = model[0].weight
    assert size_on_disk(model) == len(save({"0.weight": torch.zeros(64, 64)}))


@pytest.mark.parametrize(
    ("model", "shapes", "macs"),
    [
        (nn.Linear(8, 3), [(2, 5, 8)], 5 * 8 * 3),
        (nn.Linear(8, 3, bias=False), [(2, 8)], 8 * 3),
        (nn.Conv2d(4, 6, 3), [(2, 4, 8, 8)], 36 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), [(2, 4, 8, 8)], 16 * 6 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), [(2, 4, 8, 8)], 64 * 4 * 6 * 4),
        (Calls(torch.matmul), [(2, 3, 4, 5), (2, 3, 5, 6)], 3 * 4 * 5 * 6),
        (Calls(torch.bmm), [(2, 4, 5), (2, 5, 6)], 4 * 5 * 6),
        (Calls(partial(torch.einsum, "bij,bkj->bik")), [(2, 4, 5), (2, 6, 5)], 4 * 5 * 6),
        (Calls(lambda a, b: a[0] @ b[0]), [(2, 4, 5), (2, 5)], 4 * 5),
        (Calls(lambda a, b: a[0] @ b[0]), [(2, 5), (2, 5)], 5),
        (Calls(F.scaled_dot_product_attention), [(2, 3, 7, 4), (2, 3, 9, 4), (2, 3, 9, 6)], 3 * 7 * 9 * (4 + 6)),
        (
            Calls(partial(F.scaled_dot_product_attention, is_causal=True)),
            [(2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
            3 * 7 * 7 * 8,
        ),
    ],
)
def test_macs_of_one_operation(model, shapes, macs):
    example = tuple(torch.randn(shape) for shape in shapes)
    assert count_macs(model, example) == macs
    with torch.inference_mode():
        assert count_macs(model, example) == macs


def test_macs_of_a_vit_block_are_the_papers():
    from timm.models.vision_transformer import Block

    tokens, d = 10, 24
    assert count_macs(Block(d, 3), torch.randn(4, tokens, d)) == 12 * tokens * d**2 + 2 * tokens**2 * d


def test_macs_of_whole_models():
    images, tokens, d = torch.randn(2, 3, 32, 32), 5, 24
    block = 12 * tokens * d**2 + 2 * tokens**2 * d
    patches = 4 * 3 * 16 * 16 * d
    assert count_macs(timm_vit(), images) == patches + 2 * block + d * 7
    d = 16
    block = 4 * tokens * d**2 + 2 * tokens**2 * d + 2 * tokens * d * 32
    assert count_macs(hub("vit"), images) == 4 * 3 * 16 * 16 * d + block + d * 7
    assert count_macs(hub("vit"), {"pixel_values": images}) == count_macs(hub("vit"), images)


@pytest.mark.parametrize("fast", [True, False])
def test_macs_see_into_torchs_own_attention(fast):
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert count_macs(layer, x) == 5 * (4 * 64 + 2 * 8 * 16) + 2 * 25 * 8
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Perceptron(nn.Module):
    def __init__(self, into: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(into, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_count_as_what_they_wrap(in_place):
    def backend(graph, inputs):
        return lambda *_: (torch.zeros(4, 2),)  # compiled code hides what it does

    # A class of our own: compiled in place, torch 2.11 passes over its containers.
    layer, images = Perceptron(8, 3, 2), torch.randn(4, 8)
    macs, memory = count_macs(layer, images), peak_memory(layer, images)
    compiled = layer if in_place else torch.compile(layer, backend=backend)
    if in_place:
        layer.compile(backend=backend)
    with torch.no_grad():
        assert not compiled(images).any()
    assert count_macs(compiled, images) == macs == 8 * 3 + 3 * 2
    assert peak_memory(compiled, images) == memory
    assert count_parameters(compiled) == count_parameters(layer) and is_classifier(compiled)
    with torch.no_grad():
        assert not compiled(images).any()  # being measured has not made it eager


def test_macs_are_counted_under_one_kernel():
    kernels = torch.backends.cuda
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append((kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()))
        return x

    before = kernels.flash_sdp_enabled()
    count_macs(Calls(forward), torch.ones(1, 2))
    assert seen == [(False, False, True)] and kernels.flash_sdp_enabled() is before


def test_examples_must_hold_pictures():
    for measured in (count_macs, peak_memory):
        with pytest.raises(DataError, match="got str, expected a tensor"):
            measured(nn.Identity(), "cat.png")
        with pytest.raises(DataError, match=r"shape \(0, 3\), expected at least one picture"):
            measured(nn.Identity(), torch.ones(0, 3))
        with pytest.raises(ModelError, match="Linear cannot run"):
            measured(nn.Linear(4, 4), torch.ones(1, 3))

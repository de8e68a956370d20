import inspect
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat import measure
from comcat.errors import DataError, ModelError, NumericsError, SettingsError
from comcat.measure import (
    Evaluation,
    Timing,
    benchmark,
    count_macs,
    count_parameters,
    environment,
    evaluate,
    is_classifier,
    model_output,
    peak_memory,
    ratio,
    size_on_disk,
)

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def timm_vit(**changes) -> nn.Module:
    import timm

    settings = {
        "img_size": 32,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 7,
    } | changes
    return timm.create_model("vit_tiny_patch16_224", **settings)


def timm_distilled() -> nn.Module:
    import timm

    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=7
    )


def hub(kind: str) -> nn.Module:
    import transformers as t

    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    build = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=7)),
        "vit without head": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=0)),
        "vit backbone": lambda: t.ViTModel(t.ViTConfig(**VISION)),
        "vit tokens": lambda: t.ViTModel(t.ViTConfig(**VISION), add_pooling_layer=False),
        "deit teacher": lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**VISION, num_labels=7)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
        "dinov2 head": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**VISION, num_labels=7)),
        "beit": lambda: t.BeitModel(t.BeitConfig(**VISION)),
        "swin": lambda: t.SwinForImageClassification(t.SwinConfig(**swin, num_labels=7)),
        "clip vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        "clip projection": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, projection_dim=12)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)),
        "siglip vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
        "masked": lambda: t.ViTForMaskedImageModeling(t.ViTConfig(**VISION)),
    }
    return build[kind]()


class Says(nn.Module):
    """A classifier whose logits are the picture's own numbers, times a weight of one."""

    def __init__(self, classes: int, factor: float = 1.0) -> None:
        super().__init__()
        self.num_classes = classes
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.factor


class Calls(nn.Module):
    """Hands its input to a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs, **named):
        return self.function(*inputs, **named)


def pictures(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


# ---------------------------------------------------------------- what a model says


@pytest.mark.parametrize(
    ("kind", "width", "classes"),
    [
        ("vit", 7, True),
        ("vit without head", 16, False),
        ("vit backbone", 16, False),
        ("vit tokens", 16, False),
        ("deit teacher", 7, True),
        ("dinov2", 16, False),
        ("dinov2 head", 7, True),
        ("beit", 16, False),
        ("swin", 7, True),
        ("clip vision", 16, False),
        ("clip projection", 12, False),
        ("clip", 12, False),
        ("siglip vision", 16, False),
    ],
)
def test_transformers_models_give_one_row_a_picture(kind, width, classes):
    model = hub(kind).eval()
    assert model_output(model, torch.randn(3, 3, 32, 32)).shape == (3, width)
    assert is_classifier(model) is classes


def test_transformers_output_is_the_field_that_says_most():
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for kind, field in (("vit", "logits"), ("clip projection", "image_embeds"), ("dinov2", "pooler_output")):
            model = hub(kind).eval()
            assert torch.equal(model_output(model, images), model(pixel_values=images)[field])
        model = hub("vit tokens").eval()
        torch.testing.assert_close(model_output(model, images), model(images).last_hidden_state.mean(1))


def test_output_without_a_known_field_is_refused():
    with pytest.raises(ModelError, match=r"ViTForMaskedImageModeling returns \['reconstruction'\].*expected logits"):
        model_output(hub("masked").eval(), torch.randn(1, 3, 32, 32))


def test_timm_models_and_their_heads():
    images = torch.randn(2, 3, 32, 32)
    assert model_output(timm_vit().eval(), images).shape == (2, 7)
    assert is_classifier(timm_vit()) and not is_classifier(timm_vit(num_classes=0))
    tokens = timm_vit(num_classes=0, global_pool="", class_token=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model_output(tokens, images), tokens(images).mean(1))


def test_distilled_heads_are_averaged():
    model, images = timm_distilled().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model.set_distilled_training(True)
        model.train()
        both = model(images)
        assert isinstance(both, tuple)
        torch.testing.assert_close(model_output(model, images), expected)


def test_plain_modules_and_wrappers():
    assert is_classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    assert not is_classifier(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    headed = nn.ModuleDict({"fc": nn.Identity(), "stem": nn.Linear(4, 3)})
    assert not is_classifier(headed)
    headed["fc"] = nn.LayerNorm(3)
    assert is_classifier(headed)
    assert is_classifier(nn.DataParallel(timm_vit())) and not is_classifier(nn.DataParallel(timm_vit(num_classes=0)))
    assert model_output(nn.Flatten(0), torch.ones(3, 1)).shape == (3, 1)
    assert model_output(nn.Identity(), torch.ones(3, 2, 4, 4)).shape == (3, 32)


def test_outputs_that_say_nothing_are_refused():
    images = torch.randn(2, 3)
    with pytest.raises(ModelError, match="Calls returns a str"):
        model_output(Calls(lambda _: "seven"), images)
    with pytest.raises(ModelError, match=r"returns a list of \(2, 3\) float32 on cpu, \(2, 2\)"):
        model_output(Calls(lambda x: [x, x[:, :2]]), images)
    with pytest.raises(ModelError, match=r"returns shape \(1, 3\) for 2 pictures"):
        model_output(Calls(lambda x: x[:1]), images)
    with pytest.raises(ModelError, match=r"Linear cannot run on an input of \(2, 3\) float32 on cpu"):
        model_output(nn.Linear(4, 4), images)


# ---------------------------------------------------------------- size and work


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
        for kind in measure._SAFETENSORS:
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


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_count_as_what_they_wrap(in_place):
    def backend(graph, inputs):
        return lambda *_: (torch.zeros(4, 2),)  # compiled code hides what it does

    layer, images = nn.Sequential(nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 2)), torch.randn(4, 8)
    macs, memory = count_macs(layer, images), peak_memory(layer, images)
    compiled = layer if in_place else torch.compile(layer, backend=backend)
    if in_place:
        layer.compile(backend=backend)
    with torch.no_grad():
        assert not compiled(images).any()
    assert count_macs(compiled, images) == macs == 8 * 3 + 3 * 2
    assert peak_memory(compiled, images) == memory
    assert count_parameters(compiled) == count_parameters(layer) and is_classifier(compiled)


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


class Cached(nn.Module):
    """Keeps a table for evaluation and drops it when training begins, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.table = None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.weight
        if self.table is None:
            self.table = self.weight * 1
        return x * self.table


def fails_to_count(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ModelError, match="cannot run"):
        count_macs(model, torch.ones(1, 5))


@pytest.mark.parametrize(
    "measured",
    [
        lambda model, x: count_macs(model, x),
        lambda model, x: peak_memory(model, x),
        lambda model, x: evaluate(model, [x]),
        lambda model, x: evaluate(nn.Identity(), [x], reference=model),
        lambda model, x: benchmark({"m": model}, x, repeats=1, min_seconds=0),
        fails_to_count,
    ],
)
def test_the_training_flags_come_back(measured):
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(Cached(), nn.BatchNorm1d(2)), nn.Sequential(nn.Dropout(0.5)))
    model.train()
    model[1][1].eval()
    model[2].eval()
    model[2][0].train()
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(model, torch.randn(3, 2))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model[1][0].table is None  # a table left over would serve stale weights at the next evaluation


def test_a_model_that_was_measured_can_still_train():
    model, x = Cached().eval(), torch.randn(3, 2, requires_grad=True)
    benchmark({"m": model}, x.detach(), repeats=1, min_seconds=0)
    model(x).sum().backward()
    assert x.grad is not None


# ---------------------------------------------------------------- memory


def test_peak_memory_by_hand():
    x = torch.randn(4, 256)
    size = x.numel() * 4
    relus = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU())
    assert peak_memory(relus, x) == 3 * size  # the example, and a result made from the one before
    assert peak_memory(nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True)), x) == 2 * size
    assert peak_memory(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (16, 16))), x) == size  # views
    assert peak_memory(Calls(lambda t: [t + 1, t + 2, t + 3]), x) == 4 * size
    assert peak_memory(Calls(lambda t: (t.repeat(1, 8)[:, :1] + 1).relu()), x) == 9 * size + 16
    linear = nn.Linear(256, 64)
    weights = count_parameters(linear) * 4
    assert peak_memory(linear, x) == weights + size + 4 * 64 * 4


def test_peak_memory_counts_shared_weights_once_and_grows_with_the_batch():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    apart = peak_memory(model, torch.randn(2, 32))
    model[1].weight = model[0].weight
    assert apart - peak_memory(model, torch.randn(2, 32)) == 32 * 32 * 4
    vit = timm_vit()
    held = count_parameters(vit) * 4
    one, four = (peak_memory(vit, torch.randn(batch, 3, 32, 32)) - held for batch in (1, 4))
    assert 3.5 * one < four <= 4 * one


def test_tables_built_once_are_held_throughout():
    model = Cached().eval()
    assert peak_memory(model, torch.randn(4, 2)) == 8 + 8 + 32 + 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda_leaves_out_what_others_hold():
    model, x = nn.Sequential(nn.ReLU(), nn.ReLU()).cuda(), torch.randn(1024, 1024, device="cuda")
    alone = peak_memory(model, x)
    other = torch.empty(1 << 26, device="cuda")
    assert peak_memory(model, x) == alone == 3 * x.numel() * 4
    del other


# ---------------------------------------------------------------- time


class Clock:
    """Stands for the clock: models move it on, by more in some rounds than in others."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def model(self, name: str, seconds, models: int = 2) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            # The first call of each model checks that it runs.
            self.now += seconds(max(0, (len(self.calls) - models) // models))
            self.calls.append(name)
            return x

        return Calls(forward)


def test_benchmark_interleaves_and_pairs(monkeypatch):
    clock = Clock(monkeypatch)
    drift = [1, 1, 8, 2, 4]  # of the machine, from round to round
    models = {"slow": clock.model("slow", lambda r: 3.0 * drift[r]), "fast": clock.model("fast", lambda r: drift[r])}
    timings = benchmark(models, torch.ones(6, 2), repeats=4, warmup=1, min_seconds=0)
    assert clock.calls == ["slow", "fast"] + ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert timings["slow"].samples_s == (3, 24, 6, 12) and timings["fast"].samples_s == (1, 8, 2, 4)
    fast = timings["fast"]
    assert (fast.median_s, fast.low_s, fast.high_s, fast.repeats, fast.batch_size) == (3, 1.75, 5, 4, 6)
    assert fast.throughput == 2
    assert ratio(timings, "slow", "fast") == (3, 3, 3)
    assert ratio(timings, "fast", "slow") == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_benchmark_goes_on_for_min_seconds(monkeypatch):
    clock = Clock(monkeypatch)
    models = {"a": clock.model("a", lambda _: 0.25), "b": clock.model("b", lambda _: 0.75)}
    timings = benchmark(models, torch.ones(1, 2), repeats=2, warmup=0, min_seconds=2)
    assert timings["a"].repeats == timings["b"].repeats == 4  # 4 seconds in all, 2 for each on average
    assert len(clock.calls) == 2 + 8


def test_timing_as_json():
    timing = Timing(median_s=0.5, low_s=0.4, high_s=0.6, repeats=2, batch_size=8, samples_s=(0.4, 0.6))
    plain = {"median_s": 0.5, "low_s": 0.4, "high_s": 0.6, "repeats": 2, "batch_size": 8, "throughput": 16.0}
    assert json.loads(json.dumps(timing.to_dict())) == plain
    assert json.loads(json.dumps(timing.to_dict(samples=True))) == plain | {"samples_s": [0.4, 0.6]}


def test_benchmark_runs_for_inference_and_under_autocast():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append((self.training, torch.is_inference_mode_enabled(), out.dtype))
            return out

    quick = {"repeats": 1, "warmup": 1, "min_seconds": 0}
    timing = benchmark({"m": Spy(2, 2)}, torch.ones(1, 2), **quick)["m"]
    assert timing.median_s > 0 and timing.repeats == 1 and timing.low_s == timing.high_s
    assert seen == [(False, False, torch.float32)] + [(False, True, torch.float32)] * 2
    seen.clear()
    benchmark({"m": Spy(2, 2)}, torch.ones(1, 2), autocast_dtype=torch.bfloat16, **quick)
    assert {dtype for _, _, dtype in seen} == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")


def test_benchmark_refuses_what_it_cannot_time():
    good, x = nn.Identity(), torch.ones(1, 2)
    for models in ({}, good, [good], {"path": "model.safetensors"}):
        with pytest.raises(SettingsError, match="expected a mapping"):
            benchmark(models, x)
    for wrong in ({"repeats": 0}, {"warmup": -1}, {"min_seconds": -1.0}, {"min_seconds": math.inf}):
        with pytest.raises(SettingsError, match="expected at least 1"):
            benchmark({"m": good}, x, **wrong)
    with pytest.raises(SettingsError, match=r"autocast_dtype: got torch.float32"):
        benchmark({"m": good}, x, autocast_dtype=torch.float32)
    with pytest.raises(DataError, match="expected a tensor of pictures"):
        benchmark({"m": good}, [x])
    with pytest.raises(DataError, match="at least one picture"):
        benchmark({"m": good}, torch.ones(0, 2))
    with pytest.raises(ModelError, match=r"model 'bad' cannot run on an input of \(1, 2\)"):
        benchmark({"good": good, "bad": nn.Linear(3, 3)}, x)


def test_ratio_refuses_what_was_not_paired():
    one = Timing(median_s=1, low_s=1, high_s=1, repeats=1, batch_size=1, samples_s=(1.0,))
    two = Timing(median_s=1, low_s=1, high_s=1, repeats=2, batch_size=1, samples_s=(1.0, 1.0))
    timings = {"dense": one, "small": two, "bare": Timing(median_s=1, low_s=1, high_s=1, repeats=1, batch_size=1)}
    with pytest.raises(ModelError, match=r"no timing of 'dens'.*did you mean 'dense'"):
        ratio(timings, "dens", "small")
    for other in ("small", "bare"):
        with pytest.raises(SettingsError, match="expected both from one run"):
            ratio(timings, "dense", other)
    with pytest.raises(SettingsError, match="expected both from one run"):
        ratio(timings, "bare", "bare")


@pytest.mark.parametrize("isolated", [True, False])  # not every supported torch keeps its compiled models apart
def test_compiled_copies_leave_the_models_alone(monkeypatch, isolated):
    real, made, graphs = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_lightly(model, **options):
        made.append((model, options))
        return real(model, backend=backend, **options)

    if isolated and "isolate_recompiles" in inspect.signature(real).parameters:
        compile_lightly.__wrapped__ = real
    monkeypatch.setattr(torch, "compile", compile_lightly)
    # More models of one class than dynamo compiles by default before it silently runs the rest eagerly.
    models = {f"rank {r}": nn.Sequential(nn.Linear(2, r), nn.Linear(r, 2)) for r in range(1, 12)}
    timings = benchmark(models, torch.ones(1, 2), repeats=2, warmup=0, min_seconds=0, compile=True)
    assert set(timings) == set(models) and len(made) == len(graphs) == len(models)
    for (copy, options), model in zip(made, models.values(), strict=True):
        assert copy is not model and copy[0].weight is not model[0].weight
        assert torch.equal(copy[0].weight, model[0].weight) and not copy[0].weight.is_inference()
        assert options["dynamic"] is False
        assert model._compiled_call_impl is None and model.training


def test_a_failing_compiler_names_the_model(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(ModelError, match=r"(?s)torch.compile failed for model 'small'.*no C\+\+ compiler"):
        benchmark({"small": nn.Linear(2, 2)}, torch.ones(1, 2), compile=True)


def test_environment_is_complete_and_plain():
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["device"] and found["cpu"] and found["default_dtype"] == "float32"


# ---------------------------------------------------------------- accuracy

LOGITS = pictures(
    [9.0, 0, 0, 0, 0, 0, 0],
    [0.0, 1, 2, 3, 4, 5, 6],
    [6.0, 5, 4, 3, 2, 1, 0],
    [0.0, 0, 5, 0, 0, 0, 1],
    [1.0, 2, 3, 4, 5, 6, 7],
)
LABELS = torch.tensor([0, 2, 6, 2, 0])  # ranks 1, 5, 7, 1, 7


def test_evaluation_by_hand():
    found = evaluate(Says(7), [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])])
    flat = LOGITS.flatten(1)
    loss = -sum(float(row[label] - row.exp().sum().log()) for row, label in zip(flat, LABELS, strict=True)) / 5
    assert found == Evaluation(count=5, top1=40.0, top5=60.0, loss=pytest.approx(loss, rel=1e-5))
    assert json.loads(json.dumps(found.to_dict()))["agreement"] is None


def test_evaluation_against_a_reference_by_hand():
    reference = Says(7, factor=-1.0)
    found = evaluate(Says(7), [LOGITS], reference=reference)
    p, q = (-LOGITS).flatten(1).softmax(1), LOGITS.flatten(1).softmax(1)
    assert found.count == 5 and found.top1 is found.top5 is found.loss is None
    assert found.cosine == pytest.approx(-1, abs=1e-6) and found.agreement == 0
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    same = evaluate(Says(7), [LOGITS], reference=Says(7))
    assert (same.agreement, same.divergence) == (100, 0) and same.cosine == pytest.approx(1)
    rounding = evaluate(Says(7, 1 + 1e-6), [LOGITS * 30], reference=Says(7))
    assert 0 <= rounding.divergence < 1e-4
    itself = Says(7)
    assert evaluate(itself, [LOGITS], reference=itself).agreement == 100


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_kind_of_batch_says_the_same(size):
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(LOGITS, LABELS)
    expected = evaluate(Says(7), [(LOGITS, LABELS)])
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in data]
    streams = [
        DataLoader(data, batch_size=size),
        DataLoader(rows, batch_size=size),
        (list(batch) for batch in zip(LOGITS.split(size), LABELS.split(size), strict=True)),
        [(images, labels.tolist()) for images, labels in DataLoader(data, batch_size=size)],
    ]
    for stream in streams:
        found = evaluate(Says(7), stream)
        assert (found.count, found.top1, found.top5) == (5, expected.top1, expected.top5)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    unlabelled = [LOGITS.split(size), [(LOGITS, None)], DataLoader(TensorDataset(LOGITS), batch_size=size)]
    for stream in [*unlabelled, [{"pixel_values": LOGITS}], [LOGITS[:0], LOGITS]]:
        assert evaluate(Says(7), stream) == Evaluation(count=5)


def test_few_classes_have_no_top5():
    found = evaluate(Says(5), [(LOGITS[:, :5], LABELS.clamp(max=4))])
    assert found.top5 is None and found.top1 is not None


def test_features_are_compared_by_cosine_alone():
    images = torch.randn(3, 3, 32, 32)
    model, other = hub("dinov2"), hub("dinov2")
    found = evaluate(model, [(images, torch.tensor([0, 1, 999]))], reference=other)
    with torch.no_grad():
        a, b = (m.eval()(images).pooler_output for m in (model, other))
    cosine = float((a * b).sum(1).div(a.norm(dim=1) * b.norm(dim=1)).mean())
    assert found == Evaluation(count=3, cosine=pytest.approx(cosine, abs=1e-5))


def test_votes_need_classes_on_both_sides():
    features = nn.Flatten()
    for model, reference in ((features, Says(7)), (Says(7), features)):
        assert evaluate(model, [LOGITS], reference=reference) == Evaluation(count=5, cosine=pytest.approx(1))


def test_real_classifiers_evaluate(capsys):
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 6])
    found = evaluate(hub("vit"), [(images, labels)], reference=timm_vit(), progress=True)
    assert None not in found.to_dict().values()
    assert "evaluate" in capsys.readouterr().err


def test_pictures_take_the_models_type_and_autocast_another():
    seen = []

    class Spy(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images.flatten(1))
            seen.append((images.dtype, out.dtype))
            return out

    evaluate(Spy(7, 7).bfloat16(), [LOGITS])
    evaluate(Spy(7, 7), [LOGITS.double()])
    evaluate(Spy(7, 7), [LOGITS], dtype=torch.bfloat16, device="cpu")
    evaluate(Spy(7, 7).bfloat16(), [LOGITS], dtype=torch.bfloat16)
    half, full = torch.bfloat16, torch.float32
    assert seen == [(half, half), (full, full), (full, half), (half, half)]
    with pytest.raises(SettingsError, match=r"dtype: got torch.float32, expected .* the model's own torch.bfloat16"):
        evaluate(Spy(7, 7).bfloat16(), [LOGITS], dtype=torch.float32)


def test_labels_must_fit():
    with pytest.raises(DataError, match="batch 1: got label 7, expected 0 to 6 of 7 classes"):
        evaluate(Says(7), [(LOGITS, LABELS), (LOGITS, LABELS + 1)])
    with pytest.raises(DataError, match="got label -1"):
        evaluate(Says(7), [(LOGITS, LABELS - 1)])
    for labels in (LABELS[:4], LABELS.float(), F.one_hot(LABELS, 7), 3, ["cat"] * 5, LABELS > 1):
        with pytest.raises(DataError, match=r"batch 0: .*whole number"):
            evaluate(Says(7), [(LOGITS, labels)])
    with pytest.raises(DataError, match="batch 1 has no labels and those before have some"):
        evaluate(Says(7), [(LOGITS, LABELS), LOGITS])
    with pytest.raises(DataError, match="batch 1 has labels and those before have none"):
        evaluate(Says(7), [LOGITS, (LOGITS, LABELS)])


def test_pictures_must_be_pictures():
    for nothing in ([], [LOGITS[:0]], iter(())):
        with pytest.raises(DataError, match="no pictures"):
            evaluate(Says(7), nothing)
    for batch in ("cat.png", LOGITS.to(torch.uint8), (LOGITS, LABELS, LABELS), None, torch.tensor(1.0)):
        with pytest.raises(DataError, match=r"batch 0: .*expected pictures"):
            evaluate(Says(7), [batch])
    with pytest.raises(DataError, match=r"got the keys \['image'\], expected pixel_values"):
        evaluate(Says(7), [{"image": LOGITS}])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_sound(bad):
    images = LOGITS.clone()
    images[3, 2] = bad
    with pytest.raises(NumericsError, match="batch 1: the model's output for picture 3 has NaN or infinity"):
        evaluate(Says(7), [LOGITS, images])
    with pytest.raises(NumericsError, match="the reference's output for picture 0"):
        evaluate(Says(7), [LOGITS], reference=Says(7, bad))


def test_models_must_match_and_be_there():
    with pytest.raises(ModelError, match="gives 7 numbers a picture, the reference 3"):
        evaluate(Says(7), [LOGITS], reference=nn.Sequential(nn.Flatten(), nn.Linear(7, 3)))
    with pytest.raises(ModelError, match="the model is on cpu, expected meta; move it there"):
        evaluate(Says(7), [LOGITS], device="meta")
    with pytest.raises(ModelError, match="the reference has no weights"):
        evaluate(Says(7), [LOGITS], reference=Says(7).to("meta"))
    with pytest.raises(ModelError, match="Linear cannot run"):
        evaluate(nn.Linear(3, 3), [LOGITS])

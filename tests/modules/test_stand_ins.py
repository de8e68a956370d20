"""What torch and other libraries do to any module works on every module of ours, and gives what it gave.

One test a behaviour, run on every case of ``cases.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comcat.errors import ModelError

from .cases import BY_NAME, CASES, Case

STEADY = [case.name for case in CASES if case.steady]
CALLED = [case.name for case in CASES if case.steady and not case.unasked]
TRACED = [case.name for case in CASES if case.steady and case.traced]
TOKENS = [case.name for case in CASES if case.name.startswith("tokens")]
WITH_LAYERS = [case.name for case in CASES if case.layers and case.steady]


@pytest.fixture(params=list(BY_NAME))
def case(request: pytest.FixtureRequest) -> Case:
    return BY_NAME[request.param]


def on_cases(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=names)


def output(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        return model(*case.arguments())


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- torch


def test_every_module_with_weights_of_its_own_is_called_once(case: Case) -> None:
    """Hooks see what happens, and so do all that work through hooks."""
    model, calls = case.model(), Counter[str]()
    owners = [
        n for n, m in model.named_modules() if m._parameters and any(p is not None for p in m._parameters.values())
    ]
    if not case.steady:  # the distribution over ranks is asked, not called
        owners = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    owners = [n for n in owners if not n.endswith(case.unasked)]
    often = {n for n in owners if n.endswith(case.often)}
    for name in owners:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    output(model, case)
    assert set(calls) == set(owners)
    assert {n for n, times in calls.items() if times > 1} == often


def test_a_hook_on_a_layer_changes_the_output(case: Case) -> None:
    model = case.model()
    before = output(model, case)
    for name in case.layers:
        layer = next(m for n, m in model.named_modules() if n.endswith(f".{name}"))
        handle = layer.register_forward_hook(lambda m, i, o: o * torch.linspace(1, 2, o.shape[-1]))
        assert (output(model, case) - before).abs().max() > 1e-3, name
        handle.remove()
    assert output(model, case).equal(before)


def test_copies_and_pickles_compute_the_same_and_live_apart(case: Case) -> None:
    model = case.model()
    before = output(model, case)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    own = {id(t) for t in model.state_dict(keep_vars=True).values()}
    for twin in twins:
        assert output(twin, case).equal(before)
        assert not own & {id(t) for t in twin.state_dict(keep_vars=True).values()}
        for p in twin.parameters():
            p.data.zero_()
    assert output(model, case).equal(before)
    assert all(type(t.inner).__name__ == type(model.inner).__name__ for t in twins)


def test_state_dict_round_trip(case: Case) -> None:
    model, other = case.model(), case.model()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert output(other, case).equal(output(model, case))
    assert not any(n.endswith("inner.weight") for n in model.state_dict())  # an answer, not a parameter
    extra = {**model.state_dict(), "inner.surplus": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="surplus"):
        other.load_state_dict(extra, strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    model = case.model()
    before = output(model, case)
    model.to(dtype)
    arguments = [a.to(dtype) if a.is_floating_point() else a for a in case.arguments()]
    with torch.no_grad():
        got = model(*arguments)
    assert got.dtype == dtype
    assert (got.double() - before.double()).abs().max() < (1e-5 if dtype == torch.float64 else 0.1)


def test_autocast(case: Case) -> None:
    model = case.model()
    before = output(model, case)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(model, case)
    assert (got.float() - before).abs().max() < 0.1


def test_from_the_meta_device(case: Case) -> None:
    """Built without memory, given memory, and loaded, as large models are."""
    model = case.model()
    empty = copy.deepcopy(model).to("meta")
    assert empty(*(a.to("meta") for a in case.arguments())).shape == output(model, case).shape
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    buffers = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():  # those that are not saved are the host's to make again
        buffer.copy_(buffers[name])
    assert output(empty, case).equal(output(model, case))


def test_freezing(case: Case) -> None:
    model = case.model().requires_grad_(False)
    assert not model(*case.arguments()).requires_grad
    for name, p in model.named_parameters():
        p.requires_grad_(True)
        model(*case.arguments()).square().sum().backward()
        assert p.grad is not None, name
        assert [n for n, q in model.named_parameters() if q.grad is not None] == [name]
        p.requires_grad_(False)
        p.grad = None


def test_gradient_checkpointing(case: Case) -> None:
    gradients = []
    for again in (False, True):
        model, arguments = case.model(), case.arguments()
        got = checkpoint(model, *arguments, use_reentrant=False) if again else model(*arguments)
        got.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_attributes_of_a_users_own(case: Case) -> None:
    model = case.model()
    model.inner.note = {"layer": 3}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.inner.note == {"layer": 3}


@on_cases([case.name for case in CASES if hasattr(case.build(), "weight")])
def test_the_weight_that_it_answers_is_what_it_multiplies_by(case: Case) -> None:
    layer = case.model().inner
    x = torch.randn(2, 5, layer.in_features)
    assert layer.weight.shape == (layer.out_features, layer.in_features)
    close(nn.functional.linear(x, layer.weight, layer.bias), layer(x), 1e-5)


@on_cases(TRACED)
def test_fx(case: Case) -> None:
    model = case.model()
    assert output(torch.fx.symbolic_trace(model), case).equal(output(model, case))


@on_cases(TRACED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(case: Case, tmp_path: Path) -> None:
    model = case.model()
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, str(tmp_path / "model.pt"))
    close(output(torch.jit.load(str(tmp_path / "model.pt")), case), output(model, case))


@on_cases(TOKENS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_be_traced_is_refused(case: Case) -> None:
    model = case.model()
    for trace in (torch.fx.symbolic_trace, torch.jit.script):
        with pytest.raises(ModelError, match=r"use torch\.export"):
            trace(model)


@on_cases(STEADY)
def test_export(case: Case) -> None:
    model = case.model()
    exported = torch.export.export(model, case.arguments()).module()
    close(output(exported, case), output(model, case))


@on_cases(["tokens-alike", "tokens-windows", "tokens-windows-odd", "tokens-chosen"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_with_any_number_of_pictures(case: Case, tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, (x,) = case.model(), case.arguments()
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model, (x,), str(tmp_path / "model.onnx"), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in pytest.importorskip("onnx").load(str(tmp_path / "model.onnx")).graph.node}
    assert not {k for k in kinds if k.startswith("Scatter")}
    with torch.no_grad():
        for pictures in (x, x[:1], torch.cat((x, x.flip(0), x))):
            got = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})[0]
            close(torch.from_numpy(got), model(pictures), 1e-4)


@on_cases(TOKENS)
def test_replicas_of_data_parallel(case: Case) -> None:
    """What torch's DataParallel makes for every device: the class and the numbers stay, the children are its own."""
    model = case.model()
    replica = model.inner._replicate_for_data_parallel()
    assert type(replica) is type(model.inner) and replica.token_reduction.keep == model.inner.token_reduction.keep
    with torch.no_grad():
        x = model.norm(*case.arguments())
        assert replica(x).equal(model.inner(x))


@on_cases(["linear", "attention-mask", "beit", "tucker-of-modes", "tokens-alike", "tokens-windows", "tokens-chosen",
           "adapter", "adapter-of-a-text-encoder"])  # fmt: skip
def test_compile(case: Case) -> None:
    torch._dynamo.reset()
    model = case.model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(output(compiled, case), output(model, case))


# ---------------------------------------------------------------- other libraries


@on_cases(WITH_LAYERS)
@pytest.mark.filterwarnings("ignore:.*already been")
def test_lora_by_peft(case: Case) -> None:
    """LoRA on the factors by name: it moves the output, learns, and merges into the weights."""
    peft: Any = pytest.importorskip("peft")
    before = output(case.model(), case)
    model = peft.get_peft_model(case.model(), peft.LoraConfig(r=4, target_modules=list(case.layers)))
    close(output(model, case), before)
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert {n.rpartition(".")[2] for n in adapted} == set(case.layers)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    moved = output(model, case)
    assert (moved - before).abs().max() > 1e-2
    model(*case.arguments()).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == ("lora_" in name), name
    close(output(model.merge_and_unload(), case), moved, 1e-5)


@on_cases(CALLED)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_by_accelerate(case: Case, where: str, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model = case.model()
    before = output(model, case)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert output(model, case).equal(before)


@on_cases(WITH_LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation(case: Case) -> None:
    model = case.model()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    before = output(model, case)
    assert 0 < (output(quantised, case) - before).abs().max() < 0.05 * before.abs().max()


def test_int8_by_torchao() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    for case in (BY_NAME[n] for n in WITH_LAYERS):
        model = case.model()
        before = output(model, case)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert 0 < (output(model, case) - before).abs().max() < 0.05 * before.abs().max(), case.name

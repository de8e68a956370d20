"""What all measures owe: the model stays as it was, and numbers say where they were taken."""

import json

import pytest
import torch
from torch import Tensor, nn

from comcat.errors import ModelError
from comcat.measure import benchmark, count_macs, environment, evaluate, peak_memory

from .models import Cached


def fails_to_count(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ModelError, match="cannot run"):
        count_macs(model, torch.ones(1, 5))


@pytest.mark.parametrize(
    "measured",
    [
        lambda model, x: count_macs(model, x),
        lambda model, x: peak_memory(model, x),
        lambda model, x: evaluate(model, [x]),
        lambda model, x: evaluate(nn.Identity(), [x], against=model),
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


def test_environment_is_complete_and_plain():
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["device"] and found["cpu"] and found["default_dtype"] == "float32"

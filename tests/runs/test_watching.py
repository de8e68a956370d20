"""A loss that is no longer a number, or explodes, stops the run and says where."""

import pytest
import torch
from torch import nn

from comcat.errors import NumericsError
from comcat.runs.watching import FACTOR, WINDOW, LossWatch, first_unsound, first_unsound_output
from tests.tuning.material import model


def check(watch: LossWatch, loss: float, net: nn.Module | None = None, **keywords) -> None:
    watch.last_good = "the last good checkpoint is X"
    watch.check(loss, 12, [] if net is None else net.named_parameters(), **keywords)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_told_with_step_and_checkpoint(loss):
    with pytest.raises(NumericsError, match=r"the loss is .* at step 12; the last good checkpoint is X"):
        check(LossWatch(), loss)
    with pytest.raises(NumericsError, match=r"checkpoint is X; a lower lr may help$"):
        check(LossWatch(), loss, advice="a lower lr may help")
    with pytest.raises(NumericsError, match=r"at step 3; there is no checkpoint yet$"):
        LossWatch().check(loss, 3, [])


def test_an_explosion_is_told_but_no_rise_at_the_start():
    watch = LossWatch()
    for loss in (0.01, 5.0, 100.0):  # not enough is known yet
        check(watch, loss)
    watch = LossWatch()
    for _ in range(WINDOW):
        check(watch, 2.0)
    check(watch, 0.99 * FACTOR * 2.0)
    watch = LossWatch()
    for _ in range(WINDOW):
        check(watch, 2.0)
    with pytest.raises(NumericsError, match=r"is 40.2 at step 12 \(the 50 before were at most 2\)"):
        check(watch, 1.005 * FACTOR * 2.0)


def test_the_place_is_the_first_bad_parameter():
    net = model()
    assert first_unsound(net.named_parameters()) is None
    with torch.no_grad():
        net.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
        net.head.bias[0] = float("nan")
    with pytest.raises(NumericsError, match=r"first seen in blocks\.1\.mlp\.fc1\.weight"):
        check(LossWatch(), float("nan"), net, replay=lambda: "elsewhere")


def test_without_a_bad_parameter_the_place_is_the_first_bad_output():
    net, images = model(), torch.randn(2, 3, 8, 8)
    assert first_unsound_output(net, images) is None
    with torch.no_grad():
        net.blocks[1].norm2.weight.fill_(1e38)  # finite, but not for long
        net.blocks[1].norm2.bias.fill_(3e38)
    place = first_unsound_output(net, images)
    assert place is not None and place.startswith("blocks.1.")
    with pytest.raises(NumericsError, match=rf"first seen in {place};"):
        check(LossWatch(), float("nan"), net, replay=lambda: first_unsound_output(net, images))
    assert not any(module._forward_hooks for module in net.modules())


def test_else_the_place_is_the_first_bad_gradient():
    net = model()
    net.head.weight.grad = torch.full_like(net.head.weight, float("nan"))
    with pytest.raises(NumericsError, match=r"first seen in the gradient of head\.weight"):
        check(LossWatch(), float("nan"), net, replay=lambda: None)
